"""hylo serve: vllm serve with what the model says."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared
from hylo.commands.shared import Dtype, MaxModelLenOption, TensorParallelOption, bytes_of, tokens_of


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="hylo, Llama, Qwen2.5 or Qwen3 directory")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="more flags of vllm serve, as they are")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="that clients ask for; the directory's if left out")] = None,
    max_model_len: MaxModelLenOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of weights and cache; the checkpoint's if left out")] = None,
    state_dtype: Annotated[Dtype, typer.Option(help="of the recurrent state")] = "float32",
    tensor_parallel: TensorParallelOption = 1,
    block_size: Annotated[int | None, typer.Option(help="tokens of a cache block; vLLM's choice if left out")] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(help="of each device, e.g. 4GiB; left out: vLLM's choice, on a CPU half of what is free"),
    ] = None,
    start_timeout: Annotated[float, typer.Option(help="seconds until it must answer", min=1)] = 1800,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and the command line, and stop")] = False,
) -> None:
    """Serves a directory with vLLM, under the OpenAI-compatible address, and watches that it stays healthy."""
    from hylo.modeling.loading import check_complete
    from hylo.serve.command import ServeOptions, as_typed, plan_here, serve_command, server_environment
    from hylo.serve.directory import read_served
    from hylo.serve.server import run_server
    from hylo.serve.versions import check_vllm

    options = ServeOptions(
        host=host,
        port=port,
        name=name,
        dtype=dtype,
        state_dtype=state_dtype,
        tensor_parallel=tensor_parallel,
        max_model_len=tokens_of(max_model_len, "--max-model-len"),
        block_size=block_size,
        cache_bytes=None if cache_memory is None else bytes_of(cache_memory, "--cache-memory"),
        extra=extra or (),
    )
    options.check()
    model = read_served(directory)
    check_complete(directory)
    if not dry_run:
        check_vllm()
    plan = plan_here(model, options)
    plan.print(shared.console)
    command = serve_command(model, plan, options)
    shared.console.print(as_typed(command), soft_wrap=True, markup=False, highlight=False)
    if dry_run:
        return

    def ready() -> None:
        shared.console.print(f"ready at http://{host}:{port}/v1, model {options.name or model.name}", highlight=False)

    environment = server_environment(os.environ, tensor_parallel)
    raise typer.Exit(run_server(command, host, port, start_timeout, ready, environment))
