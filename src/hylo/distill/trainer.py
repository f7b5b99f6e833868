"""The training loop of both stages: transformers' Trainer, with rows in order and every step on record."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hylo.checkpoint import copy_companions
from hylo.data.rows import RowDataset
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.files import complete_directory

Rows = Callable[[int, int], RowDataset]  # (length, count) -> that many rows of that length


class StageTrainer(Trainer):
    """Trains `module` for `training.steps` steps; a loss that is not finite raises HyloError in its step."""

    def __init__(
        self,
        module: nn.Module,
        rows: Rows,
        training: Training,
        work: Path,
        metrics: StepMetrics,
        clip: float,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        dataset = rows(training.length, training.steps * training.rows)
        arguments = _arguments(training, work, clip)
        super().__init__(model=module, args=arguments, train_dataset=dataset, callbacks=[metrics, *(callbacks or [])])
        self.remove_callback(PrinterCallback)
        self.metrics = metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.measured(loss.item())
        return loss

    def measured(self, loss: float, layer_loss: list[float] | None = None) -> None:
        """Notes a step's figures before the optimizer moves; `layer_loss` names the layer of a loss gone wrong."""
        if not math.isfinite(loss):
            bad = [i for i, value in enumerate(layer_loss or []) if not math.isfinite(value)]
            where = f" of layer {bad[0]}" if bad else ""
            raise HyloError(
                f"the loss{where} is {loss} at step {self.state.global_step + 1}; "
                "lower learning_rate, or train with precision float32"
            )
        self.metrics.measured(loss, self.lr_scheduler.get_last_lr()[0], layer_loss)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; vectors (norms, biases, decay rates) do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # rows are random already


def _arguments(training: Training, work: Path, clip: float) -> TrainingArguments:
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
        max_grad_norm=clip,
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
