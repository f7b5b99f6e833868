"""Stage 2, long-context distillation: the hybrid learns the teacher's next-token distribution at a longer length.

The objective (hylo.distill.objectives) is by default the forward KL divergence from a frozen teacher, averaged over
every position, without cross-entropy (arXiv 2604.24715). YaRN stretches the MLA layers' positions from `yarn_original`
tokens to the length trained at. One call is one length. The teacher runs in every step, has run before and left a cache
(`extend_from_cache`), or is not needed.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo import parallel
from hylo.checkpoint import model_hash
from hylo.distill.batch import model_inputs
from hylo.distill.cache import TeacherCache
from hylo.distill.cache_writer import CacheSettings, write_teacher_cache
from hylo.distill.metrics import StepMetrics
from hylo.distill.objectives import JSD_BETA, CachedDistillation, LongDistillation, TeacherStates
from hylo.distill.settings import Training
from hylo.distill.student import choose_weights, load_student, load_teacher
from hylo.distill.trainer import Rows, StageTrainer, stage_output
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM


def extend(
    student: Path,
    teacher: Path | None,
    out: Path,
    rows: Rows,
    training: Training,
    yarn_original: int | None,
    console: Console | None = None,
    cache: Path | None = None,
) -> None:
    """Distils `teacher` into the model in `student` at `training.length` tokens and saves it as `out`.

    `rows(length, count)` gives the training rows. With `training.teacher` cache, the teacher first writes `cache`,
    unless that is there. The saved configuration supports the length, with the YaRN factor that training names. Raises
    HyloError if the vocabularies differ, if the length exceeds the teacher's context, or if losses are not finite.
    """
    if training.teacher_source == "cache":
        if cache is None:
            raise HyloError("teacher: cache needs a directory for the cache; name one, or write teacher: live")
        if not cache.exists() and parallel.is_main():
            if teacher is None:
                raise HyloError(f"teacher cache {cache} does not exist, and there is no teacher to write it; give one")
            write_teacher_cache(teacher, student, cache, rows, CacheSettings.of(training), console)
        parallel.barrier()
        return extend_from_cache(student, cache, out, training, yarn_original, rows, console)
    model, live = load_student(student), None
    identity = {"rows": getattr(rows, "identity", None), "yarn_original": yarn_original}
    if training.teacher_source == "live":
        if teacher is None:
            raise HyloError(f"objective {' + '.join(training.objective)} needs a teacher; give one")
        live = load_teacher(teacher, student, training)
        identity["teacher"] = model_hash(teacher)
    prepare(model, student, training, yarn_original)
    name = f"extend to {training.length}"
    with stage_output(model, student, out, name, training, console, identity) as (work, metrics):
        distillation = LongDistillation(model, training.objective, training.beta or JSD_BETA)
        ExtendTrainer(distillation, live, rows, training, work, metrics).train()


def extend_from_cache(
    student: Path,
    cache: Path,
    out: Path,
    training: Training,
    yarn_original: int | None,
    rows: Rows | None = None,
    console: Console | None = None,
) -> None:
    """As `extend` with the head frozen, but with what a teacher left in `cache` (hylo.distill.cache_writer).

    Needs no text: the cache holds its rows. `rows`, if given, must be the same. Raises HyloError, before any training,
    if the cache is damaged, incomplete, or was made with another head, tokenizer, data order, packing or length.
    """
    held = TeacherCache(cache)
    held.check_order(length=training.length, rows=training.rows, tokens=training.tokens)
    held.check_student(student)
    held.verify(rows, console)
    model = load_student(student)
    prepare(model, student, training, yarn_original)
    identity = {"cache": held.recipe.model_dump(), "rows": held.manifest.order, "yarn_original": yarn_original}
    name = f"extend to {training.length}"
    with stage_output(model, student, out, name, training, console, identity) as (work, metrics):
        distillation = CachedDistillation(model)
        ExtendTrainer(distillation, None, held.dataset, training, work, metrics).train()


def prepare(model: HyloForCausalLM, student: Path, training: Training, yarn_original: int | None) -> None:
    """Positions for the length trained at, the weights that train, and checkpointing, as `training` says."""
    factor = 1.0 if training.positions == "unscaled" else training.yarn_factor
    if training.yarn_factor is not None and model.config.positions != "rope":
        raise HyloError(f"yarn factor: positions {model.config.positions} of {student} have nothing to stretch")
    model.config.extend_context(training.length, yarn_original, factor)
    model.config.trained_at(training.length)
    choose_weights(model, student, training.trains)
    if training.gradient_checkpointing:
        # transformers gave the method a new name after 5.19.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


class ExtendTrainer(StageTrainer):
    """Takes the student through the rows; the teacher stays outside of the model that is trained and saved."""

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
        weights = {str(name): weight for name, weight in training.objective.items()}
        super().__init__(distillation, teacher, rows, training, work, metrics, groups, objectives=weights)
        self.weights = list(weights.values())

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], backward: bool = True, only: int | None = None
    ) -> Tensor:
        values_K: Tensor = model(inputs) if self.teacher is None else model(inputs, self.teacher_states(inputs))
        losses_K = values_K * values_K.new_tensor(self.weights)
        if backward:
            self.backward(losses_K.sum())
        return losses_K.detach()

    def teacher_states(self, inputs: dict[str, Tensor]) -> TeacherStates:
        assert self.teacher is not None
        with torch.no_grad(), self.accelerator.autocast():
            hidden = self.teacher.model(**model_inputs(inputs), use_cache=False).last_hidden_state
        return TeacherStates(hidden, self.teacher.lm_head.weight)
