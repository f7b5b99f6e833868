"""transformers' TrainingArguments for a stage, in one process or in several."""

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.parallel import world_size

Arguments = TypeVar("Arguments", bound=TrainingArguments)  # TRL's trainers have kinds of their own


def training_arguments(
    training: Training, work: Path, kind: type[Arguments] = TrainingArguments, **more: Any
) -> Arguments:
    """A step's `training.rows` split into rows at once on a device, devices, and passes whose gradients are added up.

    The Trainer saves, logs, clips and shards nothing by itself: hylo.distill.trainer and hylo.distill.sharding do.
    Raises HyloError if the rows cannot be shared out evenly.
    """
    micro_rows = rows_at_once(training)
    cuda = torch.cuda.is_available()
    return kind(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=training.rows // (micro_rows * world_size()),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=min(math.ceil(training.warmup * training.steps), training.steps - 1),
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        weight_decay=training.weight_decay,
        max_grad_norm=0.0,
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
        **more,
    )


def rows_at_once(training: Training) -> int:
    """Rows of a forward pass on one device: `micro_rows`, or a device's whole share of the step."""
    devices = world_size()
    micro_rows = training.micro_rows or training.rows // devices
    if micro_rows == 0 or training.rows % (micro_rows * devices):
        at_once = f" of {training.micro_rows} rows at once" if training.micro_rows else ""
        raise HyloError(f"rows {training.rows} cannot be shared out to {devices} devices{at_once}; change rows")
    return micro_rows
