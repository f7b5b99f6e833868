"""One table of all results: a section a score, in it a line a model, a column a length; quoted rows beside them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Cells = dict[str, tuple[float, float | None]]  # by length, or "" for what has none: score and standard error


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Prints results as `evaluate_suites` gives them, beside them any "published" rows; then what was not run."""
    sections = list(sections_of(result))
    lengths = sorted({int(key) for _, lines, _ in sections for _, cells, _ in lines for key in cells if key})
    short = any("" in cells for _, lines, _ in sections for _, cells, _ in lines)
    columns = ([""] if short else []) + [str(length) for length in lengths]
    table = Table("", *["short" if key == "" else f"{int(key):,}" for key in columns], box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for title, lines, show in sections:
        table.add_row(f"[bold]{title}[/]")
        for name, cells, quoted in lines:
            texts = [_cell(cells[key], show) if key in cells else "" for key in columns]
            table.add_row(f"  [italic]{name} (quoted)[/]" if quoted else f"  {name}", *texts)
        table.add_section()
    console.print(table)
    console.print("in brackets: standard errors")
    if (haystack := suite_setting(result, "ruler", "haystack")) not in (None, "essays"):
        console.print(f"RULER's essays: {haystack}", highlight=False)
    for suite, part in result["suites"].items():
        for what, reason in part["not_run"].items():
            console.print(f"not run: {suite}, {what}: {reason}", highlight=False, soft_wrap=True)


Section = tuple[str, list[tuple[str, Cells, bool]], Callable[[float], str]]


def sections_of(result: Mapping[str, Any]) -> Iterator[Section]:
    """(title, [(name, cells, whether quoted)], how a number is shown) of every score that a model has."""
    suites, quoted = result["suites"], result.get("published", [])
    for suite, title in (("commonsense", "commonsense, mean of tasks, %"), ("gsm8k", "GSM8K, %")):
        if suite in suites:
            lines = [
                (name, {"": (scores["mean"]["score"], scores["mean"]["se"])}, False)
                for name, scores in suites[suite]["results"].items()
                if scores.get("mean")
            ]
            lines += [(row["model"], {"": (row[suite], None)}, True) for row in quoted]
            yield from _section(f"{title}", lines)
    if "ruler" in suites:
        yield from _ruler(suites["ruler"], quoted)
    for suite, key, title, scale, show in (
        ("needle", "needle", "needle accuracy, %", 100, lambda x: f"{x:.1f}"),
        ("intrinsic", "kl", "KL to the teacher, nats/token", 1, lambda x: f"{x:.4f}"),
        ("intrinsic", "perplexity", "perplexity", 1, lambda x: f"{x:.2f}"),
    ):
        if suite in suites:
            lines = [
                (
                    name,
                    {n: (scale * x, _error(scores, key, n, scale)) for n, x in (scores.get(key) or {}).items()},
                    False,
                )
                for name, scores in suites[suite]["results"].items()
            ]
            yield from _section(f"{title}", [line for line in lines if line[1]], show)


def _ruler(part: Mapping[str, Any], quoted: list[dict[str, Any]]) -> Iterator[Section]:
    results = part["results"]
    lines = [(name, _scores(scores["mean"]), False) for name, scores in results.items()]
    lines += [(row["model"], {n: (x, None) for n, x in row["ruler"].items()}, True) for row in quoted]
    counts = sorted({cell["tasks"] for scores in results.values() for cell in scores["mean"].values()})
    tasks = f"mean of {' or '.join(map(str, counts))} of 13 tasks"
    yield from _section(f"RULER, {tasks}", lines)
    for task in dict.fromkeys(task for scores in results.values() for task in scores["scores"]):
        yield from _section(
            task,
            [
                (name, _scores(scores["scores"][task]), False)
                for name, scores in results.items()
                if task in scores["scores"]
            ],
        )


def suite_setting(result: Mapping[str, Any], suite: str, key: str) -> Any:
    """What a suite was told; None where it was not run."""
    return result["suites"].get(suite, {"settings": {}})["settings"].get(key)


def _scores(by_length: Mapping[str, Mapping[str, Any]]) -> Cells:
    return {n: (cell["score"], cell["se"]) for n, cell in by_length.items() if cell["score"] is not None}


def _section(
    title: str, lines: list[tuple[str, Cells, bool]], show: Callable[[float], str] = lambda x: f"{x:.1f}"
) -> Iterator[Section]:
    if lines:
        yield title, lines, show


def _error(scores: Mapping[str, Any], key: str, length: str, scale: float) -> float | None:
    error = (scores.get(f"{key}_se") or {}).get(length)
    return None if error is None else scale * error


def _cell(value: tuple[float, float | None], show: Callable[[float], str]) -> str:
    score, error = value
    return show(score) if error is None else f"{show(score)} ({show(error)})"
