"""What the stages through TRL have in common; TRL itself is an extra (pip install hylo[dpo])."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from hylo.checkpoint import read_tokenizer
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM

NOTED = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def trl_arguments(training: Training) -> dict[str, Any]:
    """What TRL's configurations say by themselves otherwise than we need it."""
    # transformers gave the arguments a new name after 5.19.
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {
        f"{name}_checkpointing": training.gradient_checkpointing,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
    }


def check_context(model: HyloForCausalLM, student: Path, training: Training) -> None:
    """Raises HyloError if sequences are longer than the model's context, which only distillation extends."""
    if training.length > (longest := model.config.max_position_embeddings):
        raise HyloError(
            f"length {training.length} exceeds the {longest} tokens of {student}; extend it first, or train on less"
        )


def read_plain_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, which adds no special tokens: chat templates have written theirs, and rows have no others.

    Raises HyloError if there is none, or none that can end an answer.
    """
    tokenizer = read_tokenizer(directory)
    if tokenizer.eos_token is None:
        raise HyloError(f"the tokenizer of {directory} has no eos_token to end answers with; name it in its files")
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def digest(records: list[dict[str, str]]) -> str:
    """A checksum that tells one list of records from another."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def undisturbed(model: HyloForCausalLM) -> Iterator[None]:
    """What Trainers note in a model's configuration goes again: special tokens, and that training uses no cache.

    They are kept from announcing it, datasets from drawing bars, and TRL from warnings about what it calls.
    """
    configs = (model.config, model.generation_config)
    before = [{name: getattr(config, name) for name in NOTED} for config in configs]
    bars, verbosity = datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`.*gradient_checkpointing.*` is deprecated", FutureWarning)
            yield
    finally:
        for config, values in zip(configs, before, strict=True):
            for name, value in values.items():
                setattr(config, name, value)
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
