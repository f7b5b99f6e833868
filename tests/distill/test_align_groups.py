"""Stage 1 a few layers at a time: the result of all at once, with less memory, and nothing lost when it stops."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from window_rows import WindowRows

from hylo.convert import convert
from hylo.convert.assemble import assemble
from hylo.distill import signals
from hylo.distill.align import align
from hylo.distill.checkpoints import training_directory
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.plan import make_plan

MakeTraining = Callable[..., Training]
BuildStudent = Callable[[PreTrainedModel, list[str]], HyloForCausalLM]
CHILD = Path(__file__).parents[1] / "helpers" / "aligning_child.py"
MEASURED = ("tokens_per_second", "seconds", "memory", "utilisation")


@pytest.fixture
def student(base: LlamaForCausalLM, build_student: BuildStudent, tmp_path: Path) -> Path:
    """Every layer is to be aligned, the last one too, with which the final norm goes."""
    build_student(base, ["gated_deltanet", "mla", "mamba2"]).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def by_layer(training: MakeTraining) -> MakeTraining:
    return lambda **changes: training(**{"objective": "layers", "clip": 0.05, "save_every": 4} | changes)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "metrics.jsonl"}


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_end_as_all_layers_at_once_do(
    base_directory: Path, student: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining, at_once: int
) -> None:
    align(base_directory, student, tmp_path / "all", rows, by_layer(), quiet())
    out = tmp_path / "groups"
    align(base_directory, student, out, rows, by_layer(layers_at_once=at_once), quiet())
    assert files(out) == files(tmp_path / "all")
    assert not training_directory(out).exists()
    spans = ["layers-00-00", "layers-01-01", "layers-02-02"] if at_once == 1 else ["layers-00-01", "layers-02-02"]
    assert sorted(path.name for path in (out / "logs").iterdir()) == spans
    for ours, theirs in zip(read_metrics(out), read_metrics(tmp_path / "all"), strict=True):
        assert ours["layer_loss"] == theirs["layer_loss"] and all(ours["layer_loss"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert all(ours[key] == theirs[key] for key in ("step", "tokens", "learning_rate"))
        assert ours["seconds"] > 0 and ours["tokens_per_second"] > 0 and ours.keys() == theirs.keys()


def test_layers_that_are_the_bases_own_are_copied(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining
) -> None:
    for name, at_once in (("all", None), ("one", 1)):
        align(base_directory, student_directory, tmp_path / name, rows, by_layer(layers_at_once=at_once), quiet())
    assert files(tmp_path / "one") == files(tmp_path / "all")
    assert read_metrics(tmp_path / "one")[0]["layer_loss"][2] == 0.0


class Disturbed:
    """Rows that run `happens` when the second group reads row 21, of step 6; rows are read a step ahead."""

    def __init__(self, rows: Rows, happens: Callable[[], None]) -> None:
        self.rows, self.happens, self.calls = rows, happens, 0

    def __call__(self, length: int, count: int) -> Any:
        self.calls += 1
        call, rows, happens = self.calls, self.rows(length, count), self.happens

        class Watched(WindowRows):
            def __init__(self) -> None:
                pass

            def __len__(self) -> int:
                return len(rows)  # type: ignore[arg-type]

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                if call == 2 and index == 21:
                    happens()
                return rows[index]

        return Watched()


def fail() -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("how", ["error", "signal"])
def test_a_run_goes_on_with_the_unfinished_group(
    base_directory: Path, student: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining, how: str
) -> None:
    settings, out = by_layer(layers_at_once=1), tmp_path / "out"
    align(base_directory, student, tmp_path / "undisturbed", rows, settings, quiet())
    disturbed = Disturbed(rows, fail if how == "error" else lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(RuntimeError if how == "error" else signals.Stopped), signals.watched():
        align(base_directory, student, out, disturbed, settings, quiet())
    assert not out.exists()
    assert sorted(path.name for path in (training_directory(out) / "groups").iterdir()) == [
        "layers-00-00",
        "layers-01-01.training",
    ]
    done = (training_directory(out) / "groups/layers-00-00/model.safetensors").stat().st_mtime_ns

    seen: list[int] = []

    def once_more(length: int, count: int) -> Any:
        groups = training_directory(out) / "groups"
        seen.append((groups / "layers-00-00/model.safetensors").stat().st_mtime_ns)
        return rows(length, count)

    with (tmp_path / "log").open("w") as log:
        align(base_directory, student, out, once_more, settings, Console(file=log, width=200))
    assert seen == [done, done]  # the second group and the third
    assert f"going on after step {4 if how == 'error' else 5}" in (tmp_path / "log").read_text()
    assert files(out) == files(tmp_path / "undisturbed")
    for ours, theirs in zip(read_metrics(out), read_metrics(tmp_path / "undisturbed"), strict=True):
        assert {k: v for k, v in ours.items() if k not in MEASURED} == {
            k: v for k, v in theirs.items() if k not in MEASURED
        }


def test_a_finished_group_whose_leftovers_are_there_is_not_trained_again(
    base_directory: Path, student: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining
) -> None:
    settings, out = by_layer(layers_at_once=1), tmp_path / "out"
    with pytest.raises(RuntimeError):
        align(base_directory, student, out, Disturbed(rows, fail), settings, quiet())
    groups = training_directory(out) / "groups"
    shutil.copytree(groups / "layers-01-01.training", groups / "layers-00-00.training")  # killed before it was removed
    calls: list[int] = []
    align(base_directory, student, out, lambda *a: calls.append(1) or rows(*a), settings, quiet())  # type: ignore[func-returns-value]
    assert len(calls) == 2


def test_another_grouping_is_another_stage(
    base_directory: Path, student: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        align(base_directory, student, out, Disturbed(rows, fail), by_layer(layers_at_once=1), quiet())
    with pytest.raises(HyloError, match="training.layers_at_once is 1 there, 2 here"):
        align(base_directory, student, out, rows, by_layer(layers_at_once=2), quiet())


def test_memory_is_the_base_and_one_groups_training(
    build_base: Callable[..., LlamaForCausalLM], build_student: BuildStudent, tmp_path: Path
) -> None:
    arguments: list[Any] = []
    wide = {"hidden_size": 128, "intermediate_size": 4096}
    for name, layers, widths, at_once in (("warm-up", 1, {}, [1]), ("wide", 5, wide, [1, 5])):
        base = build_base(num_hidden_layers=layers, **widths)
        base.save_pretrained(tmp_path / name)
        build_student(base, ["mla"] * layers).save_pretrained(tmp_path / f"{name}-student")
        for k in at_once:
            arguments += [tmp_path / name, tmp_path / f"{name}-student", tmp_path / f"{name}-{k}", k]
    command = [sys.executable, str(CHILD), *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    _, one, whole = map(int, child.stdout.split())
    weights = sum(parameter.nbytes for parameter in base.model.layers.parameters())
    state = 4 * weights / layers  # a layer's weights, gradients, and Adam's two moments
    slack = 1.5 * state
    assert one < weights + state + slack
    assert whole > weights + layers * state


def test_two_whole_students_hold_every_layout(
    base_directory: Path, tmp_path: Path, rows: Rows, by_layer: MakeTraining
) -> None:
    """A hybrid picked from an all-MLA and an all-linear student, each aligned, is the hybrid aligned itself."""
    for layout in ("3MLA", "3GDN", "1MLA2GDN"):
        convert(base_directory, tmp_path / layout, make_plan(base_directory, layout, [1] if "1" in layout else None))
        align(base_directory, tmp_path / layout, tmp_path / f"{layout}-aligned", rows, by_layer(), quiet())
    assemble(tmp_path / "3MLA-aligned", tmp_path / "3GDN-aligned", tmp_path / "picked", [1])
    assert files(tmp_path / "picked") == files(tmp_path / "1MLA2GDN-aligned")


def test_documents_in_a_row_do_not_see_each_other(
    base: LlamaForCausalLM, base_directory: Path, student: Path, tmp_path: Path, by_layer: MakeTraining
) -> None:
    """The loss of a packed row is that of its documents, each alone."""
    stream = np.random.default_rng(0).integers(0, 64, 16)
    lengths = (10, 6)

    def packed(length: int, count: int) -> Any:
        row = {"input_ids": torch.from_numpy(stream), "position_ids": torch.cat([torch.arange(n) for n in lengths])}
        return [row] * count

    def alone(begin: int, end: int) -> Rows:
        return lambda length, count: [{"input_ids": torch.from_numpy(stream[begin:end])}] * count  # type: ignore[return-value]

    def first_losses(name: str, rows: Any, length: int) -> Tensor:
        settings = by_layer(tokens=length, length=length, rows=1)
        align(base_directory, student, tmp_path / name, rows, settings, quiet())
        return torch.tensor(read_metrics(tmp_path / name)[0]["layer_loss"])

    together = first_losses("packed", packed, 16)
    first, second = first_losses("first", alone(0, 10), 10), first_losses("second", alone(10, 16), 6)
    torch.testing.assert_close(together, (10 * first + 6 * second) / 16, rtol=1e-4, atol=1e-5)
    unaware = first_losses("unaware", alone(0, 16), 16)
    assert (together - unaware).abs().min() > 1e-3
