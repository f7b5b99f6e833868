"""The report as one HTML page that needs nothing from anywhere: text, tables, and figures as inline SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from hylo.report.names import LETTERS, MEANING, MIXERS, amount, count, in_bytes, metric, short_length, stage_look
from hylo.report.style import STYLE

Report = Mapping[str, Any]


def page(report: Report, figures: Mapping[str, str]) -> str:
    """The page of a report (keys: see write_report); `figures` are SVG elements by name."""
    sections = [
        _summary(report),
        _checks(report),
        _section(
            "By context length",
            _figure(
                figures, "lengths", "Needle accuracy (higher is better; bars are one standard error), KL divergence "
                "from the teacher and perplexity (lower is better), by context length." + _training_lengths(report),
            ),
        ),
        _plan(report, figures),
        _section(
            "Where in the context",
            _figure(
                figures, "depth", "Share of needles recalled, by context length and by the needle's depth: 0&nbsp;% is "
                "the start of the context, 100&nbsp;% the end, where the question is asked.",
            ),
        ),
        _section(
            "Training",
            _figure(
                figures, "training", "Loss against tokens. Alignment: distance of layer outputs and mixer outputs from "
                "the teacher's, summed over layers. Extension: forward KL to the teacher.",
            ),
        ),
        _tables(report),
        _origin(report),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report['title'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    plan, long = report.get("plan", {}), report.get("l_long") or max(report["lengths"])
    stages = {stage["name"]: stage for stage in report["stages"]}
    final = stages.get("extended") or next((s for s in reversed(report["stages"]) if s["name"] != "teacher"), None)

    def at_long(stage: Mapping[str, Any] | None, name: str) -> float | None:
        return metric(stage, name).get(str(long)) if stage else None

    def others(name: str, show: Any, *names: str) -> str:
        parts = [(stage_look(n).label.lower(), at_long(stages.get(n), name)) for n in names]
        return "\n".join(f"{label} {show(value)}" for label, value in parts if value is not None)

    cards = []
    if (share := report.get("kv_percent_of_base")) is not None:
        detail = "of the base's"
        if "kv_bytes_per_token" in plan:
            detail += f"\n{plan['kv_bytes_per_token']:,} of {plan['base_kv_bytes_per_token']:,} bytes/token"
        cards.append(("KV cache", f"{share:.3g} %", detail))
    for title, name, show, beside in (
        ("Needles", "needle", _percent, ("teacher", "control")),
        ("KL to teacher", "kl", amount, ("aligned", "control")),
        ("Perplexity", "perplexity", _two, ("teacher", "control")),
    ):
        if (value := at_long(final, name)) is not None:
            cards.append((f"{title} at {short_length(long)}", show(value), others(name, show, *beside)))
    if "parameters" in plan:
        cards.append(("Parameters", count(plan["parameters"]), f"base {count(plan['base_parameters'])}"))
    tiles = "".join(
        f'<div class="card"><dt>{escape(title)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="detail">{escape(detail)}</dd></div>'
        for title, value, detail in cards
    )
    checks = report.get("checks") or []
    passed = sum(bool(check["passed"]) for check in checks)
    verdict = ""
    if checks:
        kind = "pass" if passed == len(checks) else "fail"
        verdict = f'<a class="badge {kind}" href="#checks">{passed} of {len(checks)} checks passed</a>'
    layout = f" as <b>{escape(report['layout'])}</b>" if report.get("layout") else ""
    base = f"<b>{escape(str(report['base']))}</b>{layout}" if report.get("base") else ""
    return f'<header><h1>{escape(report["title"])}</h1><p>{base} {verdict}</p></header><dl class="cards">{tiles}</dl>'


def _checks(report: Report) -> str:
    rows = [
        [
            '<span class="pass">✓ passed</span>' if check["passed"] else '<span class="fail">✗ failed</span>',
            escape(str(check["name"])),
            *(escape(f"{v:.3g}" if isinstance(v, float) else str(v)) for v in (check["value"], check["threshold"])),
        ]
        for check in report.get("checks") or []
    ]
    if not rows:
        return ""
    return _section("Checks", _table(["", "What", "Measured", "Required"], rows, text_columns=2), "checks")


def _plan(report: Report, figures: Mapping[str, str]) -> str:
    plan = report.get("plan", {})
    layers = plan.get("layers")
    if not layers:
        return ""
    rows = []
    for kind, look in MIXERS.items():
        of_kind = [layer for layer in layers if layer["mixer"] == kind]
        if of_kind:
            one = of_kind[0]
            name = look.label if look.label == LETTERS[kind] else f"{look.label} ({LETTERS[kind]})"
            rows.append(
                [
                    f'<span class="swatch" style="background:{look.colour}"></span>{name}',
                    _ranges([layer["index"] for layer in of_kind]),
                    f"{len(of_kind)}",
                    f"{one.get('mixer_parameters', one['parameters']):,}",
                    _optional(one.get("kv_bytes_per_token")),
                    _optional(one.get("state_bytes_per_sequence")),
                ]
            )
    heads = ["Mixer", "Which layers", "Layers", "Parameters of one", "KV bytes a token", "State bytes a sequence"]
    for name, key in (("<b>Whole model</b>", ""), ("Base", "base_")):
        rows.append([name, "", f"{len(layers)}", f"{plan[key + 'parameters']:,}"])
        rows[-1] += [
            _optional(plan.get(key + "kv_bytes_per_token")),
            _optional(plan.get(key + "state_bytes_per_sequence")),
        ]
    caption = (
        "Every layer keeps the base's MLP and norms; its token mixer is the coloured part. What a layer remembers: "
        "MLA a small latent for every token, the linear mixers a state that does not grow, attention keys and values."
    )
    memory = ""
    if (long := report.get("l_long")) and "kv_bytes_per_token" in plan:
        state = plan.get("state_bytes_per_sequence", 0)
        memory = (
            f"<p>One sequence of {long:,} tokens takes {in_bytes(plan['kv_bytes_per_token'] * long)} of cache and "
            f"{in_bytes(state)} of state, against the base's {in_bytes(plan['base_kv_bytes_per_token'] * long)}.</p>"
        )
    return _section("The plan", _figure(figures, "plan", caption) + _table(heads, rows, text_columns=2) + memory)


def _tables(report: Report) -> str:
    heads = ["Stage"] + [short_length(n) for n in report["lengths"]]

    def table(title: str, name: str, show: Any) -> str:
        rows = []
        for stage in report["stages"]:
            values, errors = metric(stage, name), metric(stage, f"{name}_se")
            if values:
                cells = []
                for length in map(str, report["lengths"]):
                    spread = f" <small>± {100 * errors[length]:.1f}</small>" if errors.get(length) else ""
                    cells.append(show(values[length]) + spread if length in values else "–")
                rows.append([_stage_name(stage["name"])] + cells)
        return f"<div><h3>{title}</h3>{_table(heads, rows, text_columns=1)}</div>" if rows else ""

    tables = (
        table("Needle accuracy (%, ± standard error)", "needle", lambda x: f"{100 * x:.1f}")
        + table("KL to the teacher (nats per token)", "kl", amount)
        + table("Perplexity on held-out text", "perplexity", _two)
    )
    rows = [
        [_stage_name(stage["name"]), escape(MEANING.get(stage["name"], ""))]
        + [f"{stage[key]:,.0f}" if stage.get(key) is not None else "–" for key in ("tokens", "seconds")]
        for stage in report["stages"]
    ]
    heads_of_stages = ["Stage", "What it is", "Tokens trained on", "Seconds"]
    if not any(stage.get("tokens") or stage.get("seconds") for stage in report["stages"]):
        heads_of_stages, rows = heads_of_stages[:2], [row[:2] for row in rows]
    stages = f"<div><h3>Stages</h3>{_table(heads_of_stages, rows, text_columns=2)}</div>" if rows else ""
    return _section("All figures", f'<div class="tables">{tables}{stages}</div>') if tables else ""


def _origin(report: Report) -> str:
    rows = [[escape(key), escape(value)] for key, value in _flat(report.get("meta") or {})]
    return _section("How it was measured", _table([], rows, text_columns=2)) if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, name + ": ")
        else:
            yield name, f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _training_lengths(report: Report) -> str:
    short, long = report.get("l_short"), report.get("l_long")
    text = f" L_short, {short:,} tokens, is the length of alignment." if short else ""
    return text + (f" L_long, {long:,} tokens, is the longest length trained." if long else "")


def _section(title: str, body: str, name: str = "") -> str:
    anchor = f' id="{name}"' if name else ""
    return f"<section{anchor}><h2>{title}</h2>{body}</section>" if body else ""


def _figure(figures: Mapping[str, str], name: str, caption: str) -> str:
    if name not in figures:
        return ""
    drawing, legend = figures[name], f'<figcaption id="caption-{name}">{caption}</figcaption>'
    return f'<figure><div class="scroll">{drawing}</div>{legend}</figure>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """Cells are HTML; the first `text_columns` are aligned left, numbers right."""

    def cell(tag: str, i: int, text: str) -> str:
        kind = "" if i < text_columns else ' class="n"'
        return f"<{tag}{kind}>{text}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _stage_name(name: str) -> str:
    look = stage_look(name)
    return f'<span class="swatch" style="background:{look.colour}"></span>{escape(look.label)}'


def _ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0–2, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _optional(value: int | None) -> str:
    return f"{value:,}" if value else "–"


def _two(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else amount(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
