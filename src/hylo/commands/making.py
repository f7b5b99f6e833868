"""hylo convert, import, export and assemble: directories from directories, without training."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress

from hylo.commands import shared
from hylo.commands.shared import (
    BaseArgument,
    Dtype,
    GateOption,
    GeometryOption,
    KNormOption,
    LayoutOption,
    OutArgument,
    PositionsOption,
    TurnedOption,
    absent,
    geometry_of,
    indices,
    shown,
)
from hylo.convert import Init, LinearInit, RopeKey
from hylo.errors import HyloError


def convert(
    base: BaseArgument,
    out: OutArgument,
    layout: LayoutOption,
    mla_layers: PositionsOption = None,
    geometry: GeometryOption = None,
    init: Annotated[Init, typer.Option(help="how MLA starts; random: every mixer drawn afresh")] = "pairs-best",
    rope_key: Annotated[
        RopeKey | None,
        typer.Option(help="the one rotated key, from the kv heads'; default pca, mean for recipe and on Qwen3"),
    ] = None,
    k_norm: KNormOption = "exact",
    positions: TurnedOption = "rope",
    attention_gate: GateOption = False,
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
    from hylo.checkpoint import read_tokenizer
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
    from hylo.data.settings import Data
    from hylo.data.training import TrainingData
    from hylo.plan import make_plan
    from hylo.recipe import parse_rank

    number, energy = parse_rank(rank)
    figures = geometry_of(geometry) | ({} if number is None else {"kv_lora_rank": number})
    result = make_plan(
        base,
        layout,
        indices(mla_layers),
        figures,
        dtype,
        k_norm=k_norm,
        positions=positions,
        attention_gate=attention_gate,
    )
    absent(out)
    ids = None
    if calibrate:  # what an evaluation would read is left out
        text = TrainingData(Data.model_validate({"text": calibrate}), read_tokenizer(base))
        ids = text.calibration(calibration_tokens, calibration_length)
    initialisation = Initialisation(init, linear_init, rope_key, ids, linear_fraction, linear_steps)
    initialisation.check(result)  # what is wrong is said in a dry run too
    checkpoint = read_base(base)
    with Progress(
        *Progress.get_default_columns(), console=shared.console, disable=not shared.console.is_terminal
    ) as bar:
        ranks = None
        if energy is not None:
            result, ranks = with_energy(result, initialisation, energy, shown(bar, "ranks"))
        elif rank_report:
            config = planned_config(result, init)
            ranks = measure_ranks(checkpoint, config, initialisation, progress=shown(bar, "ranks"))
        result.print(shared.console)
        if rank_report and ranks is not None:
            print_ranks(ranks, shared.console)
        if dry_run:
            return
        shard_bytes = int(shard_gib * 2**30)
        fits = run(base, out, result, initialisation, seed, dtype, shard_bytes, shown(bar, "convert"))
    print_fits(fits, shared.console)
    shared.console.print(f"wrote {out}")


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

    absent(out)
    with Progress(
        *Progress.get_default_columns(), console=shared.console, disable=not shared.console.is_terminal
    ) as bar:
        import_released(
            release,
            out,
            rope_pairing=rope_pairing,
            renames=_renames(renames),
            lenient=lenient,
            dtype=dtype,
            progress=shown(bar, "import"),
        )
    shared.console.print(f"wrote {out}")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="directory written by hylo")],
    out: OutArgument,
    portable: Annotated[bool, typer.Option("--portable", help="with the model's code; what export does now")] = False,
) -> None:
    """Copies a hybrid so that transformers loads it on machines without this package."""
    from hylo.export import export_portable

    if not portable:
        raise HyloError("export writes portable directories, nothing else yet; add --portable")
    absent(out)
    export_portable(directory, out)
    shared.console.print(f"wrote {out}")


def _renames(settings: list[str] | None) -> dict[str, str]:
    renames = {}
    for setting in settings or []:
        old, _, new = setting.partition("=")
        if not old or not new:
            raise HyloError(f"--map {setting}: write OLD=NEW, e.g. mla.query_norm.weight=mla.q_norm.weight")
        renames[old] = new
    return renames


def assemble(
    all_mla: Annotated[Path, typer.Argument(help="aligned directory to take the MLA (or attention) layers from")],
    all_linear: Annotated[Path, typer.Argument(help="aligned directory to take all other layers from")],
    out: OutArgument,
    mla_layers: Annotated[str, typer.Option(help="indices of the MLA (or attention) layers, e.g. 1,5,10,14")],
) -> None:
    """Builds a hybrid from two aligned students of one base, an all-MLA and an all-linear one, layer by layer."""
    from hylo.convert.assemble import assemble as run

    with Progress(
        *Progress.get_default_columns(), console=shared.console, disable=not shared.console.is_terminal
    ) as bar:
        run(all_mla, all_linear, out, indices(mla_layers) or [], shown(bar, "assemble"))
    shared.console.print(f"wrote {out}")
