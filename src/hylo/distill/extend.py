"""Stage 2, long-context distillation: the hybrid learns the teacher's next-token distribution at a longer length.

The loss is the forward KL divergence from a frozen teacher, at temperature 1, averaged over every position, computed
from both models' final hidden states (hylo.ops.divergence); no cross-entropy (arXiv 2604.24715). YaRN stretches the MLA
layers' positions from `yarn_original` tokens to the length trained at. One call is one length. The teacher runs in
every step (`extend`), or has run before and left a cache (`extend_from_cache`): then the student's head is frozen.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hylo.distill.cache import TeacherCache
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.student import freeze_head, load_pair, load_student, read_head, stored_dtype
from hylo.distill.trainer import Rows, StageTrainer, stage_output
from hylo.modeling import HyloForCausalLM
from hylo.ops.divergence import cached_divergence, hidden_state_divergence


def extend(
    student: Path,
    teacher: Path,
    out: Path,
    rows: Rows,
    training: Training,
    yarn_original: int,
    console: Console | None = None,
    frozen_head: bool = False,
) -> None:
    """Distils `teacher` into the model in `student` at `training.length` tokens and saves it as `out`.

    Everything trains, but the head if it is to be frozen. `rows(length, count)` gives the training rows. The saved
    configuration supports the length, with YaRN's factor training.length / yarn_original. Raises HyloError if the
    vocabularies differ, if the length exceeds the teacher's context, or if a loss or a gradient is not finite.
    """
    # A large teacher need not be held in float32 if it was never stored so.
    teacher_dtype = stored_dtype(teacher) if training.precision == "bf16" else torch.float32
    model, teacher_model = load_pair(student, teacher, training, teacher_dtype)
    if frozen_head:
        freeze_head(model, read_head(student))
    _prepare(model, training, yarn_original)
    with stage_output(model, student, out, f"extend to {training.length}", training, console) as (work, metrics):
        ExtendTrainer(LongDistillation(model), teacher_model, rows, training, work, metrics).train()


def extend_from_cache(
    student: Path,
    cache: Path,
    out: Path,
    training: Training,
    yarn_original: int,
    rows: Rows | None = None,
    console: Console | None = None,
) -> None:
    """As `extend` with a frozen head, but with what a teacher left in `cache` (hylo.distill.cache_writer) in its place.

    Needs no text: the cache holds its rows. `rows`, if given, must be the same. Raises HyloError, before any training,
    if the cache is damaged, incomplete, or was made with another head, tokenizer, data order, packing or length.
    """
    held = TeacherCache(cache)
    held.check_order(length=training.length, rows=training.rows, tokens=training.tokens)
    head = held.check_student(student)
    held.verify(rows, console)
    model = load_student(student)
    freeze_head(model, head)
    _prepare(model, training, yarn_original)
    with stage_output(model, student, out, f"extend to {training.length}", training, console) as (work, metrics):
        distillation = CachedDistillation(model, held.recipe.vocabulary)
        ExtendTrainer(distillation, None, held.dataset, training, work, metrics).train()


class LongDistillation(nn.Module):
    """The student as stage 2 sees it: calling it gives the divergence from the teacher's hidden states."""

    def __init__(self, student: HyloForCausalLM) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids_BT: Tensor, teacher_hidden_BTD: Tensor, teacher_head_VD: Tensor) -> Tensor:
        hidden_BTD = self.student.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_state_divergence(
            hidden_BTD.flatten(0, 1), self.student.lm_head.weight, teacher_hidden_BTD.flatten(0, 1), teacher_head_VD
        )


class CachedDistillation(nn.Module):
    """The same from a cache: calling it gives the divergence from the teacher's vectors and negative entropies."""

    def __init__(self, student: HyloForCausalLM, vocabulary: int) -> None:
        super().__init__()
        self.student, self.vocabulary = student, vocabulary

    def forward(self, input_ids_BT: Tensor, vectors_BTD: Tensor, neg_entropy_BT: Tensor) -> Tensor:
        hidden_BTD = self.student.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        head_VD = self.student.lm_head.weight[: self.vocabulary]
        return cached_divergence(hidden_BTD.flatten(0, 1), head_VD, vectors_BTD.flatten(0, 1), neg_entropy_BT.flatten())


class ExtendTrainer(StageTrainer):
    """The Trainer's own step; the teacher stays outside of the model that it trains and saves."""

    def __init__(
        self,
        distillation: LongDistillation | CachedDistillation,
        teacher: PreTrainedModel | None,
        rows: Rows,
        training: Training,
        work: Path,
        metrics: StepMetrics,
    ) -> None:
        groups = [[parameter for parameter in distillation.parameters() if parameter.requires_grad]]
        super().__init__(distillation, teacher, rows, training, work, metrics, groups)

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], backward: bool = True, only: int | None = None
    ) -> Tensor:
        loss = Trainer.training_step(self, model, inputs) if backward else self.compute_loss(model, inputs)
        return loss[None]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        if self.teacher is None:
            cached: Tensor = model(inputs["input_ids"], inputs["vectors"], inputs["neg_entropy"])
            return cached
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = self.teacher.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        loss: Tensor = model(inputs["input_ids"], teacher_hidden, self.teacher.lm_head.weight)
        return loss


def _prepare(model: HyloForCausalLM, training: Training, yarn_original: int) -> None:
    model.config.extend_context(training.length, yarn_original)
    if training.gradient_checkpointing:
        # transformers gave the method a new name after 5.19.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
