"""The tables of a report as HTML: models side by side, every score with its 95 % confidence interval."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from hylo.report.drawing import NEUTRALS
from hylo.report.measures import Estimate, Measure, measures, task_measures
from hylo.report.names import MEANING, amount, in_bytes, looks, short_length

Report = Mapping[str, Any]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Cells are HTML; the first `text_columns` are aligned left, numbers right."""

    def cell(tag: str, i: int, text: str) -> str:
        kind = "" if i < text_columns else ' class="n"'
        return f"<{tag}{kind}>{text}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def titled(title: str, body: str) -> str:
    return f"<div><h3>{title}</h3>{body}</div>" if body else ""


def together(*tables: str) -> str:
    """Beside each other where there is room."""
    return f'<div class="tables">{"".join(tables)}</div>' if any(tables) else ""


def named(report: Report, name: str) -> str:
    look = looks(report)[name]
    return f"{swatch(look.colour)}{escape(look.label)}"


def swatch(colour: str) -> str:
    own = f"var(--figure-{NEUTRALS[colour][0]}, {colour})" if colour in NEUTRALS else colour
    return f'<span class="swatch" style="background:{own}"></span>'


def estimate(found: Estimate | None, show: Callable[[float], str]) -> str:
    """`61.5 ± 2.1`, with what failed."""
    if found is None:
        return "–"
    value, _, spread = with_interval(found, show).partition(" ± ")
    text = value + (f" <small>± {spread}</small>" if spread else "")
    return text + (f" <small>({found.failed} failed)</small>" if found.failed else "")


def with_interval(found: Estimate, show: Callable[[float], str]) -> str:
    """`61.5 ± 2.1`: the half of the 95 % interval has as many decimals as the value."""
    value, half = show(found.value), found.interval
    if half is None:
        return value
    return f"{value} ± {half:,.{len(value.partition('.')[2])}f}"


def shown_as(measure: Measure) -> Callable[[float], str]:
    if measure.unit == "%":
        return decimal
    return amount if measure.title.startswith("KL") else two


def by_length(report: Report, title: str) -> str:
    """A line a model and a column a length, of the measure of that title."""
    found = [measure for measure in measures(report) if measure.title == title]
    if not found:
        return ""
    measure, show = found[0], shown_as(found[0])
    rows = [
        [named(report, name), *(estimate(measure.cells[name].get(key), show) for key in measure.keys)]
        for name in report["models"]
        if name in measure.cells
    ]
    unit = f" ({measure.unit})" if measure.unit else ""
    heads = ["Model", *(short_length(int(key)) if key else "" for key in measure.keys)]
    return titled(title[0].upper() + title[1:] + unit, table(heads, rows))


def ruler_tables(report: Report) -> str:
    """For each length, a line a task and a column a model, the mean below."""
    tasks = task_measures(report, "ruler")
    means = [measure for measure in measures(report) if measure.suite == "ruler"]
    lengths = sorted({int(key) for measure in tasks for key in measure.keys})
    return together(*(titled(f"At {n:,} tokens", _by_task(report, tasks, means, str(n))) for n in lengths))


def commonsense_table(report: Report) -> str:
    """A line a task and a column a model; GSM8K below."""
    tasks = task_measures(report, "commonsense")
    means = [measure for measure in measures(report) if measure.suite in ("commonsense", "gsm8k")]
    return _by_task(report, tasks, means, "") if tasks or means else ""


def _by_task(report: Report, tasks: Sequence[Measure], means: Sequence[Measure], key: str) -> str:
    names = [name for name in report["models"] if any(key in m.cells.get(name, {}) for m in (*tasks, *means))]

    def row(measure: Measure, title: str) -> list[str]:
        cells = [measure.cells.get(name, {}).get(key) for name in names]
        return [title, *(estimate(cell, decimal) for cell in cells)]

    rows = [row(measure, escape(measure.title)) for measure in tasks if any(key in c for c in measure.cells.values())]
    for measure in means:
        counts = {cells[key].tasks for cells in measure.cells.values() if key in cells}
        several = f", {counts.pop()} tasks" if len(counts) == 1 and counts != {1} and counts != {None} else ""
        rows.append([f"<b>{escape(measure.title)}{several}</b>", *row(measure, "")[1:]])
    return table(["Task (%)", *(named(report, name) for name in names)], rows)


def position_tables(report: Report) -> str:
    """Perplexity and KL by position at the longest length; the other lengths are in report.json."""
    results = _intrinsic(report, "by_position")
    if not results:
        return ""
    longest = max((length for result in results.values() for length in result["by_position"]), key=int)
    found = {name: result["by_position"].get(longest, []) for name, result in results.items()}
    tables = []
    for key, title, show in (("perplexity", "Perplexity", two), ("kl", "KL to the teacher (nats/token)", amount)):
        names = [name for name, buckets in found.items() if any(bucket.get(key) is not None for bucket in buckets)]
        rows: dict[tuple[int, int], dict[str, Estimate]] = {}
        for name in names:
            for bucket in found[name]:
                place = (bucket["from"], bucket["to"])
                rows.setdefault(place, {})[name] = Estimate(bucket[key], bucket.get(f"{key}_se"))
        if rows:
            lines = [
                [f"{a:,}–{b:,}", *(estimate(cells.get(name), show) for name in names)]
                for (a, b), cells in sorted(rows.items())
            ]
            heads = ["Position", *(named(report, name) for name in names)]
            tables.append(titled(f"{title}, {int(longest):,} tokens", table(heads, lines)))
    return together(*tables)


