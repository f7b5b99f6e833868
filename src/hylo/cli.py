"""The commands. Bad input ends with one line on standard error and exit status 2."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from hylo.convert import Init, LinearInit, RopeKey
from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm

app = typer.Typer(
    help="Turns a pretrained Transformer into a long-context hybrid.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["float32", "bf16"]

BaseArgument = Annotated[Path, typer.Argument(help="Llama, Qwen2.5 or Qwen3 checkpoint directory")]
OutArgument = Annotated[Path, typer.Argument(help="directory to write; must not exist")]
LayoutOption = Annotated[str, typer.Option(help="e.g. 4MLA12GDN, 8MLA8M2, 8A8M2")]
PositionsOption = Annotated[str | None, typer.Option(help="indices of the MLA (or attention) layers, e.g. 1,5,10,14")]
GeometryOption = Annotated[list[str] | None, typer.Option("--set", help="a figure of the mixers, e.g. gdn_num_heads=4")]
KNormOption = Annotated[KNorm, typer.Option(help="Qwen3's key norm in MLA: kept, or its mean folded into the weights")]
DataOption = Annotated[list[str], typer.Option("--data", help="text file, folder, or python-stdlib; repeatable")]
FactsOption = Annotated[float, typer.Option(help="share of rows with synthetic retrieval", min=0, max=1)]

# What fixes an extension's rows, for hylo extend and hylo teacher-cache alike.
EXTENSION: dict[str, Any] = {"length": 8192, "tokens": 8_000_000_000, "rows": 32, "facts": 0.0, "seed": 0}
EXTENSION |= {"precision": "bf16"}


@app.command()
def plan(
    base: BaseArgument,
    layout: LayoutOption,
    mla_layers: PositionsOption = None,
    geometry: GeometryOption = None,
    k_norm: KNormOption = "exact",
    dtype: Annotated[Dtype | None, typer.Option(help="of weights and cache; the checkpoint's if left out")] = None,
    state_dtype: Annotated[Dtype, typer.Option(help="of the recurrent state")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Prints which layer becomes what, and what it costs. Needs only BASE/config.json."""
    from hylo.plan import make_plan

    result = make_plan(base, layout, _indices(mla_layers), _geometry(geometry), dtype, state_dtype, k_norm)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        result.print(console)


