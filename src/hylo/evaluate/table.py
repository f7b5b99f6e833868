"""One table of all results: a section a score, in it a line a model, a column a length; quoted rows beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

GAP = 3  # blanks between columns
Cells = dict[str, tuple[float, float | None]]  # by length, or "" for what has none: score and standard error
Section = tuple[str, list[tuple[str, Cells, bool]], Callable[[float], str]]


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Prints results as `evaluate_suites` gives them, beside them any "published" rows; then what was not run."""
    sections = list(sections_of(result))
    lengths = sorted({int(key) for _, lines, _ in sections for _, cells, _ in lines for key in cells if key})
    short = any("" in cells for _, lines, _ in sections for _, cells, _ in lines)
    for columns in _fitting(sections, ([""] if short else []) + [str(length) for length in lengths], console.width):
        console.print(_table(sections, columns))
    if sections:
        console.print("in brackets: standard errors")
    if (haystack := suite_setting(result, "ruler", "haystack")) not in (None, "essays"):
        console.print(f"RULER's essays: {haystack}", highlight=False)
    for suite, part in result["suites"].items():
        for what, reason in part["not_run"].items():
            console.print(f"not run: {suite}, {what}: {reason}", highlight=False, soft_wrap=True)


def _table(sections: Sequence[Section], columns: Sequence[str]) -> Table:
    """The scores that have one of these columns."""
    table = Table("", *["short" if key == "" else f"{int(key):,}" for key in columns], box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for title, lines, show in sections:
        if not (here := [line for line in lines if set(columns) & line[1].keys()]):
            continue
        table.add_row(f"[bold]{title}[/]")
        for name, cells, quoted in here:
            texts = [_cell(cells[key], show) if key in cells else "" for key in columns]
            table.add_row(f"  [italic]{name} (quoted)[/]" if quoted else f"  {name}", *texts)
        table.add_section()
    return table


def _fitting(sections: Sequence[Section], columns: Sequence[str], width: int) -> Iterator[list[str]]:
    """Columns by as many as fit beside each other, one at least."""
    names = [len(title) for title, _, _ in sections]
    names += [
        len(f"  {name} (quoted)" if quoted else f"  {name}") for _, lines, _ in sections for name, _, quoted in lines
    ]
    here: list[str] = []
    left = room = width - max(names, default=0) - GAP
    for column in columns:
        cells = [_cell(cells[column], show) for _, lines, show in sections for _, cells, _ in lines if column in cells]
        taken = GAP + max(len(text) for text in (*cells, f"{column:>9}"))
        if here and taken > left:
            yield here
            here, left = [], room
        here.append(column)
        left -= taken
    if here:
        yield here


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
