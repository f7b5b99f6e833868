"""A run that dies, at whatever instant, goes on to the very weights and figures of one that was left alone."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from hylo import files
from hylo.distill import checkpoints, resumable, signals
from hylo.distill.align import align
from hylo.distill.checkpoints import discard_finished, training_directory
from hylo.distill.extend import extend
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows, StageTrainer
from hylo.errors import HyloError

MakeTraining = Callable[..., Training]
Run = Callable[..., None]
STEPS = 7


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random state there is has a part in every step."""

    def spoilt(self: StageTrainer) -> list[float]:
        norms = clip(self)
        for group in self.groups:
            for parameter in group:
                parameter.grad += 1e-3 * torch.rand_like(parameter) * random.random() * np.random.rand()
        return norms

    clip = StageTrainer.clip_gradients
    monkeypatch.setattr(StageTrainer, "clip_gradients", spoilt)


@pytest.fixture(params=["align", "extend"])
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(
    stage: str, base_directory: Path, student_directory: Path, rows: Rows, training: MakeTraining, tmp_path: Path
) -> Run:
    """Runs the stage, a checkpoint every second step, in two passes a step."""

    def make(out: Path, rows: Rows = rows, console: Console | None = None, **changes: Any) -> None:
        settings = training(**{"tokens": STEPS * 64, "save_every": 2, "micro_rows": 2} | changes)
        if stage == "align":
            align(base_directory, student_directory, out, rows, settings, console or Console(quiet=True))
        else:
            extend(student_directory, base_directory, out, rows, settings, 8, console or Console(quiet=True))

    return make


