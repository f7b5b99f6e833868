"""Loading a student and its teacher, and checking that the one can learn from the other."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.files import read_json
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model


def load_pair(
    student: Path, teacher: Path, training: Training, teacher_dtype: torch.dtype = torch.float32
) -> tuple[HyloForCausalLM, PreTrainedModel]:
    """The student to train, in float32, and the teacher, frozen.

    Raises HyloError if `student` is no hylo model, if the vocabularies differ, or if the teacher's context is short.
    """
    model = load_model(student, dtype=torch.float32)
    if not isinstance(model, HyloForCausalLM):
        raise HyloError(f"{student} holds a {model.config.model_type} model, not a hylo one; convert it first")
    frozen = load_model(teacher, dtype=teacher_dtype).requires_grad_(False).eval()
    _check_vocabulary(model, frozen, student, teacher)
    longest = frozen.config.max_position_embeddings
    if training.length > longest:
        raise HyloError(
            f"sequences of {training.length} tokens exceed the {longest} of {teacher}; train on shorter ones"
        )
    return model, frozen


def _check_vocabulary(model: PreTrainedModel, frozen: PreTrainedModel, student: Path, teacher: Path) -> None:
    ours, theirs = model.config.vocab_size, frozen.config.vocab_size
    if ours != theirs:
        raise HyloError(
            f"{teacher} has a vocabulary of {theirs} and {student} one of {ours}; choose a teacher of the same family"
        )
    tokenizers = [directory / "tokenizer.json" for directory in (student, teacher)]
    if all(path.exists() for path in tokenizers):
        first, second = (Tokenizer.from_file(str(path)).get_vocab() for path in tokenizers)
        if first != second:
            raise HyloError(
                f"the tokenizers of {teacher} and {student} differ; choose a teacher with the student's own tokenizer"
            )


def stored_dtype(directory: Path) -> torch.dtype:
    """bfloat16 for a checkpoint stored so, float32 for any other."""
    config = read_json(directory / "config.json", "configuration")
    return torch.bfloat16 if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else torch.float32
