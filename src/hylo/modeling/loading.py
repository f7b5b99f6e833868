"""Loads a complete model directory, or says in one line why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hylo.checkpoint import Weights, names, refuse_released
from hylo.errors import HyloError
from hylo.files import read_json

MODEL_TYPES = ("llama", "qwen2", "qwen3", "hylo")


def load_model(
    directory: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A Llama, Qwen2.5, Qwen3 or hylo model from a directory, in evaluation mode. No remote code, safetensors only.

    Raises HyloError if the directory is missing or half-written, or its tensors and its config.json do not agree.
    """
    read_configuration(directory)
    with _quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that they are listed
                output_loading_info=True,
            )
        except Exception as error:  # transformers validates configurations with exceptions of many classes
            reason = " ".join(str(error).split())
            raise HyloError(f"model {directory} cannot be loaded ({reason}); restore the directory") from error
    for key, problem in (("missing_keys", "lacks"), ("unexpected_keys", "holds unexpected")):
        if info[key]:
            raise HyloError(f"model {directory} {problem} {names(sorted(info[key]))}; restore the directory")
    if wrong := sorted({entry[0] for entry in info["mismatched_keys"]}):
        raise HyloError(f"model {directory} has {names(wrong)} in another shape than config.json says; restore it")
    return model.to(device).eval()


def read_configuration(directory: Path) -> dict[str, Any]:
    """config.json of a Llama, Qwen2.5, Qwen3 or hylo directory whose weight files are there and whole; reads no weight.

    Raises HyloError as `load_model` does.
    """
    if not directory.is_dir():
        raise HyloError(f"model directory {directory} does not exist; check the path")
    refuse_released(directory)
    config = read_json(directory / "config.json", "configuration")
    if (model_type := config.get("model_type")) not in MODEL_TYPES:
        raise HyloError(f"model {directory} is of model_type {model_type}; loaded are {', '.join(MODEL_TYPES)}")
    if config.get("quantization_config"):
        raise HyloError(f"model {directory} is quantised; use the unquantised checkpoint")
    Weights(directory)  # names a missing, truncated or pickled file better than what follows
    return config


def checkpoint_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a model directory of this configuration must hold, a tied head left out; makes no weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own progress bar and load report off the terminal: problems are raised here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
