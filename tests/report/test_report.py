"""A report's files: whole, the same from the same report, refused where they cannot be written."""

import json
from pathlib import Path

import pytest
from results_example import latency, results, run_report

from hylo.errors import HyloError
from hylo.report import read_metrics, report_of, write_report
from hylo.report.curves import training_figure
from hylo.report.names import amount, count, in_bytes, looks, short_length

FIGURES = {"result", "lengths", "plan", "depth", "training"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_report(run, run_report())
    return run


def test_files(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report == run_report()
    assert {path.stem for path in (run / "figures").iterdir()} >= FIGURES
    assert {path.suffix for path in (run / "figures").iterdir()} == {".png", ".svg"}
    assert (run / "figures" / "result.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "figures" / "result.svg").read_text().startswith("<svg xmlns=")


def test_same_report_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("an older one")
    write_report(tmp_path, run_report())
    assert (tmp_path / "report.html").read_text() == (run / "report.html").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_report_of_results(tmp_path: Path) -> None:
    """What is returned is what report.json holds, with the verdict."""
    paths = [tmp_path / "results.json", tmp_path / "latency.json"]
    for path, value in zip(paths, (results(), latency()), strict=True):
        path.write_text(json.dumps(value))
    report = report_of(paths, tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["paragraph"].startswith("Against the teacher, the hybrid is worse in")
    assert report["verdict"]["paragraph"] in (tmp_path / "out" / "report.html").read_text()
    drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"short_long", "depth", "positions", "latency"} <= drawn


def test_metrics_of_a_stopped_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0, "layer_loss": [1, 1], "tokens": 8}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0, "tokens": 8}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file where a folder should be")
    report = {key: value for key, value in run_report().items() if key not in ("plan", "training", "checks")}
    with pytest.raises(HyloError, match="cannot write .*figures"):
        write_report(tmp_path, report)


def test_names_of_amounts() -> None:
    lengths = (256, 1024, 65536, 2**20, 1000, 1536)
    assert [short_length(n) for n in lengths] == ["256", "1K", "64K", "1M", "1000", "1536"]
    assert [count(n) for n in (12, 1500, 2_345_678, 1_673_797_776)] == ["12", "1.5 K", "2.35 M", "1.67 B"]
    assert [in_bytes(n) for n in (12, 2048, 3 * 2**20, 2**31)] == ["12 bytes", "2 KiB", "3 MiB", "2 GiB"]
    assert [amount(x) for x in (0.00123, 0.5, 12.345, 12345.6, 7, "≥ 1", float("inf"))] == [
        "0.00123",
        "0.500",
        "12.35",
        "12,346",
        "7",
        "≥ 1",
        "∞",
    ]


def test_models_look_unlike_each_other() -> None:
    """Stages as ever, others by their role, and every baseline in a colour of its own."""
    roles = {"teacher": "teacher", "mine": "hybrid", "extended": "stage", "control": "baseline"}
    roles |= {name: "baseline" for name in ("a", "b", "c")}
    found = looks({"models": {name: {"role": role} for name, role in roles.items()}})
    assert [look.label for look in found.values()] == ["Teacher", "mine", "extended", "Control", "a", "b", "c"]
    assert len({look.colour for look in found.values()}) == len(roles)
    assert found["teacher"].colour == "#1a1a1a" and found["mine"].colour == "#0072B2"


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
