"""hylo lab on a tiny base: runs, what they share, failures, going on, and what bad input gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command import hylo

STAGE = {"length": 32, "rows": 2, "tokens": 128, "learning_rate": 1e-3, "bad_batches": 0}


def write_suite(folder: Path, base: Path, text: Path, arms: dict[str, Any], seeds: list[int], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = {
        "base": str(base),
        "layout": "1MLA2GDN",
        "geometry": {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12},
        "data": {"text": [str(text)], "facts": 0.5},
        "stages": [STAGE | {"objective": "layers", "share": 0.5}, STAGE | {"name": "extended", "share": 0.5}],
        "yarn_original_length": 32,
        "evaluate": {"lengths": [256], "answers": 8, "tokens": 256},
    }
    suite = {
        "title": "Two arms",
        "question": "Which one?",
        "recipe": "recipe.yaml",
        "seeds": seeds,
        "baseline": "plain",
        "metrics": ["kl@256", "needle@256", "converted:kl@256"],
        "arms": arms,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | changes, sort_keys=False))
    return folder / "suite.yaml"


def results(lab: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (lab / "results").glob("*.json")}


ARMS = {
    "plain": {},
    "reverse": {"label": "reverse KL", "set": {"stages.1.objective": "reverse_kl"}},
    "broken": {"set": {"stages.1.learning_rate": 1e38, "stages.1.tokens": 640}},
    "stretched": {"set": {"stretch": 256}},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, text_file: Path) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("lab")
    suite = write_suite(folder / "suite", tiny_base, text_file, ARMS, [0])
    ended = hylo("lab", suite, "--out", folder / "lab")
    return SimpleNamespace(suite=suite, lab=folder / "lab", ended=ended)


def test_a_failing_arm_is_recorded_and_the_others_go_on(done: SimpleNamespace) -> None:
    assert done.ended.returncode == 1
    found = results(done.lab)
    assert {name: result["status"] for name, result in found.items()} == {
        "plain-seed-0": "done",
        "reverse-seed-0": "done",
        "broken-seed-0": "failed",
        "stretched-seed-0": "done",
    }
    reason = found["broken-seed-0"]["reason"]
    assert "the loss is nan at step" in reason and reason in (done.lab / "lab.html").read_text()
    assert f"failed: {reason}" in " ".join(done.ended.stdout.split())


def test_every_arm_is_trained_from_what_they_share(done: SimpleNamespace) -> None:
    logs = {name: (done.lab / "logs" / f"{name}-seed-0.log").read_text() for name in ("plain", "reverse")}
    assert "align: step" in logs["plain"] and "align: step" not in logs["reverse"]
    assert "aligned: done" in logs["reverse"] and "extend to 32: step" in logs["reverse"]
    found = results(done.lab)
    plain, reverse = (found[f"{name}-seed-0"]["metrics"] for name in ("plain", "reverse"))
    assert plain["converted:kl@256"] == reverse["converted:kl@256"]
    assert plain["kl@256"] != reverse["kl@256"]
    assert found["plain-seed-0"]["tokens"] == found["reverse-seed-0"]["tokens"] == 256


def test_finished_runs_leave_figures_and_no_models(done: SimpleNamespace) -> None:
    left = {path.relative_to(done.lab / "runs").parts[0] for path in done.lab.rglob("runs/*/seed-0/*/*.safetensors")}
    assert left == {"broken"}  # which may be gone on with
    assert not (done.lab / "shared" / "seed-0").exists()
    run = done.lab / "runs" / "plain" / "seed-0"
    assert {path.name for path in (run / "metrics").iterdir()} == {"aligned.jsonl", "extended.jsonl"}
    assert (run / "evaluations" / "extended.json").is_file() and (run / "recipe.yaml").is_file()


def test_table_page_and_figure_are_there(done: SimpleNamespace) -> None:
    lab = json.loads((done.lab / "lab.json").read_text())
    assert lab["arms"]["reverse"]["metrics"]["kl@256"]["difference"]["n"] == 1
    assert "reverse KL" in (done.lab / "lab.md").read_text()
    assert "reverse KL" in done.ended.stdout
    assert list((done.lab / "figures").glob("*.png")) and list((done.lab / "figures").glob("*.svg"))


def test_a_stretched_run_is_the_same_weights_under_longer_positions(done: SimpleNamespace) -> None:
    found = results(done.lab)
    plain, stretched = (found[f"{name}-seed-0"]["metrics"] for name in ("plain", "stretched"))
    assert plain["converted:kl@256"] == stretched["converted:kl@256"]
    assert plain["kl@256"] != stretched["kl@256"]
    extended = json.loads((done.lab / "runs/stretched/seed-0/evaluations/stretched.json").read_text())
    assert extended["meta"]["supported_length"] == 256


def test_the_same_command_tries_what_failed_again_and_nothing_else(done: SimpleNamespace) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done.lab / "results").iterdir()}
    again = hylo("lab", done.suite, "--out", done.lab, "--arms", "plain,reverse,stretched")
    assert again.returncode == 1 and "0 runs to do" in again.stdout  # the broken arm's record is still there
    assert {path: path.stat().st_mtime_ns for path in (done.lab / "results").iterdir()} == before
    listed = hylo("lab", done.suite, "--out", done.lab, "--dry-run")
    assert listed.returncode == 0 and "1 of 4 runs to do" in listed.stdout


def test_an_arm_is_what_upcycle_makes_of_its_recipe(done: SimpleNamespace, tmp_path: Path) -> None:
    alone = hylo("upcycle", done.lab / "recipes" / "reverse-seed-0.yaml", "--out", tmp_path / "run")
    assert alone.returncode == 0, alone.stderr
    extended = json.loads((tmp_path / "run" / "evaluations" / "extended.json").read_text())
    metrics = results(done.lab)["reverse-seed-0"]["metrics"]
    assert metrics["kl@256"] == extended["kl"]["256"] and metrics["needle@256"] == extended["needle"]["256"]


def test_results_of_another_recipe_are_not_taken(done: SimpleNamespace) -> None:
    text = done.suite.read_text()
    try:
        done.suite.write_text(text.replace("reverse_kl", "jsd"))
        refused = hylo("lab", done.suite, "--out", done.lab)
    finally:
        done.suite.write_text(text)
    assert refused.returncode == 2
    assert "reverse-seed-0.json is another recipe's (stages.1.objective" in refused.stderr


def test_a_signal_stops_the_runs_and_the_same_command_goes_on(
    done: SimpleNamespace, tmp_path: Path, tiny_base: Path, text_file: Path
) -> None:
    longer = {"stages.1.tokens": 64 * 100, "data.epochs": 50, "stages.1.save_every": 5}
    suite = write_suite(tmp_path / "suite", tiny_base, text_file, {"plain": {"set": longer}}, [3])
    lab = tmp_path / "lab"
    command = [sys.executable, "-m", "hylo", "lab", str(suite), "--out", str(lab)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    log = lab / "logs" / "plain-seed-3.log"
    deadline = time.monotonic() + 120
    while "extend to 32: step" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "go on with: hylo lab" in output
    assert not (lab / "results").exists()
    gone_on = hylo("lab", suite, "--out", lab)
    assert gone_on.returncode == 0, gone_on.stderr
    assert "extend to 32: going on after step" in log.read_text()
    assert results(lab)["plain-seed-3"]["status"] == "done"


def test_more_arms_than_the_disk_holds(done: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused = hylo("lab", done.suite, "--out", tmp_path / "new" / "lab")
    assert refused.returncode == 2 and not (tmp_path / "new").exists()
    assert "4 runs need up to 0.0 GiB, and the disk of" in refused.stderr and "--arms" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "none"], "--arms: none is none of the suite's arms; choose among plain, reverse"),
        (["--seeds", "a"], "--seeds a: write whole numbers"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_options(done: SimpleNamespace, arguments: list[str], message: str) -> None:
    refused = hylo("lab", done.suite, "--out", done.lab, *arguments)
    assert refused.returncode == 2 and message in refused.stderr


def test_two_at_once_in_one_laboratory(done: SimpleNamespace) -> None:
    from hylo.files import locked

    with locked(done.lab / ".lock", ""):
        refused = hylo("lab", done.suite, "--out", done.lab)
    assert refused.returncode == 2 and "another command is at work" in refused.stderr
