"""RULER, and tasks of lm-eval, on a hybrid that is really served, against the same hybrid loaded."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hylo.convert import Initialisation, convert
from hylo.demo import TEACHER
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import evaluations_cache
from hylo.evaluate.ruler_suite import RulerSettings, evaluate_ruler
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject
from hylo.plan import make_plan

TASKS = ("niah_single_1", "niah_multikey_2", "fwe")


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    convert(TEACHER, folder, make_plan(TEACHER, "2MLA4GDN", mla_layers=[0, 1]), Initialisation(), dtype="float32")
    return folder


@pytest.fixture(scope="module")
def address(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    options = ["--port", str(port), "--cache-memory", "64MiB", "--", "--enforce-eager"]
    with (folder / "log.txt").open("w") as errors:
        command = [sys.executable, "-P", "-m", "hylo", "serve", str(hybrid), *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        try:
            assert server.stdout is not None
            assert any("ready at" in line for line in server.stdout), (folder / "log.txt").read_text()[-2000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def _answers(model_hash: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The records of a model, by file and key: what was asked is the same for both models."""
    found = {}
    for path in (evaluations_cache() / model_hash[:16]).glob("*.jsonl"):
        identity, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        found |= {(str(identity.get("task")), line["key"]): line for line in lines}
    return found


def test_ruler_is_answered_as_the_model_answers(hybrid: Path, address: str) -> None:
    served, loaded = Served("served", address, hybrid), Subject("loaded", hybrid)
    settings = RulerSettings((1024,), TASKS, samples=2)
    for subject in (served, loaded):
        result, not_run = evaluate_ruler(subject, settings, Bar())
        assert not not_run and all(cell["1024"]["failed"] == 0 for cell in result["scores"].values())
    one, other = _answers(served.hash), _answers(loaded.hash)
    assert one.keys() == other.keys() and len(one) == 2 * len(TASKS)
    assert {key: line["prediction"] for key, line in one.items()} == {
        key: line["prediction"] for key, line in other.items()
    }


def test_choices_are_scored_as_the_model_scores_them(hybrid: Path, address: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from harness_sets import rows_of, write_lines

    from hylo.evaluate.harness import HarnessSettings, evaluate_harness

    write_lines(tmp_path / "sets/piqa/validation.jsonl", rows_of("piqa", 4))
    write_lines(tmp_path / "sets/winogrande/validation.jsonl", rows_of("winogrande", 4))
    served, loaded = Served("served", address, hybrid), Subject("loaded", hybrid)
    settings = HarnessSettings(data=tmp_path / "sets")
    results = [evaluate_harness(subject, "commonsense", settings, Bar())[0] for subject in (served, loaded)]
    assert set(results[0]["scores"]) == {"piqa", "winogrande"} and not results[0]["failures"]
    assert results[0]["scores"] == results[1]["scores"]
    one, other = _answers(served.hash), _answers(loaded.hash)
    assert one.keys() == other.keys() and len(one) == 16
    for key, answer in one.items():
        assert answer["loglikelihood"] == pytest.approx(other[key]["loglikelihood"], abs=2e-3)
        assert answer["greedy"] == other[key]["greedy"]
