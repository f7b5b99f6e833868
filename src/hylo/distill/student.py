"""Loading a student and its teacher, and checking that the one can learn from the other."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hylo.checkpoint import Weights
from hylo.distill.settings import Training, Trains
from hylo.errors import HyloError
from hylo.files import read_json
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model, read_configuration


def load_teacher(directory: Path, student: Path, training: Training) -> PreTrainedModel:
    """A frozen teacher for the model in `student`. Raises HyloError as `check_pair` does."""
    # A large teacher need not be held in float32 if it was never stored so.
    dtype = stored_dtype(directory) if training.precision == "bf16" else torch.float32
    frozen = load_model(directory, dtype=dtype).requires_grad_(False).eval()
    check_pair(student, directory, training.length)
    return frozen


def load_student(directory: Path) -> HyloForCausalLM:
    """The hylo model to train, in float32. Raises HyloError for any other kind."""
    model = load_model(directory, dtype=torch.float32)
    if not isinstance(model, HyloForCausalLM):
        raise _no_student(directory, model.config.model_type)
    return model


def read_head(student: Path) -> Tensor:
    """The lm_head (V, D) of a hylo directory, in float32; where they are tied, that is the embedding."""
    config = read_configuration(student)
    if config["model_type"] != HyloForCausalLM.config_class.model_type:
        raise _no_student(student, config["model_type"])
    name = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    weights = Weights(student)
    if name not in weights.shapes:
        raise HyloError(f"model {student} lacks {name}; restore the directory")
    return weights[name].float()


def choose_weights(model: HyloForCausalLM, student: Path, trains: Trains) -> None:
    """Freezes what is not to train: nothing, the head, or all but the token mixers; `student` is the model's origin."""
    if trains == "all_but_head":
        freeze_head(model, read_head(student))
    elif trains == "mixers":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.get_submodule("mixer").requires_grad_(True)


def freeze_head(model: HyloForCausalLM, head_VD: Tensor) -> None:
    """Gives the model a head of its own, with these weights, that does not train; a tied embedding goes on training."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head_VD.clone(), requires_grad=False)


def _no_student(directory: Path, model_type: str) -> HyloError:
    return HyloError(f"{directory} holds a {model_type} model, not a hylo one; convert it first")


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
