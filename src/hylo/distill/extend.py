"""Stage 2, long-context distillation: the hybrid learns the teacher's next-token distribution at a longer length.

The loss is the forward KL divergence from a frozen teacher, at temperature 1, averaged over every position, computed
from both models' final hidden states (hylo.ops.divergence); no cross-entropy (arXiv 2604.24715). YaRN stretches the MLA
layers' positions from `yarn_original` tokens to the length trained at. One call is one length.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.student import load_pair, stored_dtype
from hylo.distill.trainer import Rows, StageTrainer, stage_output
from hylo.modeling import HyloForCausalLM
from hylo.ops.divergence import hidden_state_divergence


def extend(
    student: Path,
    teacher: Path,
    out: Path,
    rows: Rows,
    training: Training,
    yarn_original: int,
    console: Console | None = None,
) -> None:
    """Distils `teacher` into the model in `student` at `training.length` tokens and saves it as `out`.

    Everything trains. `rows(length, count)` gives the training rows. The saved configuration supports the length, with
    YaRN's factor training.length / yarn_original. Raises HyloError if the vocabularies differ, if the length exceeds
    the teacher's context, or if a loss is not finite.
    """
    # A large teacher need not be held in float32 if it was never stored so.
    teacher_dtype = stored_dtype(teacher) if training.precision == "bf16" else torch.float32
    model, teacher_model = load_pair(student, teacher, training, teacher_dtype)
    model.config.extend_context(training.length, yarn_original)
    if training.gradient_checkpointing:
        # transformers gave the method a new name after 5.19.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with stage_output(model, student, out, f"extend to {training.length}", training, console) as (work, metrics):
        ExtendTrainer(LongDistillation(model), teacher_model, rows, training, work, metrics).train()


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


class ExtendTrainer(StageTrainer):
    """The Trainer's own step; the teacher stays outside of the model that it trains and saves."""

    def __init__(
        self,
        distillation: LongDistillation,
        teacher: PreTrainedModel,
        rows: Rows,
        training: Training,
        work: Path,
        metrics: StepMetrics,
    ) -> None:
        super().__init__(distillation, rows, training, work, metrics, clip=training.clip)
        self.teacher = teacher.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = self.teacher.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        loss: Tensor = model(inputs["input_ids"], teacher_hidden, self.teacher.lm_head.weight)
        return loss
