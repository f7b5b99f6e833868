"""Checkpoints of a stage in progress, in OUT.training beside OUT: whole and checked, or not there.

    lock               held by the process at work
    stage.json         what must be equal for a run to go on
    metrics.jsonl  logs/
    checkpoint-000020/ model.safetensors (what trains, and buffers), optimizer.pt, scheduler.pt, rng_state.pth,
                       trainer_state.json, progress.json, checksums.json

A checkpoint is written under another name, its files' sizes and checksums last, flushed to the disk, then renamed.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hylo.distill.sharding import gathered, shared_out
from hylo.errors import HyloError
from hylo.files import checksum, differences, locked, read_json, sync, write_json
from hylo.parallel import barrier, from_main, is_main

LOCK, IDENTITY, CHECKSUMS, WEIGHTS = "lock", "stage.json", "checksums.json", "model.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
NAME = re.compile(r"checkpoint-(\d{6,})")
SHOWN = 6  # differences that an error line lists


class Checkpoints:
    """The checkpoints of one directory, of which the newest `keep` stay. In several processes, all of them call it."""

    def __init__(self, work: Path, keep: int) -> None:
        self.work, self.keep = work, keep

    def path(self, step: int) -> Path:
        return self.work / f"checkpoint-{step:06d}"

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, good or not, the oldest first."""
        names = [NAME.fullmatch(path.name) for path in self.work.glob("checkpoint-*")]
        return sorted(int(name[1]) for name in names if name)

    @contextlib.contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yields a folder that becomes the checkpoint of `step`, after which older ones go. OSError on a full disk."""
        out = self.path(step)
        partial = self.work / f".{out.name}.partial"
        try:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier()
            with write_errors():
                yield partial
            barrier()
            if is_main():
                seal(partial)
                os.rename(partial, out)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old))
        finally:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)

    def newest(self, console: Console) -> Path | None:
        """The newest whole checkpoint; damaged ones that are newer are named and removed. None if there is none at all.

        Raises HyloError if all are damaged.
        """
        return from_main(self._newest(console) if is_main() else None)

    def _newest(self, console: Console) -> Path | None:
        steps = self.steps()
        damaged: list[Path] = []
        for step in reversed(steps):
            path = self.path(step)
            problem = damage(path)
            if problem is None:
                for other in damaged:
                    shutil.rmtree(other)
                return path
            console.print(f"checkpoint {path} is damaged: {problem}; going back to the one before", highlight=False)
            damaged.append(path)
        if damaged:
            raise HyloError(f"every checkpoint in {self.work} is damaged; remove it to start the stage again")
        return None


def seal(folder: Path) -> None:
    """Writes checksums.json and flushes everything to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(checksum, paths))
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": value}
        for path, value in zip(paths, sums, strict=True)
    }
    write_json(folder / CHECKSUMS, listed)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; every byte is read."""
    try:
        listed = read_json(folder / CHECKSUMS, "list of checksums")
    except HyloError as error:
        return str(error).split(";")[0]
    for name, file in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {file['bytes']}"
        if checksum(path) != file["sha256"]:
            return f"the checksum of {name} is another"
    return None


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """What changes in training: the weights that train and the buffers that a state dict holds, whole.

    In several processes all of them call it, and likewise `gather_optimizer`.
    """
    changing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers()}
    return gathered({name: tensor for name, tensor in model.state_dict().items() if name in changing})


def gather_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    return gathered(optimizer.state_dict())


def save_states(folder: Path, weights: dict[str, Tensor], moments: dict[str, Any], schedule: dict[str, Any]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    torch.save(moments, folder / OPTIMIZER)
    torch.save(schedule, folder / SCHEDULER)


def read_states(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's and the schedule's, on the CPU."""
    moments, schedule = (torch.load(folder / name, "cpu", weights_only=True) for name in (OPTIMIZER, SCHEDULER))
    return moments, schedule


def load_state(model: nn.Module, folder: Path) -> None:
    """Puts back what `gather_state` gave."""
    saved = load_file(folder / WEIGHTS)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(shared_out(tensor, own[name]))


def load_optimizer(optimizer: Optimizer, moments: dict[str, Any]) -> None:
    """Puts back what `gather_optimizer` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: shared_out(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in moments["state"].items()
    }
    optimizer.load_state_dict(moments | {"state": state})


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Turns what safetensors and torch.save raise on a full disk into OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(str(error).split("\n")[0]) from error


def training_directory(out: Path) -> Path:
    """Where a stage works until `out` is written."""
    return out.with_name(f"{out.name}.training")


def discard_finished(out: Path) -> None:
    """Removes what a stage worked in, if `out` is there: a process may be killed between the two."""
    if out.exists():
        shutil.rmtree(training_directory(out), ignore_errors=True)


@contextlib.contextmanager
def claimed(work: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Holds a working directory for this process, and for the run that `identity`, JSON values, describes.

    Raises HyloError if another process holds it, or if what is there is of a run with another identity. What a run
    without any checkpoint leaves is removed.
    """
    work.mkdir(parents=True, exist_ok=True)
    busy = f"another process is at work in {work}; wait for it, or choose another output"
    with locked(work / LOCK, busy):
        for leftover in work.glob(".*.partial*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        path = work / IDENTITY
        if not worth_keeping(work):
            shutil.rmtree(work / "logs", ignore_errors=True)
        elif path.exists() and (found := differences(read_json(path, "description"), identity)):
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise HyloError(
                f"{work} holds a stage of other settings ({'; '.join(found[:SHOWN])}{more}); "
                f"go on with those, or remove it to start again"
            )
        write_json(path, identity)
        try:
            yield
        finally:
            if not worth_keeping(work):
                shutil.rmtree(work, ignore_errors=True)


def worth_keeping(work: Path) -> bool:
    """Whether a working directory holds more than the records of steps that would be run again."""
    records = (LOCK, IDENTITY, "metrics.jsonl", "logs")
    kept = [path for path in work.glob("*") if not path.name.startswith(".") and path.name not in records]
    return any(path.is_file() or any(path.iterdir()) for path in kept)
