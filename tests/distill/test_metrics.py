"""What a stage tells: lines of JSON, the view on a terminal and elsewhere, trackers; and what a resume cuts back."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hylo.distill import hardware, metrics, tracking
from hylo.distill.hardware import Peak
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.view import clock
from hylo.errors import HyloError

TRAINING = Training(tokens=20 * 64, length=16, rows=4, learning_rate=1e-3)  # 20 steps of 64 tokens


class Clock:
    """Stands in for time.perf_counter: moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Clock:
    timer = Clock()
    monkeypatch.setattr("time.perf_counter", timer)
    return timer


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def at(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def take_step(stage: StepMetrics, timer: Clock, step: int, seconds: float = 2.0, **figures: Any) -> None:
    timer.now += seconds
    stage.measured(**{"loss": 10.0 / step, "learning_rate": 1e-3} | figures)
    stage.on_step_end(None, at(step), None)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class TestLines:
    def test_hold_a_steps_figures(self, tmp_path: Path, timer: Clock) -> None:
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1, losses={"forward_kl": 8.0, "cross_entropy": 20.0})
            take_step(stage, timer, 2, seconds=4.0, layer_loss=[3.0, 0.0, 2.0])
        first, second = lines(tmp_path)
        assert first.pop("memory") > 1 << 20
        assert first == {
            "step": 1,
            "loss": 10.0,
            "learning_rate": 1e-3,
            "losses": {"forward_kl": 8.0, "cross_entropy": 20.0},
            "tokens": 64,
            "tokens_per_second": 32.0,
            "seconds": 2.0,
        }
        assert "losses" not in second and second["layer_loss"] == [3.0, 0.0, 2.0]
        assert (second["tokens"], second["tokens_per_second"], second["seconds"]) == (128, 16.0, 6.0)

    def test_are_there_at_once(self, tmp_path: Path, timer: Clock) -> None:
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1)
            assert len(lines(tmp_path)) == 1

    def test_a_skipped_step_says_how_many_and_has_no_loss(self, tmp_path: Path, timer: Clock) -> None:
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1)
            timer.now += 1
            stage.skipped(1)
            stage.on_step_end(None, at(2), None)
            take_step(stage, timer, 3)
        assert [(line.get("skipped"), "loss" in line) for line in lines(tmp_path)] == [
            (None, True),
            (1, False),
            (None, True),
        ]

    def test_saving_is_no_part_of_a_steps_speed(self, tmp_path: Path, timer: Clock) -> None:
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1)
            timer.now += 30
            stage.on_save(None, at(1), None)
            take_step(stage, timer, 2)
        assert [line["tokens_per_second"] for line in lines(tmp_path)] == [32.0, 32.0]
        assert lines(tmp_path)[1]["seconds"] == 34.0

    def test_utilisation_is_of_all_devices_peak(
        self, tmp_path: Path, timer: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics, "peak_flops", lambda precision: Peak(100e9, measured=True))
        monkeypatch.setattr(metrics, "world_size", lambda: 4)
        console = quiet()
        with StepMetrics(tmp_path, "extend", TRAINING, console) as stage:
            stage.step_flops = 400e9
            stage.on_train_begin(None, at(0), None)
            for step in (1, 2):
                take_step(stage, timer, step)
        assert [line["utilisation"] for line in lines(tmp_path)] == [0.5, 0.5]
        assert "50 % of a matmul's 100 GFLOP/s" in printed(console)

    def test_of_several_processes_only_the_first_writes(
        self, tmp_path: Path, timer: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics, "is_main", lambda: False)
        console = quiet()
        with StepMetrics(tmp_path, "extend", TRAINING, console) as stage:
            stage.resume(None)
            stage.on_train_begin(None, at(0), None)
            for step in range(1, 21):
                take_step(stage, timer, step)
            stage.on_save(None, at(20), None)
        assert not list(tmp_path.iterdir()) and not printed(console)


