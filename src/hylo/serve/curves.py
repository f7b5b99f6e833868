"""What hylo bench leaves: its result as JSON, the figure of it, and a table on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hylo.files import write_bytes, write_json, write_text
from hylo.report.drawing import Drawing, drawn_as
from hylo.report.latency import latency_figure
from hylo.report.names import short_length
from hylo.serve.latency import BEYOND, FAILED, LEFT_OUT, MEASURED, OUT_OF_MEMORY

SHORT = {OUT_OF_MEMORY: "no memory", BEYOND: "beyond", FAILED: "failed", LEFT_OUT: "-"}


def write_latency(out: Path, result: dict[str, Any]) -> None:
    """latency.json, latency.png and latency.svg in the directory `out`."""
    write_json(out / "latency.json", result)
    if (drawing := draw_latency(result)) is not None:
        write_bytes(out / "latency.png", drawing.png)
        write_text(out / "latency.svg", drawing.file)


def draw_latency(result: dict[str, Any]) -> Drawing | None:
    """TTFT and TPOT side by side, both axes logarithmic; None where nothing was measured."""
    return drawn_as("latency", lambda: latency_figure(result))


def print_latency(result: dict[str, Any], console: Console) -> None:
    """A row for each model and concurrency, a column for each length: TTFT in s / TPOT in ms."""
    lengths = sorted({point["length"] for model in result["models"] for point in model["points"]})
    table = Table(title="TTFT in s / TPOT in ms", title_justify="left")
    table.add_column("model")
    table.add_column("at once", justify="right")
    for length in lengths:
        table.add_column(short_length(length), justify="right")
    for model in result["models"]:
        for concurrency in sorted({point["concurrency"] for point in model["points"]}):
            cells = {p["length"]: _cell(p) for p in model["points"] if p["concurrency"] == concurrency}
            table.add_row(model["model"], str(concurrency), *(cells.get(length, "-") for length in lengths))
    console.print(table)


def _cell(point: dict[str, Any]) -> str:
    if point["status"] != MEASURED:
        return SHORT[point["status"]]
    return f"{point['ttft']:.3g} / {1000 * point['tpot']:.3g}"
