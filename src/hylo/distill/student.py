"""Loading a student and its teacher, and checking that the one can learn from the other."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedModel

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
    check_pair(student, teacher, training.length)
    return model, frozen


def check_pair(student: Path, teacher: Path, length: int) -> None:
    """Raises HyloError if the vocabularies differ or the teacher's context is below `length`; reads no weight."""
    ours, theirs = (AutoConfig.from_pretrained(path, local_files_only=True) for path in (student, teacher))
    if ours.vocab_size != theirs.vocab_size:
        raise HyloError(
            f"{teacher} has a vocabulary of {theirs.vocab_size} and {student} one of {ours.vocab_size}; "
            "choose a teacher of the same family"
        )
    tokenizers = [directory / "tokenizer.json" for directory in (student, teacher)]
    if all(path.exists() for path in tokenizers):
        first, second = (Tokenizer.from_file(str(path)).get_vocab() for path in tokenizers)
        if first != second:
            raise HyloError(
                f"the tokenizers of {teacher} and {student} differ; choose a teacher with the student's own tokenizer"
            )
    if length > (longest := theirs.max_position_embeddings):
        raise HyloError(f"sequences of {length} tokens exceed the {longest} of {teacher}; train on shorter ones")


def stored_dtype(directory: Path) -> torch.dtype:
    """bfloat16 for a checkpoint stored so, float32 for any other."""
    config = read_json(directory / "config.json", "configuration")
    return torch.bfloat16 if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else torch.float32
