"""The page has every section, needs nothing from elsewhere, and bears with whatever was not measured."""

import math
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from results_example import CONTROL, HYBRID, TASKS, latency, results, run_report, run_stage

from hylo.evaluate.published import published_rows
from hylo.report.collect import completed
from hylo.report.figures import draw_figures
from hylo.report.origin import said
from hylo.report.page import CAPTIONS, page
from hylo.report.tables import estimate, two

SECTIONS = ["Checks", "By context length", "Where in the context", "The plan", "Training", "How it was measured"]
VERDICT = "What got better, what got worse"
VOID = ("meta", "br")


class Outline(HTMLParser):
    """Headings, the balance of tags, and every address that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def svg_of(report: dict[str, Any]) -> dict[str, str]:
    return {name: figure.svg for name, figure in draw_figures(report).items()}


@pytest.fixture(scope="module")
def run_page() -> str:
    return page(run_report(), svg_of(run_report()))


@pytest.fixture(scope="module")
def results_page() -> str:
    report = completed(results() | {"latency": [latency()], "published": published_rows()})
    return page(report, svg_of(report))


def headings(text: str) -> list[str]:
    outline = Outline(text)
    assert outline.open == []
    return [title for title in outline.headings if title != "Not run, not drawn"]


def test_sections_of_a_run(run_page: str) -> None:
    assert headings(run_page) == [VERDICT, *SECTIONS]
    for part in ("tiny &amp; small", "37.5 %", "1 of 2 checks passed", "✗ failed", "1A1MLA1GDN1M2", "1,234.50"):
        assert part in run_page, part
    assert "<new>" not in run_page and "something &lt;new&gt;" in run_page
    assert "96.9 <small>± 2.2</small>" in run_page  # 1.96 times 1.1


def test_sections_of_results(results_page: str) -> None:
    assert headings(results_page) == [
        VERDICT,
        "Short context and long",
        "RULER",
        "Commonsense and GSM8K",
        "By context length",
        "Where in the context",
        "Inside the model",
        "Latency",
        "Beside published results",
        "How it was measured",
    ]
    assert "HotpotQA is not here: give --hotpotqa FILE" in results_page


@pytest.mark.parametrize("name", ["run_page", "results_page"])
def test_page_needs_nothing(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name)
    assert "http:" not in text and "https:" not in text and "<script" not in text
    assert all(re.match("#|data:image/png;base64,", address) for address in Outline(text).addresses)
    assert "@import" not in text and re.findall(r"url\((?!#)", text) == []


@pytest.mark.parametrize("name", ["run_page", "results_page"])
def test_page_defines_what_it_refers_to(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name)
    defined = re.findall(r'\bid="([^"]+)"', text)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text) + re.findall(r'aria-labelledby="([^"]+)"', text)
    colours = set(re.findall(r"var\((--[\w-]+)", text))
    assert used and set(used) <= set(defined)
    assert len(set(defined)) == len(defined)
    assert colours <= set(re.findall(r"(--[\w-]+):", text))


def test_every_figure_is_placed() -> None:
    """But for the README's, which says what others say."""
    report = completed(results() | {"latency": [latency(), latency(kind="generate")]})
    figures = svg_of(report) | svg_of(run_report())
    text = page(report | {"plan": run_report()["plan"], "layout": "x"}, figures)
    assert set(re.findall(r'id="caption-(\w+)"', text)) == set(figures) - {"result"}
    assert text.count("<svg") == len(figures) - 1
    assert set(CAPTIONS) >= {name.rstrip("_2") for name in figures} - {"result"}


