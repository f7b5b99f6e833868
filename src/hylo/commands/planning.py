"""hylo plan: of a conversion, of what a directory holds, and of a server's memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hylo.commands import shared
from hylo.commands.shared import (
    Dtype,
    GateOption,
    GeometryOption,
    KNormOption,
    MaxModelLenOption,
    PositionsOption,
    TensorParallelOption,
    TurnedOption,
    bytes_of,
    geometry_of,
    indices,
    tokens_of,
)
from hylo.errors import HyloError

if TYPE_CHECKING:
    from hylo.modeling import HyloConfig
    from hylo.plan import Plan


def plan(
    base: Annotated[Path, typer.Argument(help="Llama, Qwen2.5 or Qwen3 checkpoint directory, or a hylo directory")],
    layout: Annotated[
        str | None, typer.Option(help="of a base, e.g. 4MLA12GDN, 8MLA8M2, 8A8M2; a hylo directory has its own")
    ] = None,
    mla_layers: PositionsOption = None,
    geometry: GeometryOption = None,
    k_norm: KNormOption = "exact",
    positions: TurnedOption = "rope",
    attention_gate: GateOption = False,
    dtype: Annotated[Dtype | None, typer.Option(help="of weights and cache; the checkpoint's if left out")] = None,
    state_dtype: Annotated[Dtype, typer.Option(help="of the recurrent state")] = "float32",
    serve: Annotated[bool, typer.Option("--serve", help="also what vLLM will do with its memory")] = False,
    memory: Annotated[str | None, typer.Option(help="of each device that serves, e.g. 80GiB")] = None,
    tensor_parallel: TensorParallelOption = 1,
    max_model_len: MaxModelLenOption = None,
    platform: Annotated[Literal["cuda", "cpu"], typer.Option(help="that serves")] = "cuda",
    prefix_caching: Annotated[bool, typer.Option(help="as vLLM has it, for two states a sequence")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Prints which layer becomes what, and what it costs. Needs only BASE/config.json."""
    from hylo.serve.directory import is_hybrid

    if not serve and (memory, tensor_parallel, max_model_len, platform) != (None, 1, None, "cuda"):
        raise HyloError("--memory, --tensor-parallel, --max-model-len and --platform are a server's; add --serve")
    if is_hybrid(base):
        if layout or mla_layers or geometry or (k_norm, positions, attention_gate) != ("exact", "rope", False):
            raise HyloError(
                f"{base} is a hybrid, whose layout and geometry are settled; leave out --layout, --mla-layers, --set, "
                "--k-norm, --positions and --attention-gate, or give its base"
            )
        result, config = _of_hybrid(base, dtype, state_dtype)
    else:
        result, config = _of_base(
            base,
            layout,
            serve,
            indices(mla_layers),
            geometry_of(geometry),
            dtype,
            state_dtype,
            k_norm,
            None,
            positions,
            attention_gate,
        )
    served = None
    if serve:
        from hylo.serve.memory import plan_serving

        served = plan_serving(
            config,
            dtype=result.dtype,
            state_dtype=state_dtype,
            memory_bytes=None if memory is None else bytes_of(memory, "--memory"),
            tensor_parallel=tensor_parallel,
            max_model_len=tokens_of(max_model_len, "--max-model-len"),
            platform=platform,
            prefix_caching=prefix_caching,
        )
    if as_json:
        print(json.dumps(result.to_json() | ({} if served is None else {"serve": served.to_json()}), indent=1))
        return
    result.print(shared.console)
    if served is not None:
        served.print(shared.console)


def _of_hybrid(directory: Path, dtype: str | None, state_dtype: str) -> "tuple[Plan, HyloConfig]":
    from hylo.plan import plan_of
    from hylo.serve.directory import read_served

    model = read_served(directory)
    return plan_of(directory, model.config, dtype or model.dtype, state_dtype), model.config


def _of_base(base: Path, layout: str | None, serve: bool, *arguments: Any) -> "tuple[Plan, HyloConfig]":
    """Without a layout, a server's plan is that of the base as it is."""
    from hylo.checkpoint import read_base_config
    from hylo.convert.config import planned_config
    from hylo.plan import make_plan

    config = read_base_config(base)
    if layout is None:
        if not serve:
            raise HyloError(f"{base} is a base: give --layout, e.g. 4MLA12GDN, or --serve for the base as it is")
        layout = f"{config.num_hidden_layers}A"
    result = make_plan(base, layout, *arguments)
    return result, planned_config(result, "pairs-fast")
