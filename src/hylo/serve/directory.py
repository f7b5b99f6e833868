"""A model directory as a server needs it: of a known kind, complete, and described by one configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hylo.checkpoint import BASES, Weights, dtype_of, names, read_base_config, refuse_released
from hylo.convert.config import hylo_config
from hylo.errors import HyloError
from hylo.files import read_json
from hylo.geometry import complete_geometry
from hylo.layout import layout_name
from hylo.modeling import HyloConfig
from hylo.modeling.configuration import CACHE_KIND
from hylo.modeling.loading import MODEL_TYPES, checkpoint_shapes, read_configuration


@dataclass(frozen=True)
class ServedModel:
    """`config` of a dense base has attention in every layer; `dtype` is the one that its weights are stored in."""

    directory: Path
    config: HyloConfig
    dtype: str

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def layout(self) -> str:
        return layout_name(self.config.mixers)

    @property
    def supported(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.config.max_position_embeddings)

    @property
    def has_states(self) -> bool:
        return "linear_attention" in {CACHE_KIND[mixer] for mixer in self.config.mixers}


def is_hybrid(directory: Path) -> bool:
    """Whether config.json says that hylo wrote the directory."""
    try:
        return read_json(directory / "config.json", "configuration").get("model_type") == HyloConfig.model_type
    except HyloError:  # left to whoever reads it as a base
        return False


def read_served(directory: Path) -> ServedModel:
    """A hylo, Llama, Qwen2.5 or Qwen3 directory, of which only config.json is read. Raises HyloError for others."""
    if not directory.is_dir():
        raise HyloError(f"model directory {directory} does not exist; check the path")
    refuse_released(directory)
    if is_hybrid(directory):
        config = read_hybrid_config(directory)
    else:
        if (model_type := _model_type(directory)) not in MODEL_TYPES:
            raise HyloError(f"model {directory} is of model_type {model_type}; served are {', '.join(MODEL_TYPES)}")
        base = read_base_config(directory)
        config = hylo_config(base, ["attention"] * base.num_hidden_layers, complete_geometry(base, {}), "pairs-fast")
    return ServedModel(directory, config, dtype_of(config))


def _model_type(directory: Path) -> Any:
    if not directory.is_dir():
        raise HyloError(f"model directory {directory} does not exist; check the path")
    refuse_released(directory)
    return read_json(directory / "config.json", "configuration").get("model_type")


def read_hybrid_config(directory: Path) -> HyloConfig:
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
