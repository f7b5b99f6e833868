"""The plan of a conversion: which layer becomes what, and the parameters, KV cache and recurrent state that follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from hylo.checkpoint import BASES, check_dtype, dtype_of, read_base_config
from hylo.errors import HyloError
from hylo.geometry import (
    cached_values_per_token,
    check_kv_ranks,
    check_positions,
    complete_geometry,
    extra_values_per_token,
    geometry_in,
    layer_overhead,
    mixer_parameters,
    state_values,
)
from hylo.layout import layout_name, parse_layout
from hylo.modeling.configuration import HyloConfig, KNorm, Positions

BASE_KEYS = (  # of the base, that a hybrid's configuration keeps
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
    "mlp_bias",
    "rope_parameters",
)


@dataclass(frozen=True)
class LayerPlan:
    """`parameters` are the whole layer's (mixer, MLP, norms); cache bytes per token and state bytes per sequence."""

    index: int
    mixer: str
    parameters: int
    mixer_parameters: int
    kv_bytes_per_token: int
    kv_extra_bytes_per_token: int
    state_bytes_per_sequence: int


@dataclass(frozen=True)
class Plan:
    """What `convert` makes of a base. `geometry`: HyloConfig's mixer fields; `dtype`: the weights' and the cache's.

    `k_norm` and `kv_lora_ranks` (a rank per layer, 0 where the layer is no MLA; None: the geometry's in all) are
    HyloConfig's `mla_k_norm` and `kv_lora_ranks`, `positions` and `attention_gate` are its own.
    """

    base: Path
    base_config: PreTrainedConfig
    mixers: list[str]
    geometry: dict[str, int]
    dtype: str
    state_dtype: str
    layers: list[LayerPlan]
    k_norm: KNorm = "exact"
    kv_lora_ranks: list[int] | None = None
    positions: Positions = "rope"
    attention_gate: bool = False

    @property
    def layout(self) -> str:
        return layout_name(self.mixers)

    @property
    def parameters(self) -> int:
        """All parameters, a head that is tied to the embedding counted once."""
        return sum(layer.parameters for layer in self.layers) + self._outside_layers(
            self.base_config.tie_word_embeddings
        )

    @property
    def parameters_untied(self) -> int:
        """All parameters with the head counted apart, as published totals have it."""
        return sum(layer.parameters for layer in self.layers) + self._outside_layers(False)

    @property
    def base_parameters(self) -> int:
        layer = mixer_parameters(self.base_config, "attention", self.geometry) + layer_overhead(self.base_config)
        return len(self.layers) * layer + self._outside_layers(self.base_config.tie_word_embeddings)

    def _outside_layers(self, tied: bool) -> int:
        config = self.base_config
        return (1 if tied else 2) * config.vocab_size * config.hidden_size + config.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(layer.kv_bytes_per_token for layer in self.layers)

    @property
    def kv_extra_bytes_per_token(self) -> int:
        """What an exact key norm caches beside MLA's latents (Qwen3); not in `kv_bytes_per_token`."""
        return sum(layer.kv_extra_bytes_per_token for layer in self.layers)

    @property
    def base_kv_bytes_per_token(self) -> int:
        values = cached_values_per_token(self.base_config, "attention", self.geometry)
        return len(self.layers) * values * check_dtype(self.dtype).itemsize

    @property
    def kv_percent_of_base(self) -> float:
        return 100 * self.kv_bytes_per_token / self.base_kv_bytes_per_token

    @property
    def state_bytes_per_sequence(self) -> int:
        return sum(layer.state_bytes_per_sequence for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "parameters": self.parameters,
            "parameters_untied": self.parameters_untied,
            "base_parameters": self.base_parameters,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_extra_bytes_per_token": self.kv_extra_bytes_per_token,
            "base_kv_bytes_per_token": self.base_kv_bytes_per_token,
            "kv_percent_of_base": self.kv_percent_of_base,
            "state_bytes_per_sequence": self.state_bytes_per_sequence,
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "geometry": dict(self.geometry),
            "k_norm": self.k_norm,
            "kv_lora_ranks": self.kv_lora_ranks,
            "positions": self.positions,
            "attention_gate": self.attention_gate,
            "layers": [
                {
                    "index": layer.index,
                    "mixer": layer.mixer,
                    "parameters": layer.parameters,
                    "mixer_parameters": layer.mixer_parameters,
                    "kv_bytes_per_token": layer.kv_bytes_per_token,
                    "kv_extra_bytes_per_token": layer.kv_extra_bytes_per_token,
                    "state_bytes_per_sequence": layer.state_bytes_per_sequence,
                }
                for layer in self.layers
            ],
        }

    def print(self, console: Console) -> None:
        """A table of the layers and the totals."""
        table = Table(title=f"{self.base.resolve().name}: {self.layout}", title_justify="left")
        table.add_column("layer", justify="right")
        table.add_column("mixer", no_wrap=True)
        for heading in ("mixer parameters", "layer parameters", "KV bytes/token", "state bytes"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            figures = (
                layer.mixer_parameters,
                layer.parameters,
                layer.kv_bytes_per_token,
                layer.state_bytes_per_sequence,
            )
            table.add_row(str(layer.index), layer.mixer, *(f"{figure:,}" if figure else "-" for figure in figures))
        console.print(table)
        geometry = ", ".join(f"{key} {value}" for key, value in self._used_geometry().items())
        console.print(f"geometry: {geometry}" if geometry else "geometry: the base's")
        if self.positions != "rope" or self.attention_gate:
            gate = ", MLA's output gated" if self.attention_gate else ""
            console.print(f"positions: {self.positions}{gate}")
        untied = f" ({self.parameters_untied:,} with the tied head counted apart)"
        console.print(
            f"parameters: {self.parameters:,}{untied if self.base_config.tie_word_embeddings else ''}; "
            f"base: {self.base_parameters:,}"
        )
        extra = f" + {self.kv_extra_bytes_per_token:,} for key norms" if self.kv_extra_bytes_per_token else ""
        console.print(
            f"KV cache ({self.dtype}): {self.kv_bytes_per_token:,}{extra} bytes a token, "
            f"{self.kv_percent_of_base:.1f} % of the base's {self.base_kv_bytes_per_token:,}"
        )
        console.print(f"state ({self.state_dtype}): {self.state_bytes_per_sequence:,} bytes a sequence, at any length")

    def _used_geometry(self) -> dict[str, int | str]:
        """The keys that matter to the mixers at hand, a rank that differs by layer as its range."""
        prefixes = {
            "mla": ("kv_", "q_", "qk_", "v_"),
            "gated_deltanet": ("gdn_", "conv_"),
            "mamba2": ("mamba_", "conv_"),
            "kda": ("kda_", "conv_"),
        }
        used = tuple(prefix for mixer in set(self.mixers) for prefix in prefixes.get(mixer, ()))
        figures: dict[str, int | str] = {key: n for key, n in self.geometry.items() if used and key.startswith(used)}
        if ranks := [rank for rank in self.kv_lora_ranks or [] if rank]:
            figures["kv_lora_rank"] = f"{min(ranks)} to {max(ranks)}"
        return figures


def make_plan(
    base: Path,
    layout: str,
    mla_layers: Sequence[int] | None = None,
    geometry: Mapping[str, int] | None = None,
    dtype: str | None = None,
    state_dtype: str = "float32",
    k_norm: KNorm = "exact",
    kv_lora_ranks: Sequence[int] | None = None,
    positions: Positions = "rope",
    attention_gate: bool = False,
) -> Plan:
    """Plans the conversion of the base directory `base`, of which only config.json is read.

    `mla_layers`: where the A or MLA layers stand. `geometry`: overrides of `default_geometry`. `dtype` (default: the
    base's) sets the bytes of the KV cache and convolution columns, `state_dtype` those of the recurrent state.
    `k_norm` (Qwen3): whether MLA keeps the key norm or has it folded into its weights. `kv_lora_ranks`: a rank per
    layer, of which only the MLA layers' count. `positions` and `attention_gate`: see HyloConfig. Raises HyloError for a
    base, layout, geometry or rank that does not fit, and for a gate without MLA.
    """
    config = read_base_config(base)
    mixers = parse_layout(layout, config.num_hidden_layers, mla_layers)
    full = complete_geometry(config, geometry or {})
    if k_norm not in get_args(KNorm):
        raise HyloError(f"k norm {k_norm} is not known; choose one of {', '.join(get_args(KNorm))}")
    ranks = None if kv_lora_ranks is None else check_kv_ranks(config, mixers, full, kv_lora_ranks)
    check_positions(mixers, full, positions)
    if attention_gate and "mla" not in mixers:
        raise HyloError(f"the attention gate is for MLA layers, and layout {layout} has none; leave it out")
    options = k_norm, ranks, positions, attention_gate
    return _plan(base, config, mixers, full, dtype or dtype_of(config), state_dtype, *options)


def plan_of(directory: Path, config: HyloConfig, dtype: str, state_dtype: str = "float32") -> Plan:
    """The plan that the hybrid in `directory`, with configuration `config`, is the result of."""
    base = BASES[config.base_model_type][0](**{key: getattr(config, key) for key in BASE_KEYS})
    geometry = geometry_in(config)
    check_dtype(state_dtype)
    options = config.mla_k_norm, config.kv_lora_ranks, config.positions, config.attention_gate
    return _plan(directory, base, config.mixers, geometry, dtype, state_dtype, *options)


def _plan(
    base: Path,
    config: PreTrainedConfig,
    mixers: list[str],
    geometry: dict[str, int],
    dtype: str,
    state_dtype: str,
    k_norm: KNorm,
    ranks: list[int] | None,
    positions: Positions,
    attention_gate: bool,
) -> Plan:
    value_bytes, state_bytes = check_dtype(dtype).itemsize, check_dtype(state_dtype).itemsize

    def layer(index: int, mixer: str) -> LayerPlan:
        own = geometry if ranks is None else geometry | {"kv_lora_rank": ranks[index]}
        parameters = mixer_parameters(config, mixer, own, k_norm, attention_gate)
        state, columns = state_values(mixer, own)
        return LayerPlan(
            index,
            mixer,
            parameters + layer_overhead(config),
            parameters,
            cached_values_per_token(config, mixer, own) * value_bytes,
            extra_values_per_token(config, mixer, k_norm) * value_bytes,
            state * state_bytes + columns * value_bytes,
        )

    layers = [layer(index, mixer) for index, mixer in enumerate(mixers)]
    options = k_norm, ranks, positions, attention_gate
    return Plan(base, config, mixers, geometry, dtype, state_dtype, layers, *options)