def in_child(function: Callable[[], None], watch: Callable[[int], None] | None = None) -> int:
    """Runs it in a process of its own, which `watch` gets the id of; returns the exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with signals.watched():
                function()
            code = 0
        except signals.Stopped as stopped:
            code = 50 + (stopped.step or 0)
        except HyloError as error:
            Path(os.environ["SAID"]).write_text(str(error))
            code = 2
        finally:
            os._exit(code)
    if watch:
        watch(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def after_step(work: Path, step: int, number: int) -> Callable[[int], None]:
    """Sends a signal to a process once it has that many steps on record."""

    def watch(child: int) -> None:
        path, deadline = work / "metrics.jsonl", time.monotonic() + 60
        while not path.exists() or path.read_text().count("\n") < step:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(child, number)

    return watch


MEASURED = ("tokens_per_second", "utilisation", "memory", "seconds")


def curve(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines]


def result(out: Path) -> tuple[bytes, Any]:
    assert not training_directory(out).exists()
    figures = curve(out)
    assert [line["step"] for line in figures] == list(range(1, STEPS + 1))
    return (out / "model.safetensors").read_bytes(), [(line["loss"], line["learning_rate"]) for line in figures]


def test_a_killed_run_ends_as_an_undisturbed_one(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    out = tmp_path / "out"
    for step in (1, 2, 3, 6):
        run_out = lambda: run(out)  # noqa: E731
        assert in_child(run_out, after_step(training_directory(out), step, signal.SIGKILL)) == -signal.SIGKILL
        assert not out.exists()
    run(out)
    assert result(out) == result(tmp_path / "whole")


INSTANTS = [  # where the process dies, and in which call
    (resumable, "save_states", 1),
    (checkpoints, "save_file", 2),
    (checkpoints, "seal", 1),
    (checkpoints, "write_json", 3),  # the second checkpoint's list
    (checkpoints.os, "rename", 2),
    (checkpoints.shutil, "rmtree", 6),  # of an old checkpoint
    (checkpoints.shutil, "copyfile", 1),  # metrics.jsonl, into what becomes the result
    (files, "sync", 1),  # of the result, all written
    (checkpoints.shutil, "rmtree", 9),  # of what the stage worked in
]


@pytest.mark.parametrize("instant", INSTANTS, ids=lambda i: f"{i[1]}-{i[2]}")
def test_it_can_die_at_any_instant(
    run: Run, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: tuple[Any, str, int]
) -> None:
    module, name, call = instant
    out, calls, real = tmp_path / "out", [], getattr(module, name)

    def die(*arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **others)

    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, die)
        assert in_child(lambda: run(out)) == -signal.SIGKILL
    calls.clear()
    if out.exists():  # it died when only its traces were left to remove
        discard_finished(out)
    else:
        run(out)
    assert result(out) == result(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(run: Run, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    work = training_directory(out)
    code = in_child(lambda: run(out, save_every=100), after_step(work, 1, number))
    step = code - 50
    assert 1 <= step < STEPS
    assert [path.name for path in work.glob("checkpoint-*")] == [f"checkpoint-00000{step}"]
    assert [line["step"] for line in curve(work)] == list(range(1, step + 1))
    run(out, save_every=100)
    run(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_signal_in_the_last_step_still_writes_the_model(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def last() -> None:
        class Asking(Console):
            def print(self, *values: Any, **others: Any) -> None:
                if f"step {STEPS} of" in str(values[0]):
                    os.kill(os.getpid(), signal.SIGTERM)

        run(out, console=Asking(quiet=True))

    assert in_child(last) == 50  # stopped outside of training
    run(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_full_disk_leaves_the_last_good_checkpoint(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    work = training_directory(out)
    monkeypatch.setenv("SAID", str(said))
    assert in_child(lambda: run(out), after_step(work, 3, signal.SIGTERM)) > 50
    step = max(checkpoints.Checkpoints(work, 2).steps())
    before = (work / f"checkpoint-00000{step}" / "checksums.json").read_bytes()

    def short_of_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # bytes of a file: enough for records alone
        run(out)

    assert in_child(short_of_space) == 2
    assert f"free space, and the same command goes on from {work}/checkpoint-00000{step}" in said.read_text()
    assert "\n" not in said.read_text() and said.read_text().startswith("cannot write")
    assert not list(work.glob(".*")) and not out.exists()
    assert (work / f"checkpoint-00000{step}" / "checksums.json").read_bytes() == before
    run(out)
    run(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_two_runs_cannot_share_a_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def second(child: int) -> None:
        after_step(training_directory(out), 1, signal.SIGSTOP)(child)
        with pytest.raises(HyloError, match="another process is at work in"):
            run(out)
        os.kill(child, signal.SIGCONT)

    assert in_child(lambda: run(out), second) == 0
    assert out.exists()


def test_other_settings_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = training_directory(out)
    in_child(lambda: run(out), after_step(work, 3, signal.SIGKILL))
    with pytest.raises(
        HyloError, match="training.learning_rate is 0.005 there, 0.001 here; training.seed is 0 there, 1"
    ):
        run(out, learning_rate=1e-3, seed=1)
    assert checkpoints.worth_keeping(work)
    run(out, keep=5, save_every=3, bad_batches=0)  # these may change
    assert out.exists()


def test_a_damaged_checkpoint_is_named_and_left_out(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = training_directory(out)
    in_child(lambda: run(out), after_step(work, 5, signal.SIGKILL))
    newest = Path(sorted(map(str, work.glob("checkpoint-*")))[-1])
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    with Console(record=True, quiet=False, file=open(os.devnull, "w"), width=500) as console:
        run(out, console=console)
    said = console.export_text()
    assert f"{newest} is damaged: the checksum of model.safetensors is another" in said
    assert f"going on after step {int(newest.name[-6:]) - 2}" in said
    run(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


class TestBadBatches:
    """A batch without a finite loss is left out, and the run goes on."""

    @pytest.fixture
    def spoil(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def spoil(steps: set[int], gradient: bool = False) -> None:
            real = StageTrainer.losses_of

            def losses_of(trainer: StageTrainer, *arguments: Any) -> torch.Tensor:
                losses = real(trainer, *arguments)
                if trainer.state.global_step + 1 in steps and len(trainer.batches) == 1:
                    if gradient:
                        trainer.groups[0][0].grad.view(-1)[0] = float("nan")
                    else:
                        losses[0] = float("nan")
                return losses

            monkeypatch.setattr(StageTrainer, "losses_of", losses_of)

        return spoil

    @pytest.mark.parametrize("gradient", [False, True])
    def test_it_is_skipped_and_counted(
        self, run: Run, stage: str, tmp_path: Path, spoil: Callable[..., None], gradient: bool
    ) -> None:
        spoil({2, 5}, gradient)
        run(tmp_path / "out")
        lines = curve(tmp_path / "out")
        assert [line.get("skipped") for line in lines] == [None, 1, None, None, 2, None, None]
        assert all(np.isfinite(line["loss"]) for line in lines if line.get("loss") is not None)

    def test_the_weights_of_its_group_stay(
        self, run: Run, stage: str, tmp_path: Path, spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other layers' do not: each is on its own."""
        seen: list[list[torch.Tensor]] = []
        real = StageTrainer.close_step

        def close_step(trainer: StageTrainer) -> None:
            seen.append([group[0].detach().clone() for group in trainer.groups])
            real(trainer)

        monkeypatch.setattr(StageTrainer, "close_step", close_step)
        spoil({2})
        run(tmp_path / "out")
        assert torch.equal(seen[1][0], seen[2][0]) and not torch.equal(seen[2][0], seen[3][0])
        if stage == "align":
            assert not torch.equal(seen[1][1], seen[2][1])

    def test_the_count_survives(self, run: Run, tmp_path: Path, spoil: Callable[..., None]) -> None:
        spoil({1, 2, 6})
        out = tmp_path / "out"
        in_child(lambda: run(out), after_step(training_directory(out), 3, signal.SIGKILL))
        run(out)
        assert [line.get("skipped") for line in curve(out)] == [1, 2, None, None, None, 3, None]

    def test_too_many_are_refused(self, run: Run, tmp_path: Path, spoil: Callable[..., None]) -> None:
        spoil({2, 3, 6})
        with pytest.raises(HyloError, match=r"is nan at step 6 \(rows 20 to 23 of the stage, after 2 skipped\): "):
            run(tmp_path / "out", bad_batches=2)
        assert not (tmp_path / "out").exists()
