"""Alignment a few layers at a time: memory holds the base and one group's layers, not those of the whole student.

    OUT.training/groups/layers-00-03/           a finished group: its weights and metrics.jsonl
    OUT.training/groups/layers-04-07.training/  the group at work, with its checkpoints

Layers do not know of each other, so that every group ends with the weights that it would have had among all.
"""

import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hylo.checkpoint import Weights, copy_companions
from hylo.convert.assemble import write_directory
from hylo.convert.memory import release_freed
from hylo.convert.write import ShardWriter
from hylo.distill import signals
from hylo.distill.checkpoints import discard_finished, write_errors
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.sharding import gathered
from hylo.distill.trainer import stage_directory
from hylo.files import write_text
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.parallel import any_process, from_main, is_main

GROUPS = "groups"
Train = Callable[[Sequence[int], Path, StepMetrics], HyloForCausalLM]
Origins = dict[str, Mapping[str, Tensor] | Weights]  # a weight's name -> where it is read


@dataclass(frozen=True)
class LayerStage:
    """An alignment: `train(layers, work, metrics)` trains some layers of `student` and returns a model with those.

    `config` is that of the model to be written, `identity` what must be equal for a run to go on.
    """

    student: Path
    config: HyloConfig
    training: Training
    identity: dict[str, Any]
    console: Console
    train: Train

    def run(self, layers: list[int], out: Path) -> None:
        """Trains the layers, all together or in groups, and writes `out`: what did not train is the student's."""
        origins: Origins = {}
        at_once = self.training.layers_at_once or len(layers)
        groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
        with stage_directory(out, self.identity, lambda folder: self.write(origins, folder)) as work:
            if len(groups) == 1:
                with StepMetrics(work, "align", self.training, self.console) as metrics:
                    state = gathered(self.train(layers, work, metrics).state_dict())
                origins |= dict.fromkeys(state, state)
                return
            folders = [self.run_group(group, work) for group in groups]
            for folder in folders:
                weights = Weights(folder)
                origins |= dict.fromkeys(weights.shapes, weights)
            if is_main():
                merge_records(folders, work)

    def run_group(self, layers: list[int], work: Path) -> Path:
        """Trains a group, unless that is done; returns where it is."""
        span = f"{layers[0]:02d}-{layers[-1]:02d}"
        folder = work / GROUPS / f"layers-{span}"
        state: dict[str, Tensor] = {}

        def write(partial: Path) -> None:
            if is_main():
                with write_errors():
                    writer = ShardWriter(partial, torch.float32)
                    for name in list(state):
                        writer.add(name, state.pop(name))
                    writer.finish()

        if is_main():
            discard_finished(folder)
        if from_main(folder.exists()):
            return folder
        with stage_directory(folder, self.identity | {"layers": layers}, write) as group_work:
            with StepMetrics(group_work, f"align layers {span}", self.training, self.console) as metrics:
                state |= gathered(self.train(layers, group_work, metrics).state_dict())
        gc.collect()  # trainer, optimizer and model refer to each other
        release_freed()
        if any_process(signals.requested()):
            raise signals.Stopped
        return folder

    def write(self, origins: Origins, folder: Path) -> None:
        if is_main():
            start = Weights(self.student)
            self.config.dtype = torch.float32
            self.config.architectures = [HyloForCausalLM.__name__]
            with write_errors():
                write_directory(folder, self.config, lambda name: origins.get(name, start)[name])
            copy_companions(self.student, folder)


def merge_records(folders: list[Path], work: Path) -> None:
    """metrics.jsonl of a stage from its groups', as if all layers had trained at once, and TensorBoard's events."""
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    skipped, merged = 0, []
    for steps in zip(*lines, strict=True):
        skipped += any("skipped" in step for step in steps)
        merged.append(json.dumps(merged_step(steps, skipped)) + "\n")
    write_text(work / "metrics.jsonl", "".join(merged))
    for folder in folders:
        if (folder / "logs").exists():
            shutil.copytree(folder / "logs", work / "logs" / folder.name, dirs_exist_ok=True)


def merged_step(steps: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """One step of all groups: losses and seconds add up, as does the time that a token takes; memory is the most."""
    step = {key: steps[0][key] for key in ("step", "tokens")}
    if all("loss" in one for one in steps):
        step |= {"loss": sum(one["loss"] for one in steps), "learning_rate": steps[0]["learning_rate"]}
        step["layer_loss"] = [sum(losses) for losses in zip(*(one["layer_loss"] for one in steps), strict=True)]
    if any("skipped" in one for one in steps):
        step["skipped"] = skipped
    times = [1 / one["tokens_per_second"] for one in steps]
    step["tokens_per_second"] = round(1 / sum(times), 1)
    shares = [time / sum(times) for time in times]
    step["utilisation"] = round(sum(share * one["utilisation"] for share, one in zip(shares, steps, strict=True)), 4)
    step["memory"] = max(one["memory"] for one in steps)
    return step | {"seconds": round(sum(one["seconds"] for one in steps), 3)}
