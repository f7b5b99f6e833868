"""What a selection leaves: a piece of a recipe, everything as JSON, a figure, and a table on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hylo.environment import describe
from hylo.files import write_bytes, write_json, write_text
from hylo.recipe_files import dump_yaml
from hylo.select.figure import draw_selection

NAME = "selection"


def write_selection(out: Path, selection: Mapping[str, Any], geometry: Mapping[str, int]) -> None:
    """OUT/selection.yaml, .png and .svg, and last .json, each whole or not at all. `geometry`: what was set of it."""
    write_text(out / f"{NAME}.yaml", fragment(selection, geometry))
    if (drawing := draw_selection(dict(selection))) is not None:
        write_bytes(out / f"{NAME}.png", drawing.png)
        write_text(out / f"{NAME}.svg", drawing.file)
    versions = describe()["versions"]
    write_json(out / f"{NAME}.json", dict(selection) | {"versions": versions})


def fragment(selection: Mapping[str, Any], geometry: Mapping[str, int]) -> str:
    """The keys of a recipe that a selection settles, with comments on how."""
    order = f", {selection['order']}" if selection.get("order") else ""
    lines = [
        f"layers chosen by method {selection['method']}{order} within a KV budget of {selection['budget']}: "
        f"{selection['cost']}",
        f"the even spread has layers {_listed(selection['uniform'])}",
    ]
    if "comparison" in selection:
        lines += [_compared(selection["comparison"], name) for name in ("chosen", "uniform")]
    keys: dict[str, Any] = {"layout": selection["layout"], "mla_layers": list(selection["chosen"])}
    keys |= {"geometry": dict(geometry)} if geometry else {}
    keys |= {"k_norm": selection["k_norm"]} if selection["k_norm"] != "exact" else {}
    return "".join(f"# {line}\n" for line in lines) + dump_yaml(keys)


def print_selection(selection: Mapping[str, Any], console: Console) -> None:
    """The scores, then the chosen layers beside the even spread's."""
    chosen = selection["chosen"]
    if scores := selection["scores"]:
        table = Table(title=f"scores by method {selection['method']}", title_justify="left")
        for heading in ("layer", "score", "standard error", "stays"):
            table.add_column(heading, justify="right")
        for score in scores:
            stays = "yes" if score["layer"] in chosen else ""
            table.add_row(str(score["layer"]), _figure(score["score"]), _figure(score["error"]), stays)
        console.print(table)
    if "comparison" not in selection:
        console.print(f"layers {_listed(chosen)}, spread evenly; nothing was measured", highlight=False)
        return
    compared = selection["comparison"]
    table = Table(title="the same students, on other rows", title_justify="left")
    for heading in ("", "layers", "KL, nats a token", "needle, %"):
        table.add_column(heading, justify="left" if heading in ("", "layers") else "right")
    for name in ("chosen", "uniform", "difference"):
        own = compared[name]
        kl, needle = _with_error(own["kl"], own["kl_se"], 4), _with_error(own["needle"], own["needle_se"], 1, 100)
        table.add_row(name, _listed(own.get("layers", [])), kl, needle)
    console.print(table)
    seconds = selection["score_seconds"]
    console.print(
        f"scores: {selection['score_tokens']:,} tokens, {seconds / 60:.1f} minutes; students: "
        f"{selection['students_seconds'] / 60:.1f} minutes; comparison: {compared['tokens']:,} tokens, "
        f"{compared['seconds'] / 60:.1f} minutes",
        highlight=False,
        soft_wrap=True,
    )


def _compared(comparison: Mapping[str, Any], name: str) -> str:
    own = comparison[name]
    return (
        f"{name}: layers {_listed(own['layers'])}, KL {_with_error(own['kl'], own['kl_se'], 4)} nats a token, needle "
        f"{_with_error(own['needle'], own['needle_se'], 1, 100)} %, before distillation"
    )


def _with_error(value: float, error: float | None, places: int, times: float = 1) -> str:
    shown = f"{times * value:.{places}f}"
    return shown if error is None else f"{shown} ({times * error:.{places}f})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
