"""hylo status: what a run's files say about how far it is."""

import fcntl
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hylo.distill import checkpoints
from hylo.distill.checkpoints import Checkpoints, claimed, training_directory
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.files import locked, write_json
from hylo.recipe import Recipe, dump_recipe
from hylo.run_directory import LOCK
from hylo.status import print_status, run_status

STAGE = {"tokens": 100 * 64, "length": 16, "rows": 4, "learning_rate": 1e-3}  # 100 steps of 64 tokens


def make_run(run: Path, **changes: Any) -> Path:
    run.mkdir()
    values = {
        "base": "/models/base",
        "layout": "1MLA2GDN",
        "data": {"text": ["/text.txt"]},
        "yarn_original_length": 16,
        "stages": [STAGE | {"objective": "layers"}, STAGE | {"name": "long"}],
        "evaluate": {"lengths": [16]},
    }
    (run / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(values | changes)))
    return run


def record(directory: Path, steps: int, seconds: float = 2.0, **last: Any) -> None:
    """metrics.jsonl of a stage that takes so many seconds a step."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "loss": 8.0 / step, "tokens": 64 * step, "tokens_per_second": 1.0, "seconds": seconds * step}
        for step in range(1, steps + 1)
    ]
    lines[-1] |= last
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def begin(out: Path, steps: int, **last: Any) -> Path:
    """The working directory of a stage that was begun, with a checkpoint at every tenth step."""
    work = training_directory(out)
    record(work, steps, **last)
    write_json(work / checkpoints.IDENTITY, {"training": Training.model_validate(STAGE).model_dump(mode="json")})
    saved = Checkpoints(work, 5)
    for step in range(10, steps + 1, 10):
        with saved.write(step) as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
    return work


def states(found: dict[str, Any]) -> dict[str, str]:
    return {part["name"]: part["state"] for part in found["parts"]}


def part_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(part for part in found["parts"] if part["name"] == name)


def shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=150)
    print_status(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_that_stopped_in_a_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run")
    (run / "converted").mkdir()
    record(run / "aligned", 100)
    work = begin(run / "long", 37, losses={"forward_kl": 0.5})
    found = run_status(run)
    assert states(found) == {
        "convert": "done",
        "aligned": "done",
        "long": "stopped",
        "evaluate": "to come",
        "report": "to come",
    }
    assert (found["alive"], found["finished"]) == (False, False)
    assert found["command"] == f"hylo upcycle '{run}/recipe.yaml' --out '{run}'"
    stage = part_of(found, "long")
    assert (stage["step"], stage["steps"], stage["skipped"]) == (37, 100, 0)
    assert (stage["loss"], stage["losses"]) == (8.0 / 37, {"forward_kl": 0.5})
    assert (stage["tokens_per_second"], stage["seconds_left"]) == (32.0, 126.0)
    assert stage["checkpoint"] == str(work / "checkpoint-000030")
    assert "seconds_left" not in part_of(found, "aligned") and part_of(found, "aligned")["step"] == 100
    text = shown(found)
    assert "37 of 100" in text and "2:06" in text and "step 30" in text
    assert "no process is at work" in text and f"to go on: {found['command']}" in text
    assert json.loads(json.dumps(found)) == found


def test_a_stage_at_work(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    work = begin(run / "aligned", 5)
    with (work / checkpoints.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = run_status(run)
    assert found["alive"] and part_of(found, "aligned")["state"] == "in progress"
    text = shown(found)
    assert "a process is at work" in text and "to go on" not in text
    assert not run_status(run)["alive"]


def test_a_run_at_work_between_stages_is_at_its_first_missing_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with locked(run / LOCK, "busy"):
        assert states(run_status(run))["convert"] == "in progress"
        (run / "converted").mkdir()
        record(run / "aligned", 100)
        record(run / "long", 100)
        (run / "evaluations").mkdir()
        for name in ("teacher", "converted"):
            (run / "evaluations" / f"{name}.json").write_text("{}")
        found = run_status(run)
        assert states(found)["evaluate"] == "in progress" and states(found)["report"] == "to come"
        assert (part_of(found, "evaluate")["step"], part_of(found, "evaluate")["steps"]) == (2, 4)
    assert states(run_status(run))["evaluate"] == "stopped"


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("converted", "evaluations"):
        (run / name).mkdir()
    for name in ("aligned", "long"):
        record(run / name, 100)
    for name in ("teacher", "converted", "aligned", "extended"):
        (run / "evaluations" / f"{name}.json").write_text("{}")
    (run / "report.html").write_text("")
    found = run_status(run)
    assert found["finished"] and "command" not in found and "finished" in shown(found)


def test_controls_have_stages_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", controls=True, teacher="/models/teacher")
    begin(run / "no_alignment" / "long", 20)
    found = run_status(run)
    assert list(states(found)) == [
        "convert",
        "aligned",
        "long",
        "control/convert",
        "control/long",
        "no_alignment/long",
        "evaluate",
        "report",
    ]
    assert states(found)["no_alignment/long"] == "stopped" and states(found)["control/long"] == "to come"
    assert part_of(found, "evaluate")["steps"] == 7


def test_skipped_steps_are_counted_however_long_ago(tmp_path: Path) -> None:
    record(tmp_path / "out", 60)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    for at, count in ((3, 1), (7, 2)):
        lines[at] = json.dumps(json.loads(lines[at]) | {"skipped": count})
    (tmp_path / "out" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert run_status(tmp_path / "out")["parts"][0]["skipped"] == 2


def test_speed_is_that_of_the_last_steps(tmp_path: Path) -> None:
    """Also of a stage that was slower before, and with a line that is being written."""
    work = begin(tmp_path / "out", 30, seconds=99.0)
    with (work / "metrics.jsonl").open("a") as file:
        for step in range(31, 51):
            file.write(json.dumps({"step": step, "loss": 1.0, "tokens": 64 * step, "seconds": 5000.0 + step}) + "\n")
        file.write('{"step": 51, "lo')
    found = run_status(tmp_path / "out")
    (stage,) = found["parts"]
    assert (stage["step"], stage["tokens_per_second"], stage["seconds_left"]) == (50, 64.0, 50.0)
    assert found["command"] is None and "the command that it was begun with, again" in shown(found)


def test_one_step_is_enough(tmp_path: Path) -> None:
    begin(tmp_path / "out", 1)
    (stage,) = run_status(tmp_path / "out")["parts"]
    assert (stage["tokens_per_second"], stage["seconds_left"]) == (32.0, 198.0)


def test_a_stage_that_has_just_begun(tmp_path: Path) -> None:
    identity = {"training": Training.model_validate(STAGE).model_dump(mode="json")}
    with claimed(training_directory(tmp_path / "out"), identity):
        found = run_status(tmp_path / "out")
    assert found["alive"] and found["parts"][0]["steps"] == 100 and "loss" not in found["parts"][0]
    assert "0 of 100" in shown(found)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    work = begin(tmp_path / "out", 30)
    (work / "checkpoint-000030" / "model.safetensors").write_bytes(b"wei")
    (work / "checkpoint-000020" / checkpoints.CHECKSUMS).unlink()
    assert run_status(tmp_path / "out")["parts"][0]["checkpoint"] == str(work / "checkpoint-000010")


def test_alignment_by_groups_shows_the_group_at_work(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    begin(run / "aligned", 1)
    (training_directory(run / "aligned") / "metrics.jsonl").unlink()
    groups = training_directory(run / "aligned") / "groups"
    record(groups / "layers-00-01", 100)
    begin(groups / "layers-02-03", 40)
    stage = part_of(run_status(run), "aligned")
    assert (stage["group"], stage["step"]) == ("layers-02-03", 40)
    assert stage["checkpoint"].endswith("layers-02-03.training/checkpoint-000040")
    assert "aligned, layers-02-03" in shown(run_status(run))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match=r"nothing holds no run; give the --out of hylo upcycle"):
        run_status(tmp_path / "nothing")
