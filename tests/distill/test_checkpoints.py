"""Checkpoints are whole or absent, hold what changes and nothing else, and the last good one stays."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from hylo.distill.checkpoints import (
    Checkpoints,
    claimed,
    discard_finished,
    gather_optimizer,
    gather_state,
    load_optimizer,
    load_state,
    read_states,
    save_states,
    training_directory,
)
from hylo.errors import HyloError

QUIET = Console(quiet=True)


def write(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        with checkpoints.write(step) as folder:
            (folder / "weights").write_bytes(b"0" * step)


def test_the_newest_few_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest(QUIET) is None
    write(checkpoints, 5, 10, 999_999, 1_000_000)
    assert checkpoints.steps() == [999_999, 1_000_000]
    assert checkpoints.newest(QUIET) == tmp_path / "checkpoint-1000000"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1000000", "checkpoint-999999"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "no list", "bad list"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path: Path, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 1, 2)
    weights = tmp_path / "checkpoint-000002" / "weights"
    match harm:
        case "flip":
            weights.write_bytes(b"01")
        case "cut":
            weights.write_bytes(b"0")
        case "remove":
            weights.unlink()
        case "no list":
            weights.with_name("checksums.json").unlink()
        case "bad list":
            weights.with_name("checksums.json").write_text("{")
    console = Console(record=True, width=500, file=open("/dev/null", "w"))
    assert checkpoints.newest(console) == tmp_path / "checkpoint-000001"
    said = console.export_text()
    assert f"checkpoint {weights.parent} is damaged" in said and said.count("\n") == 1
    assert harm not in ("flip", "cut", "remove") or "weights" in said
    write(checkpoints, 2)  # in its place
    assert checkpoints.steps() == [1, 2]


def test_nothing_starts_again_unasked_when_all_are_damaged(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 3)
    (tmp_path / "checkpoint-000003" / "weights").unlink()
    with pytest.raises(HyloError, match="every checkpoint in .* is damaged; remove it"):
        checkpoints.newest(QUIET)
    assert checkpoints.steps() == [3]


def test_a_failed_write_leaves_the_last_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 1)
    with pytest.raises(OSError), checkpoints.write(2) as folder:
        (folder / "weights").write_bytes(b"0")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert checkpoints.newest(QUIET) is not None


def test_what_changes_is_saved_and_put_back(tmp_path: Path) -> None:
    def make() -> tuple[nn.Sequential, torch.optim.AdamW]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step(model: nn.Sequential, optimizer: torch.optim.AdamW, seed: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, 1)
    weights = gather_state(model)
    assert sorted(weights) == sorted(name for name in model.state_dict() if not name.startswith("0."))
    save_states(tmp_path, weights, gather_optimizer(optimizer), {"last": 1})
    again, fresh = make()
    load_state(again, tmp_path)
    moments, schedule = read_states(tmp_path)
    load_optimizer(fresh, moments)
    assert schedule == {"last": 1}
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(again, fresh, seed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_working_directory_belongs_to_one_run(tmp_path: Path) -> None:
    work = training_directory(tmp_path / "out")
    assert work == tmp_path / "out.training"
    identity = {"stage": "align", "training": {"seed": 0, "betas": [0.9, 0.95]}}
    with claimed(work, identity):
        (work / ".checkpoint-000001.partial").mkdir()
    assert not work.exists()  # nothing that would be missed
    with claimed(work, identity):
        write(Checkpoints(work, 2), 1)
    other = {"stage": "align", "training": {"seed": 1, "betas": [0.9, 0.99]}, "rows": {"seed": 3}}
    match = "training.seed is 0 there, 1 here; training.betas.1 is 0.95 there, 0.99 here; rows is None there"
    with pytest.raises(HyloError, match=match), claimed(work, other):
        raise AssertionError
    assert json.loads((work / "stage.json").read_text()) == identity
    (work / ".stage.json.partial-1").touch()
    with claimed(work, identity):
        assert sorted(path.name for path in work.iterdir()) == ["checkpoint-000001", "lock", "stage.json"]


def test_what_a_finished_stage_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    training_directory(out).mkdir()
    discard_finished(out)
    assert training_directory(out).exists()
    out.mkdir()
    discard_finished(out)
    assert not training_directory(out).exists()