def test_every_score_is_on_the_page(results_page: str) -> None:
    suites, text = results()["suites"], unescape(results_page)
    for task in TASKS[:-1]:
        cells = [suites["ruler"]["results"][name]["scores"][task]["2048"] for name in suites["ruler"]["results"]]
        row = "".join(f'<td class="n">{c["score"]:.1f} <small>± {1.96 * c["se"]:.1f}</small></td>' for c in cells)
        assert f"<tr><td>{task}</td>{row}</tr>" in text
    for layer in suites["intrinsic"]["results"][HYBRID]["mixer_error"]:
        assert f"{layer['error']:.3f} <small>± {1.96 * layer['error_se']:.3f}</small>" in text
    assert "mean RULER, 12 tasks" in text and "out of memory" in text
    assert text.count('class="quoted">quoted') == len(published_rows())
    assert "1,024–2,048" in text and "280 KiB" in text and "6,144" in text


def test_a_stand_in_haystack_is_said() -> None:
    report = completed(results())
    assert "stand-in" not in page(report, {})
    report["suites"]["ruler"]["settings"]["haystack"] = "stand-in: rows.txt"
    assert "stand-in: rows.txt, not the benchmark's essays" in unescape(page(report, {}))


def test_failed_samples_are_said() -> None:
    report = completed(results())
    report["suites"]["ruler"]["results"][CONTROL]["scores"]["vt"]["1024"]["failed"] = 3
    assert page(report, {}).count("(3 failed)") == 1


def test_an_interval_has_the_decimals_of_its_value() -> None:
    from hylo.report.measures import Estimate

    assert estimate(Estimate(51.0, 0.4), two) == "51.00 <small>± 0.78</small>"
    assert estimate(Estimate(1234.0, 0.4), lambda x: f"{x:,.0f}") == "1,234 <small>± 1</small>"
    assert estimate(Estimate(51.0), two) == "51.00" and estimate(None, two) == "–"


def test_settings_in_a_line() -> None:
    values = {"seed": 0, "lengths": [1024, 65536], "chat": False, "teacher": None, "sources": {"essays": "1f"}}
    assert said(values) == "seed 0; lengths 1024, 65,536; chat no; sources: essays 1f"


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in run_report().items() if key not in keys}


def with_stages(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return run_report() | {"stages": list(stages)} | more


@pytest.mark.parametrize(
    "report, gone",
    [
        (without("checks", "meta", "l_short", "l_long"), {"Checks", "How it was measured"}),
        (without("plan", "kv_percent_of_base", "layout", "base", "training"), {"The plan"}),
        (
            with_stages(training={"align": [], "extend 128": [{"step": 1, "loss": math.nan}]}),
            {VERDICT, "By context length", "Where in the context", "Training"},
        ),
        (with_stages(run_stage("teacher", None), lengths=[64]), {VERDICT}),
    ],
)
def test_what_is_missing_is_left_out(report: dict[str, Any], gone: set[str]) -> None:
    assert headings(page(report, svg_of(report))) == [title for title in (VERDICT, *SECTIONS) if title not in gone]


def test_stages_with_holes_and_infinities() -> None:
    report = run_report()
    first, second, third = report["stages"][:3]
    del first["metrics"]["needle_depth"], second["metrics"]["needle_se"], second["seconds"]
    third["metrics"] |= {"kl": {"64": math.inf, "128": 0.0}, "perplexity": {"64": math.inf}, "needle": {"128": None}}
    for layer in report["plan"]["layers"]:
        del layer["kv_bytes_per_token"], layer["state_bytes_per_sequence"], layer["mixer_parameters"]
    text = page(report, svg_of(report))
    assert headings(text) == [VERDICT, *SECTIONS] and "∞" in text


def test_scores_that_are_not_there() -> None:
    """One model without a suite, a task without answers, and a mean of nothing."""
    report = completed(results())
    scores = report["suites"]["ruler"]["results"][HYBRID]
    scores["scores"]["vt"]["1024"] |= {"score": None, "se": None, "samples": 0, "failed": 20}
    scores["mean"]["1024"] = {"score": None, "se": None, "tasks": 0}
    for suite in ("needle", "gsm8k", "intrinsic"):
        del report["suites"][suite]["results"][HYBRID]
    text = page(report, svg_of(report))
    assert "RULER" in headings(text) and ">–<" in text
