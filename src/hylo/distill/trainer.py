"""The training loop of our own stages: transformers' Trainer, with rows in order and every step on record."""

import contextlib
import errno
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.utils import logging

from hylo.checkpoint import copy_companions, model_hash
from hylo.distill import signals
from hylo.distill.arguments import training_arguments
from hylo.distill.checkpoints import Checkpoints, claimed, training_directory, write_errors
from hylo.distill.finite import bad_weight, find_culprit
from hylo.distill.metrics import StepMetrics
from hylo.distill.resumable import Resumable
from hylo.distill.settings import Training
from hylo.distill.sharding import leave_to_us, place, whole_state
from hylo.errors import HyloError
from hylo.files import complete_directory
from hylo.modeling import HyloForCausalLM
from hylo.parallel import any_process, barrier, from_main, is_main

Rows = Callable[[int, int], Dataset[dict[str, Tensor]]]  # (length, count) -> that many rows of that length

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, None)  # None: write_errors' own
FREE = {"name", "save_every", "keep", "bad_batches"}  # settings that a run may go on with others of


class StageTrainer(Resumable):
    """Trains `module.student` for `training.steps` steps, each of `groups` of weights clipped to a norm of its own.

    Weights that are not finite raise HyloError before the optimizer moves; of a loss or a gradient that is not, the
    step is skipped (hylo.distill.resumable), until there are too many: then the tensor is named. Losses belong to the
    `layers`, one for each group, or to `objectives`, names with the weights that they have in the sum.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: PreTrainedModel | None,
        rows: Rows,
        training: Training,
        work: Path,
        metrics: StepMetrics,
        groups: list[list[nn.Parameter]],
        layers: list[int] | None = None,
        objectives: dict[str, float] | None = None,
    ) -> None:
        leave_to_us(module)
        super().__init__(
            model=module,
            args=training_arguments(training, work),
            train_dataset=rows(training.length, training.steps * training.rows),
            work=work,
            metrics=metrics,
            training=training,
            groups=groups,
        )
        student = module.get_submodule("student")
        assert isinstance(student, HyloForCausalLM)
        self.student, self.layers, self.objectives, self.teacher = student, layers, objectives, teacher
        metrics.computes(student.config, teacher and teacher.config, layers)
        place(student, self.args.device)
        if teacher is not None:
            place(teacher, self.args.device)

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], backward: bool = True, only: int | None = None
    ) -> Tensor:
        """One pass over `inputs`: its losses, detached, each the mean over all positions of the pass and weighted as in
        the sum that is minimised: one for each of `layers` (or `only` that of one group), or of `objectives`.

        Gradients come of `self.backward(loss)`.
        """
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """The backward pass of one of the passes that a step accumulates, all of the same size."""
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)

    def losses_of(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        model.train()
        return self.forward_and_backward(model, inputs) / self.current_gradient_accumulation_steps

    def group_loss(self, losses: list[float], group: int) -> float:
        return sum(losses) if self.layers is None else losses[group]

    def close_step(self) -> None:
        super().close_step()
        if self.state.global_step == 0 and (found := bad_weight(self.student)):  # some infinities train, to no end
            raise HyloError(f"{found} at step 1; restore the student's weights")

    def skip(self, bad: list[int], what: str, value: float) -> None:
        models = (self.student, self.teacher) if self.state.global_step == 0 else ()
        if any(bad_weight(model) for model in models if model is not None):
            self.refuse(what, bad[0], value)
        super().skip(bad, what, value)

    def measured(self, losses: list[float]) -> None:
        rate = self.lr_scheduler.get_last_lr()[0]
        if self.layers is not None:
            by_layer = dict(zip(self.layers, losses, strict=True))
            layer_loss = [by_layer.get(i, 0.0) for i in range(len(self.student.model.layers))]
            self.metrics.measured(sum(losses), rate, layer_loss=layer_loss)
        elif self.objectives is not None:
            parts = {name: loss / weight for (name, weight), loss in zip(self.objectives.items(), losses, strict=True)}
            self.metrics.measured(sum(losses), rate, losses=parts)
        else:
            self.metrics.measured(sum(losses), rate)

    def refuse(self, what: str, group: int, value: float) -> NoReturn:
        """Raises HyloError that names the first tensor that is not finite, in the group's layer if it has one."""
        among, only, where = None, None, ""
        if self.layers is not None:
            among, only, where = self.groups[group], group, f" of layer {self.layers[group]}"

        def replay(backward: bool) -> None:
            for inputs in self.batches:
                self.forward_and_backward(self.model_wrapped, inputs, backward, only)

        cause = find_culprit(self.student, self.teacher, replay, among)
        damaged = self.state.global_step == 0 and " holds " in cause
        mend = "restore the weights" if damaged else "lower learning_rate, or train with precision float32"
        raise HyloError(f"the {what}{where} is {value} at {self.where()}: {cause}; {mend}")

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; vectors (norms, biases, decay rates) do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # rows are random already


