"""hylo select: which layers stay attention-like, within a KV budget."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hylo.commands import shared
from hylo.commands.shared import BaseArgument, GeometryOption, KNormOption, Precision, bytes_of, geometry_of, tokens_of
from hylo.commands.training import DATA, FactsOption, Text

BUDGET = "5% of the base's KV, 640B a token, or 128k@80GiB: a context that a server's memory must hold"


def select(
    base: BaseArgument,
    out: Annotated[Path, typer.Option(help="directory to write, or to go on in")],
    kv_budget: Annotated[str, typer.Option("--kv-budget", "--budget", help=BUDGET)],
    method: Annotated[
        Literal["uniform", "window", "kl", "gates"], typer.Option(help="that scores the layers; uniform measures none")
    ] = "kl",
    order: Annotated[
        Literal["one-shot", "greedy", "removal"], typer.Option(help="of kl: in which attention is put back, or away")
    ] = "greedy",
    window: Annotated[
        int | None, typer.Option(help="of window, in tokens; an eighth of --length if left out", min=1)
    ] = None,
    linear: Annotated[Literal["GDN", "M2", "KDA"], typer.Option(help="what the other layers become")] = "GDN",
    attention: Annotated[Literal["MLA", "A"], typer.Option(help="what stays: MLA, or the base's own")] = "MLA",
    geometry: GeometryOption = None,
    k_norm: KNormOption = "exact",
    data: Annotated[list[str] | None, typer.Option("--data", help=DATA)] = None,
    facts: FactsOption = 0.5,
    tokens: Annotated[int, typer.Option(help="of held-out text that each score reads", min=1)] = 65536,
    length: Annotated[
        int | None, typer.Option(help="tokens of its rows; 2048, or the base's context if shorter", min=2)
    ] = None,
    answers: Annotated[int, typer.Option(help="needle questions to the two layouts compared", min=1)] = 256,
    all_mla: Annotated[Path | None, typer.Option(help="all-attention student, as assemble takes it")] = None,
    all_linear: Annotated[Path | None, typer.Option(help="all-linear student, as assemble takes it")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="of the data, for students made here", min=2)] = 8192,
    align_tokens: Annotated[int, typer.Option(help="to align students made here on", min=0)] = 0,
    learning_rate: Annotated[float, typer.Option(help="of that alignment, its peak")] = 2e-4,
    precision: Annotated[Precision, typer.Option(help="that layers are scored in")] = "float32",
    seed: Annotated[int, typer.Option(help="of the rows, and of what is drawn at random", min=0)] = 0,
) -> None:
    """Chooses the layers that stay attention-like within a KV budget; the same command again goes on."""
    from hylo.select.budget import parse_budget
    from hylo.select.select import SelectionSettings
    from hylo.select.select import select as run

    settings = SelectionSettings(
        budget=parse_budget(kv_budget, bytes_of, tokens_of),
        method=method,
        order=order,
        window=window,
        attention=attention,
        linear=linear,
        geometry=geometry_of(geometry),
        k_norm=k_norm,
        data=Text(data, facts).data() if data else None,
        tokens=tokens,
        length=length,
        answers=answers,
        calibration_tokens=calibration_tokens,
        align_tokens=align_tokens,
        learning_rate=learning_rate,
        all_attention=all_mla,
        all_linear=all_linear,
        seed=seed,
        precision=precision,
    )
    run(base, out, settings, shared.console)
