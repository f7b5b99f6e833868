"""A model directory as a server needs it: of a known kind, complete, and described by one configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hylo.checkpoint import dtype_of, read_base_config, refuse_released
from hylo.convert.config import hylo_config
from hylo.errors import HyloError
from hylo.files import read_json
from hylo.geometry import complete_geometry
from hylo.layout import layout_name
from hylo.modeling import HyloConfig
from hylo.modeling.configuration import CACHE_KIND
from hylo.modeling.loading import MODEL_TYPES, read_hylo_config


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
        config = read_hylo_config(directory)
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
