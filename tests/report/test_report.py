"""The page has every section, needs nothing from elsewhere, and bears with whatever was not measured."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hylo.errors import HyloError
from hylo.report import read_metrics, write_report
from hylo.report.figures import draw_figures, training_figure
from hylo.report.names import amount, count, in_bytes, short_length
from hylo.report.page import page

SECTIONS = [
    "Checks",
    "By context length",
    "The plan",
    "Where in the context",
    "Training",
    "All figures",
    "How it was measured",
]
FIGURES = {"result", "lengths", "plan", "depth", "training"}


def stage(name: str, kl: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "needle": {"64": 0.96875, "128": 0.5},
        "needle_se": {"64": 0.011, "128": 0.03},
        "needle_depth": {"64": [1.0, 0.9], "128": [0.4, 0.6]},
        "perplexity": {"64": 9.51, "128": 1234.5},
    }
    if kl is not None:
        metrics["kl"] = {"64": kl, "128": kl * 1.1}
    return {"name": name, "metrics": metrics, "seconds": 12.5, "tokens": 4096}


def example() -> dict[str, Any]:
    kinds = ["attention", "mla", "gated_deltanet", "mamba2"]
    layers = [
        {
            "index": i,
            "mixer": kind,
            "parameters": 3000 + i,
            "mixer_parameters": 1000 + i,
            "kv_bytes_per_token": 128 >> i if i < 2 else 0,
            "state_bytes_per_sequence": 4096 if i > 1 else 0,
        }
        for i, kind in enumerate(kinds)
    ]
    steps = [{"step": i, "tokens": 64 * i, "loss": 3.0 / i} for i in range(1, 600)]
    names = ("converted", "aligned", "extended", "control", "no_alignment", "something <new>")
    return {
        "title": "tiny & small",
        "base": "tiny",
        "layout": "1A1MLA1GDN1M2",
        "plan": {
            "parameters": 12_000,
            "parameters_untied": 13_000,
            "base_parameters": 11_000,
            "kv_bytes_per_token": 192,
            "base_kv_bytes_per_token": 512,
            "kv_percent_of_base": 37.5,
            "state_bytes_per_sequence": 8192,
            "layers": layers,
        },
        "kv_percent_of_base": 37.5,
        "lengths": [64, 128],
        "l_short": 64,
        "l_long": 128,
        "stages": [stage("teacher", None)] + [stage(name, 0.1 * i) for i, name in enumerate(names, 1)],
        "training": {"align": steps, "extend 128": steps[:3], "control 128": steps[:1]},
        "checks": [
            {"name": "needle at L_long", "value": 0.5, "threshold": "≥ 0.8", "passed": False},
            {"name": "KV cache", "value": 9.5, "threshold": 10, "passed": True},
        ],
        "meta": {"seed": 3, "versions": {"torch": "2.13.0"}},
    }


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
        if tag not in ("meta", "path", "use", "rect", "image", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect", "image"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_report(run, example())
    return run


def test_files(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report == example()
    assert {path.stem for path in (run / "figures").iterdir()} == FIGURES
    assert (run / "figures" / "result.png").read_bytes().startswith(b"\x89PNG")


def test_page_is_complete_and_needs_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    outline = Outline(text)
    assert outline.headings == SECTIONS and outline.open == []
    assert "http:" not in text and "https:" not in text and "<script" not in text
    assert all(re.match("#|data:image/png;base64,", address) for address in outline.addresses)
    assert "@import" not in text and re.findall(r"url\((?!#)", text) == []
    assert text.count("<svg") == len(FIGURES) - 1  # the README's picture is not shown twice
    for part in (
        "tiny &amp; small",
        "37.5 %",
        "1 of 2 checks passed",
        "✗ failed",
        "1A1MLA1GDN1M2",
        "1,234.50",
        "2.13.0",
    ):
        assert part in text, part
    assert "96.9 <small>± 1.1" in text and "<new>" not in text and "Something &lt;new&gt;" in text


def test_page_defines_what_it_refers_to(run: Path) -> None:
    text = (run / "report.html").read_text()
    defined = re.findall(r'\bid="([^"]+)"', text)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text) + re.findall(r'aria-labelledby="([^"]+)"', text)
    assert used and set(used) <= set(defined)
    assert len(set(defined)) == len(defined)


def test_same_report_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("an older one")
    write_report(tmp_path, example())
    assert (tmp_path / "report.html").read_text() == (run / "report.html").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in example().items() if key not in keys}


@pytest.mark.parametrize(
    "report, gone",
    [
        (without("checks", "meta", "l_short", "l_long"), {"Checks", "How it was measured"}),
        (without("plan", "kv_percent_of_base", "layout", "base", "training"), {"The plan", "Training"}),
        (
            example() | {"stages": [], "training": {"align": [], "extend 128": [{"step": 1, "loss": math.nan}]}},
            {"By context length", "Where in the context", "Training", "All figures"},
        ),
        (example() | {"stages": [stage("teacher", None)], "lengths": [64]}, set()),
    ],
)
def test_what_is_missing_is_left_out(report: dict[str, Any], gone: set[str]) -> None:
    figures = {name: figure.svg for name, figure in draw_figures(report).items()}
    assert Outline(page(report, figures)).headings == [title for title in SECTIONS if title not in gone]


def test_stages_with_holes_and_infinities() -> None:
    report = example()
    first, second, third = report["stages"][:3]
    del first["metrics"]["needle_depth"], second["metrics"]["needle_se"], second["seconds"]
    third["metrics"] |= {"kl": {"64": math.inf, "128": 0.0}, "perplexity": {"64": math.inf}, "needle": {"128": None}}
    for layer in report["plan"]["layers"]:
        del layer["kv_bytes_per_token"], layer["state_bytes_per_sequence"], layer["mixer_parameters"]
    figures = {name: figure.svg for name, figure in draw_figures(report).items()}
    assert set(figures) == FIGURES
    text = page(report, figures)
    assert Outline(text).headings == SECTIONS and "∞" in text


def test_metrics_of_a_stopped_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0, "layer_loss": [1, 1], "tokens": 8}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0, "tokens": 8}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file where a folder should be")
    with pytest.raises(HyloError, match="cannot write .*figures"):
        write_report(tmp_path, without("plan", "training", "checks"))


def test_names_of_amounts() -> None:
    assert [short_length(n) for n in (256, 1024, 65536, 2**20, 1000, 1536)] == [
        "256",
        "1K",
        "64K",
        "1M",
        "1000",
        "1536",
    ]
    assert [count(n) for n in (12, 1500, 2_345_678, 1_673_797_776)] == ["12", "1.5 K", "2.35 M", "1.67 B"]
    assert [in_bytes(n) for n in (12, 2048, 3 * 2**20, 2**31)] == ["12 bytes", "2 KiB", "3 MiB", "2 GiB"]
    assert [amount(x) for x in (0.00123, 0.5, 12.345, 12345.6, 7, "≥ 1", math.inf)] == [
        "0.00123",
        "0.500",
        "12.35",
        "12,346",
        "7",
        "≥ 1",
        "∞",
    ]


def test_curves_say_what_their_loss_is() -> None:
    steps = [{"step": i, "tokens": 64 * i, "loss": 3.0 / i} for i in range(1, 9)]
    stages = ("align", "extend 64", "extend 128", "dpo")
    report = {"training": dict.fromkeys(stages, steps), "losses": {"extend 128": "loss (jsd)", "dpo": "loss (dpo)"}}
    figure = training_figure(report)
    assert figure is not None
    labels = {axes.get_title(): axes.get_ylabel() for axes in figure.axes}
    assert labels == {
        "Alignment": "loss (L2 distance)",
        "Extension at 64 tokens": "KL to the teacher (nats/token)",
        "Extension at 128 tokens": "loss (jsd)",
        "DPO": "loss (dpo)",
    }