@app.command()
def convert(
    base: BaseArgument,
    out: OutArgument,
    layout: LayoutOption,
    mla_layers: PositionsOption = None,
    geometry: GeometryOption = None,
    init: Annotated[Init, typer.Option(help="how MLA starts; random: every mixer drawn afresh")] = "pairs-fast",
    rope_key: Annotated[
        RopeKey | None,
        typer.Option(help="the one rotated key, from the kv heads'; default pca, mean for recipe and on Qwen3"),
    ] = None,
    k_norm: KNormOption = "exact",
    rank: Annotated[
        str | None, typer.Option(help="kv_lora_rank: a number, or energy=0.95 for each layer's own")
    ] = None,
    rank_report: Annotated[bool, typer.Option("--rank-report", help="print the energy that the ranks keep")] = False,
    linear_init: Annotated[
        LinearInit | None, typer.Option(help="how linear blocks start; default aligned, with --calibrate calibrated")
    ] = None,
    linear_fraction: Annotated[
        float | None, typer.Option(help="of the attention's output norm that they start with; calibrated: the best")
    ] = None,
    linear_steps: Annotated[int, typer.Option(help="of fitting each calibrated one to its attention", min=0)] = 300,
    calibrate: Annotated[list[str] | None, typer.Option(help="text file, folder or python-stdlib; repeatable")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="of that text to run the base on", min=1)] = 4096,
    calibration_length: Annotated[int, typer.Option(help="tokens of a row", min=2)] = 512,
    dtype: Annotated[Dtype | None, typer.Option(help="of the weights written; the base's if left out")] = None,
    shard_gib: Annotated[float, typer.Option(help="size of a weight file", min=0.001)] = 0.5,
    seed: Annotated[int, typer.Option(help="of what is drawn at random", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Replaces the base's attention by the layout's mixers, initialised from it."""
    from hylo.convert import (
        Initialisation,
        measure_ranks,
        planned_config,
        print_fits,
        print_ranks,
        read_base,
        with_energy,
    )
    from hylo.convert import convert as run
    from hylo.pipeline import read_calibration
    from hylo.plan import make_plan
    from hylo.recipe import parse_rank

    number, energy = parse_rank(rank)
    figures = _geometry(geometry) | ({} if number is None else {"kv_lora_rank": number})
    result = make_plan(base, layout, _indices(mla_layers), figures, dtype, k_norm=k_norm)
    _absent(out)
    ids = read_calibration(base, calibrate, calibration_tokens, calibration_length) if calibrate else None
    initialisation = Initialisation(init, linear_init, rope_key, ids, linear_fraction, linear_steps)
    initialisation.check(result)  # what is wrong is said in a dry run too
    checkpoint = read_base(base)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as bar:
        ranks = None
        if energy is not None:
            result, ranks = with_energy(result, initialisation, energy, _shown(bar, "ranks"))
        elif rank_report:
            config = planned_config(result, init)
            ranks = measure_ranks(checkpoint, config, initialisation, progress=_shown(bar, "ranks"))
        result.print(console)
        if rank_report and ranks is not None:
            print_ranks(ranks, console)
        if dry_run:
            return
        shard_bytes = int(shard_gib * 2**30)
        fits = run(base, out, result, initialisation, seed, dtype, shard_bytes, _shown(bar, "convert"))
    print_fits(fits, console)
    console.print(f"wrote {out}")


@app.command("import")
def import_(
    release: Annotated[Path, typer.Argument(help="released checkpoint: hybrid_config.json, config.json, weights")],
    out: OutArgument,
    rope_pairing: Annotated[
        Literal["interleaved", "half-split"], typer.Option(help="rows that turn together; releases have neighbours")
    ] = "interleaved",
    renames: Annotated[
        list[str] | None,
        typer.Option("--map", help="OLD=NEW: tensors named, or ending in, OLD are read as NEW; repeatable"),
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="keep unknown keys of hybrid_config.json unread")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="of the weights written; the checkpoint's if left out")] = None,
) -> None:
    """Reads a released HyLo checkpoint and writes it as a model directory of this package."""
    from hylo.convert.released import import_released

    _absent(out)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as bar:
        import_released(
            release,
            out,
            rope_pairing=rope_pairing,
            renames=_renames(renames),
            lenient=lenient,
            dtype=dtype,
            progress=_shown(bar, "import"),
        )
    console.print(f"wrote {out}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="directory written by hylo")],
    out: OutArgument,
    portable: Annotated[bool, typer.Option("--portable", help="with the model's code; what export does now")] = False,
) -> None:
    """Copies a hybrid so that transformers loads it on machines without this package."""
    from hylo.export import export_portable

    if not portable:
        raise HyloError("export writes portable directories, nothing else yet; add --portable")
    _absent(out)
    export_portable(directory, out)
    console.print(f"wrote {out}")


@app.command()
def align(
    base: BaseArgument,
    student: Annotated[Path, typer.Argument(help="directory written by convert")],
    out: OutArgument,
    data: DataOption,
    facts: FactsOption = 0.0,
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 2048,
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = 2_000_000_000,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 96,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 2e-4,
    precision: Annotated[Precision, typer.Option()] = "bf16",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Stage 1: every layer learns to do what the base's layer does, fed the base's hidden states."""
    from hylo.distill.align import align as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    _absent(out)
    training = _training(
        length=length, tokens=tokens, rows=rows, learning_rate=learning_rate, precision=precision, seed=seed
    )
    source = TrainingData(Data(text=data, facts=facts), read_tokenizer(student))
    run(base, student, out, source.rows("align", seed), training)
    console.print(f"wrote {out}")


@app.command()
def extend(
    student: Annotated[Path, typer.Argument(help="directory written by convert, align or extend")],
    out: OutArgument,
    teacher: Annotated[
        Path | None, typer.Option(help="directory of the teacher: the base, or a larger model of its family")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="text file, folder, or python-stdlib; repeatable")
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="directory written by teacher-cache, in place of --teacher and --data")
    ] = None,
    facts: Annotated[
        float | None,
        typer.Option(help="share of rows with synthetic retrieval; default 0, or the cache's", min=0, max=1),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="tokens of a sequence, the result's supported length; default 8192, or the cache's"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens to train on; default 8000000000, or all of the cache's")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="sequences of a step; default 32, or the cache's")] = None,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 6e-5,
    yarn_original: Annotated[int, typer.Option(help="context above which YaRN stretches positions", min=1)] = 2048,
    precision: Annotated[Precision | None, typer.Option(help="default bf16, or the cache's")] = None,
    seed: Annotated[int | None, typer.Option(help="of the rows; default 0, or the cache's")] = None,
    frozen_head: Annotated[
        bool, typer.Option("--frozen-head", help="train all but the head, as from a cache; a tied one is untied")
    ] = False,
) -> None:
    """Stage 2: distils the whole hybrid from a teacher at a longer context, with YaRN on the MLA layers."""
    from hylo.distill.extend import extend as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    _absent(out)
    given = {"length": length, "tokens": tokens, "rows": rows, "facts": facts, "seed": seed, "precision": precision}
    if teacher_cache is not None:
        if teacher is not None:
            raise HyloError("give either --teacher with --data, or --teacher-cache, not both; leave one of them out")
        _extend_from_cache(student, out, teacher_cache, data, given, learning_rate, yarn_original)
    else:
        if teacher is None or not data:
            raise HyloError("extend needs either --teacher and --data, or --teacher-cache; give one of the two")
        values = EXTENSION | {key: value for key, value in given.items() if value is not None}
        text = Data(text=data, facts=values.pop("facts"))
        training = _training(**values, learning_rate=learning_rate)
        source = TrainingData(text, read_tokenizer(student))
        rows_of = source.rows("extend", training.seed)
        run(student, teacher, out, rows_of, training, yarn_original, console, frozen_head)
    console.print(f"wrote {out}")


def _extend_from_cache(
    student: Path,
    out: Path,
    cache: Path,
    data: list[str] | None,
    given: dict[str, Any],
    learning_rate: float,
    yarn_original: int,
) -> None:
    """What is not given is the cache's; what is given must be the cache's."""
    from hylo.distill.cache import TeacherCache
    from hylo.distill.extend import extend_from_cache as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    held = TeacherCache(cache)
    held.check_order(**{key: value for key, value in given.items() if key != "precision"})
    own = held.recipe.model_dump() | {"tokens": held.recipe.tokens}
    given = {key: own[key] if value is None else value for key, value in given.items()}
    facts = given.pop("facts")
    training = _training(**given, learning_rate=learning_rate)
    rows = None
    if data:
        rows = TrainingData(Data(text=data, facts=facts), read_tokenizer(student)).rows("extend", training.seed)
    run(student, cache, out, training, yarn_original, rows, console)


@app.command("teacher-cache")
def teacher_cache(
    teacher: Annotated[
        Path, typer.Argument(help="directory of the teacher: the base, or a larger model of its family")
    ],
    data: Annotated[list[str], typer.Argument(help="text files, folders, or python-stdlib: one or several")],
    out: OutArgument,
    student: Annotated[Path, typer.Option(help="directory whose lm_head the students that train from it will have")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the vectors")] = "float32",
    facts: FactsOption = EXTENSION["facts"],
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = EXTENSION["length"],
    tokens: Annotated[int, typer.Option(help="tokens in all")] = EXTENSION["tokens"],
    rows: Annotated[int, typer.Option(help="sequences of a step")] = EXTENSION["rows"],
    precision: Annotated[Precision, typer.Option(help="that the teacher runs in")] = EXTENSION["precision"],
    seed: Annotated[int, typer.Option(help="of the rows")] = EXTENSION["seed"],
    shard_gib: Annotated[float, typer.Option(help="size of a file", min=0.000001)] = 0.25,
) -> None:
    """Runs a teacher over an extension's rows and keeps what it says, one vector a token; a second call goes on."""
    from hylo.distill.cache_writer import CacheSettings, write_teacher_cache
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    _absent(out)
    settings = _validated(
        CacheSettings,
        data=data,
        facts=facts,
        length=length,
        rows=rows,
        tokens=tokens,
        seed=seed,
        precision=precision,
        dtype=dtype,
    )
    source = TrainingData(Data(text=data, facts=facts), read_tokenizer(student))
    shard_bytes = int(shard_gib * 2**30)
    write_teacher_cache(teacher, student, out, source.rows("extend", seed), settings, console, shard_bytes)
    console.print(f"wrote {out}")


@app.command()
def upcycle(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    out: Annotated[Path, typer.Option(help="directory of the run; a second call goes on where the first stopped")],
) -> None:
    """Runs a whole recipe: plan, convert, align, extend, evaluate, report."""
    from hylo.pipeline import upcycle as run
    from hylo.recipe import read_recipe

    run(read_recipe(recipe), out, console)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Llama, Qwen2.5, Qwen3 or hylo directory")],
    teacher: Annotated[Path | None, typer.Option(help="also measure KL to this model")] = None,
    lengths: Annotated[str, typer.Option(help="contexts in tokens")] = "2048,8192",
    text: Annotated[list[str] | None, typer.Option(help="held-out text file or folder; default python-stdlib")] = None,
    answers: Annotated[int, typer.Option(help="needle questions a length", min=1)] = 256,
    answers_per_bin: Annotated[bool, typer.Option("--answers-per-bin", help="that many in every depth bin")] = False,
    tokens: Annotated[int, typer.Option(help="tokens of text a length", min=1)] = 32768,
    precision: Annotated[Precision, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the result here")] = None,
) -> None:
    """Measures perplexity, KL to a teacher and needle retrieval, by length and depth."""
    from hylo.data.retrieval import FactFormat
    from hylo.data.sources import STANDARD_LIBRARY, whole_stream
    from hylo.evaluate.evaluate import evaluate as run
    from hylo.evaluate.evaluate import print_results
    from hylo.files import write_json
    from hylo.pipeline import read_tokenizer

    tokenizer = read_tokenizer(model)
    result = run(
        model,
        teacher,
        _indices(lengths) or [],
        whole_stream(tokenizer, text or [STANDARD_LIBRARY]),
        FactFormat.of(tokenizer),
        answers,
        tokens,
        answers_per_bin=answers_per_bin,
        seed=seed,
        precision=precision,
    )
    print_results({model.name: result}, console)
    if json_file:
        write_json(json_file, result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="directory of the run; a second call goes on where the first stopped")],
    full: Annotated[
        bool, typer.Option("--full/--quick", help="more training and 256 answers in every depth bin")
    ] = False,
) -> None:
    """Upcycles the small checkpoint that comes with the package and checks the result."""
    from hylo.demo import run_demo

    if not run_demo(out, full, console):
        raise typer.Exit(1)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Prints versions, devices, and which code runs each operation (HYLO_KERNELS=torch or fla forces it)."""
    from hylo.environment import describe, print_environment

    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_environment(found, console)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns HyloError and wrong usage into one line and exit status 2; always ends with SystemExit."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        status = app(arguments, standalone_mode=False)
    except HyloError as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except RuntimeError as error:
        from hylo.ops.kernels import KernelsError

        if not isinstance(error, KernelsError):
            raise
        _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors
            raise
        _fail(f"{error.format_message()} See hylo --help.")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print(f"hylo: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _absent(out: Path) -> None:
    """Said before any work, not after it."""
    if out.exists():
        raise HyloError(f"{out} exists already; choose another output directory or remove it")


def _shown(bar: Progress, name: str) -> Callable[[int, int], None]:
    """A callback (done, total) that moves a line of its own in the progress display."""
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _indices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise HyloError(f"{text!r} is no list of whole numbers; write e.g. 1,5,10,14") from None


def _renames(settings: list[str] | None) -> dict[str, str]:
    renames = {}
    for setting in settings or []:
        old, _, new = setting.partition("=")
        if not old or not new:
            raise HyloError(f"--map {setting}: write OLD=NEW, e.g. mla.query_norm.weight=mla.q_norm.weight")
        renames[old] = new
    return renames


def _geometry(settings: list[str] | None) -> dict[str, int]:
    geometry = {}
    for setting in settings or []:
        name, _, value = setting.partition("=")
        try:
            geometry[name] = int(value)
        except ValueError:
            raise HyloError(f"--set {setting}: write KEY=NUMBER, e.g. kv_lora_rank=64") from None
    return geometry


def _training(**values: Any) -> Any:
    from hylo.distill.settings import Training

    return _validated(Training, **values)


def _validated(model: type[BaseModel], **values: Any) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise HyloError(f"--{option} {first['input']}: {first['msg']}") from None
