"""The training loop of both stages: transformers' Trainer, with rows in order and every step on record."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hylo.checkpoint import copy_companions
from hylo.distill.finite import bad_weight, find_culprit
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.files import complete_directory
from hylo.modeling import HyloForCausalLM

Rows = Callable[[int, int], Dataset[dict[str, Tensor]]]  # (length, count) -> that many rows of that length


class StageTrainer(Trainer):
    """Trains `module.student` for `training.steps` steps, each of `groups` of weights clipped to a norm of its own.

    A loss or a gradient that is not finite raises HyloError before the optimizer moves, and names the tensor.
    `layers` are those that the groups, and the losses given to `measured`, belong to.
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
    ) -> None:
        dataset = rows(training.length, training.steps * training.rows)
        arguments = _arguments(training, work)
        clip = ClipEachGroup(groups, training.clip, self.refuse_gradient)
        super().__init__(model=module, args=arguments, train_dataset=dataset, callbacks=[metrics, clip])
        self.remove_callback(PrinterCallback)
        student = module.get_submodule("student")
        assert isinstance(student, HyloForCausalLM)
        self.student, self.metrics, self.groups, self.layers = student, metrics, groups, layers
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.batch: dict[str, Tensor] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass, with the step's figures noted, before the optimizer moves."""
        self.batch = inputs
        model.train()
        losses = self.forward_and_backward(model, inputs)
        total = losses.sum()
        self.measured(total.item(), losses.tolist())
        return total

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], backward: bool = True, only: int | None = None
    ) -> Tensor:
        """The losses, one for each of `groups` (or `only` one of them), detached; gradients are where Adam looks."""
        raise NotImplementedError

    def measured(self, loss: float, losses: list[float]) -> None:
        if not math.isfinite(loss):
            group = next((i for i, value in enumerate(losses) if not math.isfinite(value)), 0)
            self.refuse("loss", group, loss)
        if self.state.global_step == 0 and (found := bad_weight(self.student)):  # some infinities train, to no end
            raise HyloError(f"{found} at step 1; restore the student's weights")
        self.metrics.measured(loss, self.lr_scheduler.get_last_lr()[0], self.layer_losses(losses))

    def layer_losses(self, losses: list[float]) -> list[float] | None:
        """What metrics.jsonl shows for each layer of the model."""
        if self.layers is None:
            return None
        by_layer = dict(zip(self.layers, losses, strict=True))
        return [by_layer.get(i, 0.0) for i in range(len(self.student.model.layers))]

    def refuse_gradient(self, norm: float) -> NoReturn:
        self.refuse("gradient norm", None, norm)

    def refuse(self, what: str, group: int | None, value: float) -> NoReturn:
        """Raises HyloError that names the first tensor that is not finite, in the group's layer if it has one."""
        among, only, where = None, None, ""
        if group is not None and self.layers is not None:
            among, only, where = self.groups[group], group, f" of layer {self.layers[group]}"
        step = self.state.global_step + 1

        def replay(backward: bool) -> None:
            self.forward_and_backward(self.model_wrapped, self.batch, backward, only)

        cause = find_culprit(self.student, self.teacher, replay, among)
        damaged = step == 1 and " holds " in cause
        mend = "restore the weights" if damaged else "lower learning_rate, or train with precision float32"
        raise HyloError(f"the {what}{where} is {value} at step {step}: {cause}; {mend}")

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; vectors (norms, biases, decay rates) do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # rows are random already


class ClipEachGroup(TrainerCallback):
    """Clips every group's gradient to its own norm; `refuse(norm)` is called with one that is not finite.

    It does not say which: the Trainer, which looks at the gradient before, has by then spread NaN over all of them.
    """

    def __init__(self, groups: list[list[nn.Parameter]], clip: float, refuse: Callable[[float], NoReturn]) -> None:
        self.groups, self.clip, self.refuse = groups, clip, refuse

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norms = [nn.utils.clip_grad_norm_(parameters, self.clip) for parameters in self.groups]
        for norm in torch.stack(norms).tolist():
            if not math.isfinite(norm):
                self.refuse(norm)


def _arguments(training: Training, work: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.rows,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=min(math.ceil(training.warmup * training.steps), training.steps - 1),
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        weight_decay=training.weight_decay,
        max_grad_norm=0.0,  # ClipEachGroup does it
        bf16=training.precision == "bf16",
        seed=training.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


@contextlib.contextmanager
def stage_output(
    model: PreTrainedModel, student: Path, out: Path, name: str, training: Training, console: Console | None
) -> Iterator[tuple[Path, StepMetrics]]:
    """A folder for the Trainer to work in and the step metrics; when the block ends well, `out` appears, complete.

    `out` holds the trained model, the tokenizer's files from the directory `student`, metrics.jsonl and logs/.
    """
    with complete_directory(out) as partial:
        work = partial / "trainer"
        with StepMetrics(partial, name, training, console or Console()) as metrics:
            yield work, metrics
        shutil.rmtree(work, ignore_errors=True)
        _save(model, partial)
        copy_companions(student, partial)


def _save(model: PreTrainedModel, partial: Path) -> None:
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(partial)
    except SafetensorError as error:  # what safetensors raises on a full disk
        raise OSError(str(error)) from error
    finally:
        if bar:
            logging.enable_progress_bar()
