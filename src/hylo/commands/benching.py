"""hylo bench: latency by context length, through vLLM's engine or the Hugging Face path."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hylo.commands import shared
from hylo.commands.shared import Dtype, absent, bytes_of, lengths_of, numbers_of
from hylo.errors import HyloError

app = typer.Typer(help="Measures TTFT and TPOT by context length.", no_args_is_help=True)

ModelsArgument = Annotated[list[Path], typer.Argument(metavar="MODEL...", help="hylo, Llama or Qwen directories")]
ResultOption = Annotated[Path, typer.Option(help="directory for latency.json, .png and .svg; must not exist")]
LengthsOption = Annotated[str, typer.Option(help="whole contexts in tokens, prompt and answer; 1k is 1024")]
NewTokensOption = Annotated[int, typer.Option(help="tokens of an answer", min=2)]
RepeatsOption = Annotated[int, typer.Option(help="measured runs of a point", min=1)]
WarmupOption = Annotated[int, typer.Option(help="runs of a point before those", min=0)]
SeedOption = Annotated[int, typer.Option(help="of the random prompts", min=0)]
DtypeOption = Annotated[Dtype | None, typer.Option(help="of weights and cache; each checkpoint's if left out")]
AnyLengthOption = Annotated[
    bool, typer.Option("--any-length", help="also contexts beyond a model's length, where answers mean nothing")
]


@app.command()
def serve(
    models: ModelsArgument,
    out: ResultOption,
    lengths: LengthsOption = "1k,4k,16k",
    concurrency: Annotated[str, typer.Option(help="requests that arrive together")] = "1",
    new_tokens: NewTokensOption = 32,
    repeats: RepeatsOption = 3,
    warmup: WarmupOption = 1,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    state_dtype: Annotated[Dtype, typer.Option(help="of the recurrent state")] = "float32",
    cache_memory: Annotated[
        str | None, typer.Option(help="for every model, e.g. 4GiB; left out: as hylo serve has it")
    ] = None,
    any_length: AnyLengthOption = False,
    eager: Annotated[bool, typer.Option("--eager", help="without compiling the model")] = False,
) -> None:
    """Through vLLM's engine: each model in a process of its own; one that runs out of memory costs that point."""
    from hylo.serve.command import ServeOptions, spare_cache_bytes, this_platform
    from hylo.serve.directory import read_served
    from hylo.serve.supported import check_servable
    from hylo.serve.versions import check_vllm

    cache_bytes = None if cache_memory is None else bytes_of(cache_memory, "--cache-memory")
    settings = _settings(lengths, concurrency, new_tokens, repeats, warmup, seed, any_length)
    settings |= {"state_dtype": state_dtype, "eager": eager}
    absent(out)
    _check(models)
    for directory in models:
        check_servable(read_served(directory).config)
    check_vllm()

    def own(directory: Path) -> dict[str, Any]:
        if cache_bytes is not None or this_platform() == "cuda":
            return {"cache_bytes": cache_bytes}
        return {"cache_bytes": spare_cache_bytes(read_served(directory), ServeOptions(dtype=dtype))}

    _run("serve", "hylo.serve.engine_child", models, out, dtype, settings, own)


@app.command()
def generate(
    models: ModelsArgument,
    out: ResultOption,
    lengths: LengthsOption = "1k,4k,16k",
    concurrency: Annotated[str, typer.Option(help="rows of a batch")] = "1",
    new_tokens: NewTokensOption = 32,
    repeats: RepeatsOption = 3,
    warmup: WarmupOption = 1,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    any_length: AnyLengthOption = False,
) -> None:
    """The same through transformers: a forward pass over the prompts, then a token a step from the cache."""
    settings = _settings(lengths, concurrency, new_tokens, repeats, warmup, seed, any_length)
    absent(out)
    _check(models)
    _run("generate", "hylo.serve.generate_child", models, out, dtype, settings, lambda _: {})


def _settings(
    lengths: str, concurrency: str, new_tokens: int, repeats: int, warmup: int, seed: int, any_length: bool
) -> dict[str, Any]:
    from hylo.serve.latency import places

    tokens, at_once = lengths_of(lengths, "--lengths"), numbers_of(concurrency, "--concurrency")
    return {
        "points": places(tokens, at_once, new_tokens),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup,
        "seed": seed,
        "any_length": any_length,
    }


def _check(models: list[Path]) -> None:
    from hylo.modeling.loading import check_complete
    from hylo.serve.directory import read_served

    for directory in models:
        read_served(directory)
        check_complete(directory)


def _run(
    kind: str,
    module: str,
    directories: list[Path],
    out: Path,
    dtype: str | None,
    settings: dict[str, Any],
    own: Callable[[Path], dict[str, Any]],
) -> None:
    from hylo.files import complete_directory
    from hylo.serve.curves import print_latency, write_latency
    from hylo.serve.directory import read_served
    from hylo.serve.latency import FAILED, Job, Model, described, labels, machine, measure

    models = []
    for label, directory in zip(labels(directories), directories, strict=True):
        served = read_served(directory)
        more = own(directory)
        job = Job(str(directory.resolve()), dtype=dtype or served.dtype, **settings, **more)
        about = {"layout": served.layout, "dtype": job.dtype, "max_position_embeddings": served.supported, **more}
        models.append(Model(label, job, served.supported, about))
    with complete_directory(out) as partial:
        results = measure(module, models, shared.console.print)
        result = {"kind": kind, **machine(), "settings": described(settings), "models": results}
        write_latency(partial, result)
    print_latency(result, shared.console)
    shared.console.print(f"wrote {out}")
    if failed := [f"{m['model']}: {p['reason']}" for m in results for p in m["points"] if p["status"] == FAILED]:
        raise HyloError(f"{len(failed)} points failed, the first for {failed[0]}")
