"""The report as one HTML page that needs nothing from anywhere: text, tables, and figures as inline SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hylo.report import origin, tables
from hylo.report.collect import completed
from hylo.report.drawing import FIGURE_CSS
from hylo.report.measures import Measure, measures
from hylo.report.missing import missing_figures
from hylo.report.names import LETTERS, MIXERS, count, in_bytes, looks, short_length
from hylo.report.style import STYLE
from hylo.report.tables import by_length, shown_as, swatch, table, together
from hylo.report.verdict import verdict

Report = Mapping[str, Any]
Figures = Mapping[str, str]

CAPTIONS = {
    "short_long": "A short-context score against mean RULER, by length: up and to the right is better. Bars are "
    "one standard error.",
    "lengths": "Needle accuracy (higher is better), KL divergence from the teacher and perplexity (lower is better), "
    "by context length. Bars are one standard error.",
    "depth": "Share of needles recalled, by context length and by the needle's depth: 0&nbsp;% is the start of the "
    "context, 100&nbsp;% the end, where the question is asked.",
    "positions": "Perplexity and KL to the teacher by position in the context.",
    "training_length": "The long-context score against the length trained at, with and without YaRN. Bars are one "
    "standard error.",
    "teacher_size": "The long-context score against the size of the teacher; 0 is training without one. Bars are one "
    "standard error.",
    "latency": "Time to first token and time per output token by context length; a cross: out of memory.",
    "plan": "Every layer keeps the base's MLP and norms; its token mixer is the coloured part. What a layer "
    "remembers: MLA a small latent for every token, the linear mixers a state that does not grow, attention keys and "
    "values.",
    "initialisation": "How an MLA layer's weights come from the base's, and the share of their energy (squared "
    "singular values) that the ranks keep, layer by layer.",
    "training": "Loss against tokens. Alignment: distance of layer outputs and mixer outputs from the teacher's, "
    "summed over layers. Extension: forward KL to the teacher.",
}


def page(report: Report, figures: Figures) -> str:
    """The page of a report (keys: hylo.report.collect); `figures` are SVG elements by name."""
    report = completed(dict(report))
    sections = [
        _summary(report),
        _section("What got better, what got worse", _verdict(report)),
        _checks(report),
        _section("Short context and long", _figure(figures, "short_long")),
        _section("RULER", _ruler(report)),
        _section("Commonsense and GSM8K", _legend(tables.commonsense_table(report))),
        _section("By context length", _figure(figures, "lengths", _training_lengths(report)) + _lengths(report)),
        _section("Where in the context", _where(report, figures)),
        _section("Inside the model", together(tables.mixer_table(report), tables.memory_table(report))),
        _section("Training length", _figure(figures, "training_length")),
        _section("The teacher's size", _figure(figures, "teacher_size")),
        _section("Latency", _latency(report, figures)),
        _plan(report, figures),
        _section("Training", _figure(figures, "training") + tables.stages_table(report)),
        _section("Beside published results", _published(report)),
        _section("Not run, not drawn", _left_out(report)),
        _section("How it was measured", origin.origin(report)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report['title'])}</title>\n<style>{FIGURE_CSS}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    cards = [card for card in (_cache_card(report), *map(lambda m: _card(report, m), measures(report))) if card]
    plan = report.get("plan") or {}
    if "parameters" in plan:
        cards.append(("Parameters", count(plan["parameters"]), f"base {count(plan['base_parameters'])}"))
    tiles = "".join(
        f'<div class="card"><dt>{escape(title)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="detail">{escape(detail)}</dd></div>'
        for title, value, detail in cards
    )
    checks = report["checks"]
    passed = sum(bool(check["passed"]) for check in checks)
    badge = ""
    if checks:
        kind = "pass" if passed == len(checks) else "fail"
        badge = f'<a class="badge {kind}" href="#checks">{passed} of {len(checks)} checks passed</a>'
    layout = f" as <b>{escape(report['layout'])}</b>" if report.get("layout") else ""
    base = f"<b>{escape(str(report['base']))}</b>{layout}" if report.get("base") else layout.removeprefix(" as ")
    return f'<header><h1>{escape(report["title"])}</h1><p>{base} {badge}</p></header><dl class="cards">{tiles}</dl>'


def _cache_card(report: Report) -> tuple[str, str, str] | None:
    plan = report.get("plan") or {}
    if (share := report.get("kv_percent_of_base")) is None:
        return None
    detail = "of the base's"
    if "kv_bytes_per_token" in plan:
        detail += f"\n{plan['kv_bytes_per_token']:,} of {plan['base_kv_bytes_per_token']:,} bytes/token"
    return "KV cache", f"{share:.3g} %", detail


def _card(report: Report, measure: Measure) -> tuple[str, str, str] | None:
    """The hybrid's score at the longest length that it has, and beside it the others'."""
    own = measure.cells.get(report["hybrid"])
    if not own:
        return None
    key = max(own, key=lambda key: int(key or 0))
    show, unit = shown_as(measure), "\u00a0%" if measure.unit == "%" else ""
    beside = []
    for name, look in looks(report).items():
        found = measure.cells.get(name, {}).get(key)
        if found is not None and report["models"][name]["role"] in ("teacher", "base", "baseline"):
            beside.append(f"{look.label} {show(found.value)}{unit}")
    where = f" at {short_length(int(key))}" if key else ""
    title = measure.title[0].upper() + measure.title[1:] + where
    return title, f"{show(own[key].value)}{unit}", "\n".join(beside[:3])


def _verdict(report: Report) -> str:
    found = verdict(report)
    if not found["paragraph"]:
        return ""
    details = ""
    for other in found["details"]:
        lines = [
            f"<li><b>{escape(line['verdict'][0].upper() + line['verdict'][1:])}</b>: {escape(line['text'])}</li>"
            for line in other["lines"]
        ]
        details += f"<h3>Against {escape(other['against'])}</h3><ul>{''.join(lines)}</ul>"
    how = (
        '<p class="note">± is half of the 95&nbsp;% confidence interval. Better and worse are said only of differences '
        "of more than two standard errors.</p>"
    )
    return f'<p class="lead">{escape(found["paragraph"])}</p>' + (details and details + how)


def _checks(report: Report) -> str:
    rows = [
        [
            '<span class="pass">✓ passed</span>' if check["passed"] else '<span class="fail">✗ failed</span>',
            escape(str(check["name"])),
            *(escape(f"{v:.3g}" if isinstance(v, float) else str(v)) for v in (check["value"], check["threshold"])),
        ]
        for check in report["checks"]
    ]
    if not rows:
        return ""
    return _section("Checks", table(["", "What", "Measured", "Required"], rows, text_columns=2), "checks")


def _ruler(report: Report) -> str:
    body = tables.ruler_tables(report)
    haystack = str(report["suites"].get("ruler", {}).get("settings", {}).get("haystack") or "")
    if body and haystack.startswith("stand-in"):
        body = (
            f'<p class="note">Haystack of the essay tasks: {escape(haystack)}, not the benchmark\'s essays. These '
            "scores are not to be held against published ones.</p>" + body
        )
    return _legend(body)


def _legend(body: str) -> str:
    return body and f'{body}<p class="note">± is half of the 95&nbsp;% confidence interval.</p>'


def _lengths(report: Report) -> str:
    titles = ("needle accuracy", "KL to the teacher", "perplexity")
    return _legend(together(*(by_length(report, title) for title in titles)))


def _where(report: Report, figures: Figures) -> str:
    return _figure(figures, "depth") + _figure(figures, "positions") + _legend(tables.position_tables(report))


def _latency(report: Report, figures: Figures) -> str:
    body = "".join(_figure(figures, name) for name in figures if name.startswith("latency"))
    for bench in report["latency"]:
        how = {"serve": "vLLM's engine", "generate": "transformers"}[bench["kind"]]
        body += f'<p class="note">Through {how}, on {escape(str(bench.get("device", "")))}.</p>'
        body += tables.latency_tables(bench)
    return body


def _plan(report: Report, figures: Figures) -> str:
    plan = report.get("plan") or {}
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
                    f"{swatch(look.colour)}{name}",
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
    memory = ""
    if (long := report.get("l_long")) and "kv_bytes_per_token" in plan:
        state = plan.get("state_bytes_per_sequence", 0)
        memory = (
            f"<p>By the plan, one sequence of {long:,} tokens takes {in_bytes(plan['kv_bytes_per_token'] * long)} of "
            f"cache and {in_bytes(state)} of state, against the base's "
            f"{in_bytes(plan['base_kv_bytes_per_token'] * long)}.</p>"
        )
    drawn = _figure(figures, "plan") + table(heads, rows, text_columns=2) + memory
    return _section("The plan", drawn + _figure(figures, "initialisation"))


def _published(report: Report) -> str:
    body = tables.published_table(report)
    sources = list(dict.fromkeys(row["source"] for row in report["published"] if row.get("source")))
    note = f"Rows marked <i>quoted</i> are {escape(', '.join(sources))}; they were not measured here."
    return body and f'{body}<p class="note">{note}</p>'


def _left_out(report: Report) -> str:
    """Tasks that were not run, and figures without data with the command that makes them."""
    rows = [
        [escape(suite), escape(what), escape(why)]
        for suite, part in report["suites"].items()
        for what, why in (part.get("not_run") or {}).items()
    ]
    body = table(["Suite", "Not run", "Why"], rows, text_columns=3) if rows else ""
    drawn = [
        [escape(missing.figure), escape(missing.why), f"<code>{escape(missing.command)}</code>"]
        for missing in missing_figures(report)
    ]
    return body + (table(["Figure not drawn", "Why", "What makes it"], drawn, text_columns=3) if drawn else "")


def _training_lengths(report: Report) -> str:
    short, long = report.get("l_short"), report.get("l_long")
    text = f" L_short, {short:,} tokens, is the length of alignment." if short else ""
    return text + (f" L_long, {long:,} tokens, is the longest length trained." if long else "")


def _section(title: str, body: str, name: str = "") -> str:
    anchor = f' id="{name}"' if name else ""
    return f"<section{anchor}><h2>{title}</h2>{body}</section>" if body else ""


def _figure(figures: Figures, name: str, more: str = "") -> str:
    if name not in figures:
        return ""
    caption = CAPTIONS[name if name in CAPTIONS else name.partition("_")[0]]
    legend = f'<figcaption id="caption-{name}">{caption}{more}</figcaption>'
    return f'<figure><div class="scroll">{figures[name]}</div>{legend}</figure>'


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