class TestResume:
    def test_cuts_lines_back_to_the_checkpoint_and_goes_on(self, tmp_path: Path, timer: Clock) -> None:
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.resume(None)
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1)
            stage.skipped(1)
            take_step(stage, timer, 2)
            timer.now += 5
            position = json.loads(json.dumps(stage.position()))
            take_step(stage, timer, 3)
        (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # killed while writing
        timer.now += 1000
        console = quiet()
        with StepMetrics(tmp_path, "extend", TRAINING, console) as stage:
            stage.resume(position)
            stage.on_train_begin(None, at(2), None)
            take_step(stage, timer, 3, loss=7.0)
            assert stage.position()["bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
            take_step(stage, timer, 4)
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
        assert lines(tmp_path)[2]["loss"] == 7.0
        assert [line["seconds"] for line in lines(tmp_path)] == [2.0, 4.0, 11.0, 13.0]
        # Speed and time left are those of this call's two steps.
        assert "step 4 of 20, loss 2.5000, 32 tokens/s" in printed(console) and "32 s left" in printed(console)
        assert "1 batch skipped" in printed(console)

    def test_without_a_checkpoint_starts_again(self, tmp_path: Path, timer: Clock) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
            stage.resume(None)
            stage.on_train_begin(None, at(0), None)
            take_step(stage, timer, 1)
        assert [line.get("loss") for line in lines(tmp_path)] == [10.0]

    def test_tensorboard_hides_the_steps_that_are_taken_again(self, tmp_path: Path, timer: Clock) -> None:
        for first, losses in ((0, [4.0, 3.0, 2.0]), (1, [1.5])):
            with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
                stage.on_train_begin(None, at(first), None)
                for step, loss in enumerate(losses, first + 1):
                    take_step(stage, timer, step, loss=loss, layer_loss=[loss, 0.0], losses={"forward_kl": loss})
        events = EventAccumulator(str(tmp_path / "logs")).Reload()
        for name in ("loss", "layer_loss/0", "losses/forward_kl"):
            assert [(event.step, event.value) for event in events.Scalars(name)] == [(1, 4.0), (2, 1.5)]
        assert "seconds" not in events.Tags()["scalars"]


class TestView:
    def test_ten_lines_without_a_terminal(self, tmp_path: Path, timer: Clock) -> None:
        console = quiet()
        with StepMetrics(tmp_path, "extend to 64", TRAINING, console) as stage:
            stage.on_train_begin(None, at(0), None)
            for step in range(1, 21):
                take_step(stage, timer, step)
                if step == 10:
                    stage.on_save(None, at(10), None)
        shown = printed(console).splitlines()
        assert len(shown) == 10
        assert shown[0].startswith("extend to 64: step 2 of 20, loss 5.0000, 32 tokens/s, ")
        assert shown[0].endswith(" GiB, 36 s left") and "saved at step 10" in shown[5] and "saved" not in shown[4]

    def test_live_on_a_terminal(self, tmp_path: Path, timer: Clock) -> None:
        console = terminal()
        with StepMetrics(tmp_path, "align", TRAINING, console) as stage:
            stage.on_train_begin(None, at(0), None)
            losses = [0.0, *(i / 10 for i in range(1, 9))]
            parts = {"forward_kl": 1.25, "cross_entropy": 2.5}
            take_step(stage, timer, 1, seconds=200.0, layer_loss=losses, losses=parts)
            stage.on_save(None, at(1), None)
            stage.view.live.refresh()
        shown = printed(console)
        for part in ("align", "1 of 20", "1:03:20 left", "loss 10.0000", "forward_kl 1.2500", "cross_entropy 2.5000"):
            assert part in shown
        for part in ("learning rate 1.00e-03", " tokens/s", "0 ·", "8 0.8000 █", "1 0.1000 ▂"):
            assert part in shown
        assert (
            shown.rstrip().splitlines()[-1].endswith(" GiB, saved at step 1") and "align: step 1 of 20, loss" in shown
        )

    def test_nothing_measured_yet(self, tmp_path: Path, timer: Clock) -> None:
        console = terminal()
        with StepMetrics(tmp_path, "align", TRAINING, console) as stage:
            stage.view.live.refresh()
        assert "0 of 20" in printed(console)

    def test_clock(self) -> None:
        assert [clock(seconds) for seconds in (0, 61.4, 3600)] == ["0:00", "1:01", "1:00:00"]


class FakeTracker:
    """What trackio and wandb have in common, and what was asked of it."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> None:
        self.begun.append(arguments)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


class TestTrackers:
    @pytest.fixture(params=["trackio", "wandb"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def fake(self, name: str, monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
        fake = FakeTracker()
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    @pytest.fixture
    def stage(self, tmp_path: Path, timer: Clock) -> Iterator[Callable[[int], None]]:
        def run(step: int) -> None:
            with StepMetrics(tmp_path, "extend", TRAINING, quiet()) as stage:
                stage.on_train_begin(None, at(step - 1), None)
                take_step(stage, timer, step, losses={"forward_kl": 1.0})

        yield run

    def test_a_resumed_stage_goes_on_with_its_run(
        self, name: str, fake: FakeTracker, stage: Callable[[int], None]
    ) -> None:
        with tracking.tracked(name):
            stage(1)
            stage(2)
        stage(3)  # not asked for any more
        assert [step for step, _ in fake.logged] == [1, 2] and fake.finished == 2
        figures = fake.logged[0][1]
        assert figures["loss"] == 10.0 and figures["losses/forward_kl"] == 1.0 and "step" not in figures
        first, second = fake.begun
        assert first == second and first["resume"] == "allow" and first["config"]["rows"] == 4
        assert (first["id"] in first["name"]) if name == "wandb" else ("id" not in first)

    def test_another_stage_is_another_run(self, name: str, fake: FakeTracker, tmp_path: Path, timer: Clock) -> None:
        with tracking.tracked(name):
            for folder in (tmp_path / "a", tmp_path / "b"):
                folder.mkdir()
                with StepMetrics(folder, "extend", TRAINING, quiet()) as stage:
                    stage.on_train_begin(None, at(0), None)
        assert fake.begun[0]["name"] != fake.begun[1]["name"]

    def test_what_cannot_be_is_refused_at_once(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
        with pytest.raises(HyloError, match=rf"--track {name}: .*; pip install {name}"), tracking.tracked(name):
            pass
        with pytest.raises(HyloError, match="--track comet: there is no such tracker"), tracking.tracked("comet"):
            pass


class TestPeak:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        yield
        hardware.peak_flops.cache_clear()

    def test_a_cpus_is_measured_without_drawing_numbers(self) -> None:
        hardware.peak_flops.cache_clear()
        before = torch.get_rng_state()
        peak = hardware.peak_flops("float32")
        assert peak.measured and 1e8 < peak.flops < 1e15
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("gpu", "teraflops"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362)]
    )
    def test_a_gpus_is_its_data_sheets(self, gpu: str, teraflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
        hardware.peak_flops.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        peak = hardware.peak_flops("bf16")
        assert peak == (teraflops * 1e12, False) and peak.described() == f"{teraflops} TFLOP/s"
        assert hardware.peak_flops("float32").flops < peak.flops