def mixer_table(report: Report) -> str:
    """Distance of each layer's mixer output from the attention's, layer by layer."""
    results = _intrinsic(report, "mixer_error")
    if not results:
        return ""
    layers: dict[int, dict[str, Mapping[str, Any]]] = {}
    for name, result in results.items():
        for layer in result["mixer_error"]:
            layers.setdefault(layer["layer"], {})[name] = layer
    rows = []
    for index, by_model in sorted(layers.items()):
        cells = [by_model.get(name) for name in results]
        found = [None if cell is None else Estimate(cell["error"], cell.get("error_se")) for cell in cells]
        rows.append([f"{index}", *(estimate(cell, amount) for cell in found)])
    return titled("Error of a layer's mixer", table(["Layer", *(named(report, name) for name in results)], rows))


def memory_table(report: Report) -> str:
    """Bytes counted in the cache's tensors."""
    results = _intrinsic(report, "memory")
    if not results:
        return ""
    lengths = sorted({int(length) for result in results.values() for length in result["memory"]})
    rows = []
    for name, result in results.items():
        held = result["memory"]
        one = held[max(held, key=int)]
        cells = [f"{one['cache_bytes_per_token']:,.0f}", in_bytes(one["state_bytes"])]
        cells += [in_bytes(held[str(n)]["total_bytes"]) if str(n) in held else "–" for n in lengths]
        rows.append([named(report, name), *cells])
    heads = ["Model", "Cache bytes a token", "State", *(f"{short_length(n)} in all" for n in lengths)]
    return titled("Memory of one sequence, measured", table(heads, rows))


def _intrinsic(report: Report, key: str) -> dict[str, Any]:
    results = report["suites"].get("intrinsic", {}).get("results", {})
    return {name: results[name] for name in report["models"] if results.get(name, {}).get(key)}


def latency_tables(bench: Mapping[str, Any]) -> str:
    """TTFT and TPOT of one bench, a line a model and concurrency."""
    lengths = sorted({point["length"] for model in bench["models"] for point in model["points"]})
    heads = ["Model", "At once", *(short_length(length) for length in lengths)]
    tables = []
    for key, title, show in (
        ("ttft", "Time to first token (s)", lambda seconds: f"{seconds:.3g}"),
        ("tpot", "Time per output token (ms)", lambda seconds: f"{1000 * seconds:.3g}"),
    ):
        rows = []
        for model in bench["models"]:
            for at_once in sorted({point["concurrency"] for point in model["points"]}):
                own = {point["length"]: point for point in model["points"] if point["concurrency"] == at_once}
                cells = [_point(own.get(length), key, show) for length in lengths]
                rows.append([escape(model["model"]), str(at_once), *cells])
        tables.append(titled(title, table(heads, rows)))
    return together(*tables)


def _point(point: Mapping[str, Any] | None, key: str, show: Callable[[float], str]) -> str:
    if point is None:
        return "–"
    return show(point[key]) if point["status"] == "measured" else f"<small>{escape(point['status'])}</small>"


def published_table(report: Report) -> str:
    """What was measured, then the published rows, marked as quoted; columns are the published ones."""
    rows = report["published"]
    if not rows:
        return ""
    lengths = sorted({int(length) for row in rows for length in row["ruler"]})
    own = {measure.title: measure for measure in measures(report)}
    lines = []
    for name in report["models"]:
        plan = report["models"][name].get("plan") or {}
        kv = plan.get("kv_percent_of_base")
        cells = ["–" if kv is None else f"{kv:.3g}"]
        for title, key in (("mean commonsense", ""), ("GSM8K", ""), *(("mean RULER", str(n)) for n in lengths)):
            found = own[title].cells.get(name, {}).get(key) if title in own else None
            cells.append(estimate(found, decimal))
        lines.append([named(report, name), "measured", *cells])
    for row in rows:
        scores = [row.get("commonsense"), row.get("gsm8k"), *(row["ruler"].get(str(n)) for n in lengths)]
        cells = [f"{row['kv']:g}" if row.get("kv") is not None else "–"]
        cells += ["–" if score is None else f"{score:.1f}" for score in scores]
        name = f'<span class="quoted">{escape(row["model"])}</span>'
        lines.append([name, '<span class="quoted">quoted</span>', *cells])
    heads = ["Model", "", "KV % of base", "Commonsense", "GSM8K", *(f"RULER {short_length(n)}" for n in lengths)]
    return table(heads, lines, text_columns=2)


def models_table(report: Report) -> str:
    """What each model is: size, context, layout, how it was trained, hash and place."""
    rows = []
    for name, about in report["models"].items():
        if not about.get("hash"):
            continue
        training = about.get("training") or {}
        how = f"{training['tokens']:,} tokens, up to {training['length']:,} at once" if training else "–"
        rows.append(
            [
                named(report, name),
                escape(about.get("layout") or about.get("model_type") or "–"),
                escape(how),
                f'<code class="hash">{about["hash"][:12]}</code>',
                f'<span class="path">{escape(about["directory"])}</span>',
                f"{about['parameters']:,}" if about.get("parameters") else "–",
                f"{about['context']:,}" if about.get("context") else "–",
            ]
        )
    return (
        table(["Model", "Layout", "Trained on", "Hash", "Directory", "Parameters", "Context"], rows, 5) if rows else ""
    )


def decimal(value: float) -> str:
    return f"{value:.1f}"


def two(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else amount(value)


def stages_table(report: Report) -> str:
    """What each stage of a run is and cost."""
    stages = [stage for stage in report["stages"] if stage.get("tokens") or stage.get("seconds")]
    if not stages:
        return ""
    rows = [
        [named(report, stage["name"]), escape(MEANING.get(stage["name"], ""))]
        + [f"{stage[key]:,.0f}" if stage.get(key) is not None else "–" for key in ("tokens", "seconds")]
        for stage in report["stages"]
    ]
    return table(["Stage", "What it is", "Tokens trained on", "Seconds"], rows, text_columns=2)
