"""What every Trainer of ours can do: go on from its newest checkpoint, stop on a signal, and skip a bad batch."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from hylo.distill import signals
from hylo.distill.checkpoints import (
    Checkpoints,
    gather_optimizer,
    gather_state,
    load_optimizer,
    load_state,
    read_states,
    save_states,
)
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.sharding import clip_grad_norm
from hylo.errors import HyloError
from hylo.files import read_json, write_json
from hylo.parallel import any_process, is_main

PROGRESS = "progress.json"


class Resumable(Trainer):
    """A mixin: `class OurTrainer(Resumable, DPOTrainer)`, made with the arguments of the other and those named here.

    `train()` goes on from the newest whole checkpoint in `work`, writes one every `training.save_steps` steps and when
    SIGTERM or SIGINT came (hylo.distill.signals), and then raises Stopped. Each of `groups` of weights, by default one
    of all that train, is clipped to a norm of its own; a group whose loss or gradient is not finite keeps its weights
    in that step, and the step counts as skipped. More than `training.bad_batches` of those raise HyloError.

    The arguments must leave saving, logging and clipping alone: save_strategy="no", logging_strategy="no",
    max_grad_norm=0, report_to="none".
    """

    def __init__(
        self,
        *arguments: Any,
        work: Path,
        metrics: StepMetrics,
        training: Training,
        groups: list[list[nn.Parameter]] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        self.training, self.metrics = training, metrics
        self.checkpoints = Checkpoints(work, training.keep)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if groups is None:
            groups = [[parameter for parameter in self.model.parameters() if parameter.requires_grad]]
        self.group_names = [[names[id(parameter)] for parameter in group] for group in groups]
        self.groups = groups
        self.skipped, self.stopped = 0, False
        self.batches: list[dict[str, Tensor]] = []  # of the step, one for every pass that it accumulates
        self.step_losses = torch.zeros(0)  # their sum
        self.remove_callback(PrinterCallback)
        self.add_callback(metrics)
        self.add_callback(_Steps(self))

    def train(self, *arguments: Any, **others: Any) -> Any:
        """Trains to the end, from wherever the last run was saved. Raises Stopped after a signal."""
        checkpoint = self.checkpoints.newest(self.metrics.console)
        progress: dict[str, Any] = {"skipped": 0, "metrics": None}
        if checkpoint is not None:
            progress = read_json(checkpoint / PROGRESS, "progress")
            step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
            if is_main():
                self.metrics.console.print(f"{self.metrics.name}: going on after step {step}", highlight=False)
        self.skipped = progress["skipped"]
        self.metrics.resume(progress["metrics"])
        result = super().train(*arguments, resume_from_checkpoint=checkpoint and str(checkpoint), **others)
        if self.stopped:
            raise signals.Stopped(self.state.global_step, self.checkpoints.path(self.state.global_step))
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        self.batches.append(inputs)
        losses = self.losses_of(model, inputs, num_items_in_batch)
        self.step_losses = losses if len(self.batches) == 1 else self.step_losses + losses
        return losses.sum()

    def losses_of(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        """One forward and backward pass; its losses, detached, which over the step's passes add up to the step's."""
        return super().training_step(model, inputs, num_items_in_batch)[None]

    def group_loss(self, losses: list[float], group: int) -> float:
        """The part of a step's losses that trains a group."""
        return sum(losses)

    def close_step(self) -> None:
        """After the last backward pass of a step: clips, drops what is not finite, and notes the figures."""
        losses: list[float] = self.accelerator.reduce(self.step_losses, "mean").tolist()
        norms = self.clip_gradients()
        parts = [self.group_loss(losses, group) for group in range(len(self.groups))]
        bad = [group for group, pair in enumerate(zip(parts, norms, strict=True)) if not all(map(math.isfinite, pair))]
        if bad:
            what = "gradient norm" if math.isfinite(parts[bad[0]]) else "loss"
            self.skip(bad, what, norms[bad[0]] if what == "gradient norm" else parts[bad[0]])
        if all(map(math.isfinite, losses)):
            self.measured(losses)

    def clip_gradients(self) -> list[float]:
        """Clips the gradient of every group, and returns the norms that they had."""
        return torch.stack([clip_grad_norm(group, self.training.clip) for group in self.groups]).tolist()

    def skip(self, bad: list[int], what: str, value: float) -> None:
        """Drops the gradients of these groups, so that the optimizer leaves them alone, and counts the step."""
        self.skipped += 1
        if self.skipped > self.training.bad_batches:
            self.refuse(what, bad[0], value)
        for group in bad:
            for parameter in self.groups[group]:
                parameter.grad = None
        self.metrics.skipped(self.skipped)

    def refuse(self, what: str, group: int, value: float) -> NoReturn:
        raise HyloError(f"the {what} is {value} at {self.where()}; lower learning_rate, or look at those rows")

    def where(self) -> str:
        """The step that is under way, how many were skipped before, and the rows of the stage that it reads."""
        step, rows = self.state.global_step + 1, self.training.rows
        before = f", after {self.skipped - 1} skipped" if self.skipped > 1 else ""
        return f"step {step} (rows {(step - 1) * rows} to {step * rows - 1} of the stage{before})"

    def measured(self, losses: list[float]) -> None:
        self.metrics.measured(sum(losses), self.lr_scheduler.get_last_lr()[0])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """The Trainer's own norm, over all weights, would cost a pass over them and spread one group's NaN to all."""

    # The Trainer calls these with its own ideas of files; ours are in hylo.distill.checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        with self.checkpoints.write(self.state.global_step) as folder:
            weights, moments = gather_state(self.model), gather_optimizer(self.optimizer)
            self._save_rng_state(str(folder))
            if is_main():
                save_states(folder, weights, moments, self.lr_scheduler.state_dict())
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                write_json(folder / PROGRESS, {"skipped": self.skipped, "metrics": self.metrics.position()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_state(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            moments, schedule = read_states(Path(checkpoint))
            load_optimizer(self.optimizer, moments)
            self.lr_scheduler.load_state_dict(schedule)


class _Steps(TrainerCallback):
    """Tells a Resumable where a step begins and ends, and the Trainer when to save and to stop."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer  # sharding puts other parameters in their places
        parameters = dict(trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters())
        trainer.groups = [[parameters[name] for name in names] for names in trainer.group_names]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.batches.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.close_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = any_process(signals.requested())
        if state.global_step == state.max_steps:
            return  # what follows is the model itself, and a stop after that
        if stop or state.global_step % self.trainer.training.save_steps == 0:
            control.should_save = True
        if stop:
            control.should_training_stop = self.trainer.stopped = True
