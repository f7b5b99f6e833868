"""Loads a complete model directory, or says in one line why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hylo.checkpoint import BASES, Weights, names, refuse_released
from hylo.errors import HyloError
from hylo.files import read_json
from hylo.modeling.configuration import HyloConfig

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


def read_hylo_config(directory: Path) -> HyloConfig:
    """config.json of a hylo directory. Raises HyloError if it is not valid."""
    path = directory / "config.json"
    raw = read_json(path, "configuration")
    if raw.get("base_model_type") not in BASES:
        raise HyloError(f"configuration {path} has base_model_type {raw.get('base_model_type')}; restore the file")
    try:
        return HyloConfig.from_dict(raw)
    except Exception as error:  # transformers validates configurations with exceptions of many classes
        raise HyloError(f"configuration {path} is not valid ({error}); restore the file") from error


def check_complete(directory: Path) -> None:
    """Holds the names and shapes of all tensors against what config.json asks for; reads no weight.

    Raises HyloError for a directory that `load_model` would refuse.
    """
    read_configuration(directory)
    held = Weights(directory).shapes
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    try:
        wanted = checkpoint_shapes(config)
    except Exception as error:  # of many classes, as the layers' constructors raise what they like
        raise HyloError(f"configuration {directory / 'config.json'} is not valid ({error}); restore it") from error
    if missing := sorted(wanted.keys() - held.keys()):
        raise HyloError(f"model {directory} lacks {names(missing)}; restore the directory")
    if unexpected := sorted(held.keys() - wanted.keys() - {"lm_head.weight"}):
        raise HyloError(f"model {directory} holds unexpected {names(unexpected)}; restore the directory")
    if wrong := sorted(name for name, shape in wanted.items() if held[name] != shape):
        raise HyloError(f"model {directory} has {names(wrong)} in another shape than config.json says; restore it")


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