@contextlib.contextmanager
def stage_output(
    model: PreTrainedModel,
    student: Path,
    out: Path,
    name: str,
    training: Training,
    console: Console | None,
    identity: dict[str, Any] | None = None,
) -> Iterator[tuple[Path, StepMetrics]]:
    """A folder for the Trainer to work in and the step metrics; when the block ends well, `out` appears, complete.

    `out` holds the trained model, the tokenizer's files from the directory `student`, metrics.jsonl and logs/. Until
    then all is in OUT.training, from where the same call goes on. `identity`, JSON values, says what else must be equal
    for that: the rows and the teacher; the student and the settings are added to it.
    """
    console = console or Console()
    identity = stage_identity(name, training, student) | (identity or {})
    with stage_directory(out, identity, functools.partial(write_model, model, student)) as work:
        with StepMetrics(work, name, training, console) as metrics:
            yield work, metrics


@contextlib.contextmanager
def stage_directory(out: Path, identity: dict[str, Any], write: Callable[[Path], None]) -> Iterator[Path]:
    """OUT.training, held for this process, to work in; when the block ends well, `write` fills what becomes `out`.

    In several processes each calls it, and `write`. Raises HyloError if `out` exists, if OUT.training is of a run of
    another identity or in use, or if the disk is full; Stopped after a signal, from the block or once `out` is written.
    """
    work = training_directory(out)
    with contextlib.ExitStack() as stack:
        if is_main():
            if out.exists():
                raise HyloError(f"{out} exists already; choose another output directory or remove it")
            stack.enter_context(claimed(work, identity))
            for leftover in out.parent.glob(f".{out.name}.partial-*"):
                shutil.rmtree(leftover)
        barrier()
        stack.enter_context(signals.held())
        with _full_disk(work, work):
            yield work
        with complete_directory(out) if is_main() else contextlib.nullcontext() as partial, _full_disk(out, work):
            folder = from_main(partial)
            write(folder)
            if is_main():
                for record in ("metrics.jsonl", "logs"):
                    _copy(work / record, folder / record)
        if is_main():
            shutil.rmtree(work)
        if any_process(signals.requested()):  # it may have reached one of them only
            raise signals.Stopped


def stage_identity(name: str, training: Training, student: Path) -> dict[str, Any]:
    """What must be equal for a stage to go on where it stopped, in JSON values."""
    return {"stage": name, "student": model_hash(student), "training": training.model_dump(mode="json", exclude=FREE)}


def write_model(model: PreTrainedModel, student: Path, folder: Path) -> None:
    """The model, and the tokenizer's files from the directory `student`. OSError on a full disk."""
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with write_errors():
            state = whole_state(model)
            if is_main():
                model.save_pretrained(folder, state_dict=state)
    finally:
        if bar:
            logging.enable_progress_bar()
    if is_main():
        copy_companions(student, folder)


@contextlib.contextmanager
def _full_disk(what: Path, work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        held = Checkpoints(work, 1)
        then = f"goes on from {held.path(held.steps()[-1])}" if held.steps() else "starts again"
        reason = error.strerror or error
        raise HyloError(f"cannot write {what}: {reason}; free space, and the same command {then}") from error


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to)
    elif path.exists():
        shutil.copyfile(path, to)
