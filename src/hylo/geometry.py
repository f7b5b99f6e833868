"""How wide the mixers are: the paper's figures for its three bases, a rule for others, and what they cost.

Everything here follows from the base's configuration and a dict of HyloConfig's mixer fields; no weight is read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from transformers import PreTrainedConfig

from hylo.errors import HyloError
from hylo.modeling.configuration import HyloConfig, KNorm, Positions
from hylo.modeling.rope import LINEAR_WIDTHS

# The three bases whose hybrids are published: (hidden, layers, query heads, kv heads, head_dim) -> kv and query rank.
PUBLISHED_RANKS = {
    (2048, 16, 32, 8, 64): (128, 1344),
    (3072, 28, 24, 8, 128): (128, 1536),
    (2048, 28, 16, 8, 128): (256, 1344),
}


KEYS = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "conv_kernel_size",
    "gdn_num_heads",
    "gdn_head_dim",
    "gdn_expand_v",
    "mamba_d_state",
    "mamba_head_dim",
    "mamba_num_heads",
    "mamba_d_inner",
    "mamba_d_xb",
    "kda_num_heads",
    "kda_head_dim",
)


def default_geometry(base: PreTrainedConfig) -> dict[str, int]:
    """HyloConfig's mixer fields for a base: the published ones for the paper's three, else by rule.

    The rule keeps the published proportions. MLA: kv rank a quarter of a cached key's width (kv heads x head_dim), at
    most 512; query rank 21/32 of the hidden size up to 2048 and half of it above; half of every head is rotated; ranks
    are multiples of 8 and never above their matrix's. Below hidden 512, where the rotated key is large beside the
    latent, a quarter of the head is rotated and the kv rank is three eighths of the width. Gated DeltaNet:
    max(1, round(3/4 of hidden / width)) heads of width 256 (128 below hidden 1024, 64 below 512). Mamba-2 and KDA:
    the base's heads.
    """
    hidden, layers = base.hidden_size, base.num_hidden_layers
    heads, kv_heads, head_dim = base.num_attention_heads, base.num_key_value_heads, base.head_dim
    small = hidden < 512
    rope = max(2, head_dim // (8 if small else 4) * 2)
    kv_width = kv_heads * head_dim
    kv_rank = min(_multiple_of_8(kv_width * (3 if small else 2) / 8), 512)
    q_rank = _multiple_of_8(hidden * 21 / 32 if hidden <= 2048 else hidden / 2)
    kv_rank, q_rank = PUBLISHED_RANKS.get((hidden, layers, heads, kv_heads, head_dim), (kv_rank, q_rank))
    width = 64 if small else 128 if hidden < 1024 else 256
    return {
        "kv_lora_rank": min(kv_rank, hidden, kv_heads * (2 * head_dim - rope)),
        "q_lora_rank": min(q_rank, hidden, heads * head_dim),
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": head_dim,
        "conv_kernel_size": 4,
        "gdn_num_heads": max(1, math.floor(0.75 * hidden / width + 0.5)),
        "gdn_head_dim": width,
        "gdn_expand_v": 2,
        "mamba_d_state": head_dim,
        "mamba_head_dim": head_dim,
        "mamba_num_heads": heads,
        "mamba_d_inner": heads * head_dim,
        "mamba_d_xb": kv_width,
        "kda_num_heads": heads,
        "kda_head_dim": head_dim,
    }


def complete_geometry(base: PreTrainedConfig, overrides: Mapping[str, int]) -> dict[str, int]:
    """The default geometry with `overrides`, whose dependent widths follow (nope from rope, d_inner from the heads).

    Raises HyloError, naming the key, for unknown keys and for figures that do not fit the base.
    """
    geometry = default_geometry(base)
    for key, value in overrides.items():
        if key not in geometry:
            raise HyloError(f"geometry has no {key}; its keys are {', '.join(geometry)}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise HyloError(f"{key} is {value!r}; it must be a whole number")
    geometry |= overrides
    if "qk_nope_head_dim" in overrides and "qk_rope_head_dim" not in overrides:
        geometry["qk_rope_head_dim"] = base.head_dim - geometry["qk_nope_head_dim"]
    if "qk_nope_head_dim" not in overrides:
        geometry["qk_nope_head_dim"] = base.head_dim - geometry["qk_rope_head_dim"]
    if "kv_lora_rank" not in overrides:  # a wider rotated part leaves fewer rows to factor
        geometry["kv_lora_rank"] = min(geometry["kv_lora_rank"], max(1, _kv_rows(base, geometry)))
    if "mamba_head_dim" in overrides and "mamba_d_state" not in overrides:
        geometry["mamba_d_state"] = geometry["mamba_head_dim"]
    if "mamba_d_inner" not in overrides:
        geometry["mamba_d_inner"] = geometry["mamba_num_heads"] * geometry["mamba_head_dim"]
    _check(base, geometry)
    return geometry


def geometry_in(config: HyloConfig) -> dict[str, int]:
    """The mixer fields that a hybrid's configuration has."""
    return {key: getattr(config, key) for key in KEYS}


def _check(base: PreTrainedConfig, geometry: Mapping[str, int]) -> None:
    hidden, heads, head_dim = base.hidden_size, base.num_attention_heads, base.head_dim
    for key, value in geometry.items():
        if value < 1 and key != "qk_nope_head_dim":
            raise HyloError(f"{key} is {value}; it must be at least 1")
    rope, nope = geometry["qk_rope_head_dim"], geometry["qk_nope_head_dim"]
    if rope % 2 or rope > head_dim:
        raise HyloError(f"qk_rope_head_dim is {rope}; it must be even and at most the base's head_dim {head_dim}")
    if nope + rope != head_dim:
        raise HyloError(f"qk_nope_head_dim is {nope}; with qk_rope_head_dim {rope} it must be {head_dim - rope}")
    if geometry["v_head_dim"] != head_dim:
        raise HyloError(f"v_head_dim is {geometry['v_head_dim']}; values are copied, so it must be head_dim {head_dim}")
    for key, rows in (("kv_lora_rank", _kv_rows(base, geometry)), ("q_lora_rank", heads * head_dim)):
        if geometry[key] > min(rows, hidden):
            raise HyloError(
                f"{key} is {geometry[key]}, but its matrix is {rows} x {hidden}; choose at most {min(rows, hidden)}"
            )
    d_inner, d_xb = geometry["mamba_d_inner"], geometry["mamba_d_xb"]
    mamba_heads, mamba_width = geometry["mamba_num_heads"], geometry["mamba_head_dim"]
    if d_inner != mamba_heads * mamba_width:
        raise HyloError(
            f"mamba_d_inner is {d_inner}; {mamba_heads} heads of {mamba_width} need {mamba_heads * mamba_width}"
        )
    if d_xb % mamba_width or mamba_heads % (d_xb // mamba_width):
        raise HyloError(
            f"mamba_d_xb is {d_xb}; it must hold whole heads of {mamba_width} whose number divides {mamba_heads} heads"
        )
    if geometry["conv_kernel_size"] < 2:
        raise HyloError(f"conv_kernel_size is {geometry['conv_kernel_size']}; it must be at least 2")


def _kv_rows(base: PreTrainedConfig, geometry: Mapping[str, int]) -> int:
    """Rows of the stacked unrotated key and value projections, which kv_lora_rank factors."""
    return base.num_key_value_heads * (geometry["qk_nope_head_dim"] + geometry["v_head_dim"])


def _multiple_of_8(x: float) -> int:
    return max(8, 8 * math.ceil(x / 8))


def check_kv_ranks(
    base: PreTrainedConfig, mixers: Sequence[str], geometry: Mapping[str, int], ranks: Sequence[int]
) -> list[int]:
    """kv_lora_rank layer by layer: `ranks` where the layer is MLA, 0 elsewhere. Raises HyloError, naming the layer."""
    if len(ranks) != len(mixers):
        raise HyloError(f"kv_lora_ranks has {len(ranks)} entries for {len(mixers)} layers; give one for every layer")
    rows, hidden = _kv_rows(base, geometry), base.hidden_size
    for i, (mixer, rank) in enumerate(zip(mixers, ranks, strict=True)):
        if mixer == "mla" and not 1 <= rank <= min(rows, hidden):
            raise HyloError(
                f"kv_lora_ranks has {rank} for layer {i}, whose matrix is {rows} x {hidden}; "
                f"choose 1 to {min(rows, hidden)}"
            )
    return [rank if mixer == "mla" else 0 for mixer, rank in zip(mixers, ranks, strict=True)]


def check_positions(mixers: Sequence[str], geometry: Mapping[str, int], positions: str) -> None:
    """Raises HyloError for unknown positions, and for hype on linear blocks whose widths make no pairs."""
    if positions not in get_args(Positions):
        raise HyloError(f"positions {positions} are not known; choose one of {', '.join(get_args(Positions))}")
    for mixer in sorted(LINEAR_WIDTHS.keys() & set(mixers)):
        if positions == "hype" and geometry[key := LINEAR_WIDTHS[mixer]] % 2:
            raise HyloError(f"{key} is {geometry[key]}; positions hype rotates pairs, so it must be even")


def mixer_parameters(
    base: PreTrainedConfig,
    mixer: str,
    geometry: Mapping[str, int],
    k_norm: KNorm = "exact",
    attention_gate: bool = False,
) -> int:
    """Parameters of one mixer; with `k_norm` folded, MLA has no key norm's weight, with `attention_gate` a gate's."""
    hidden, heads, kv_heads, head_dim = (
        base.hidden_size,
        base.num_attention_heads,
        base.num_key_value_heads,
        base.head_dim,
    )
    norm = head_dim if base.model_type == "qwen3" else 0
    biased = base.model_type == "qwen2"  # queries, keys and values, whatever they become
    if mixer == "attention":
        biases = (heads + 2 * kv_heads) * head_dim * biased
        return 2 * hidden * (heads + kv_heads) * head_dim + 2 * norm + biases
    if mixer == "mla":
        r_q, r_kv = geometry["q_lora_rank"], geometry["kv_lora_rank"]
        queries = r_q * hidden + heads * head_dim * r_q
        latent = (r_kv + geometry["qk_rope_head_dim"]) * hidden + _kv_rows(base, geometry) * r_kv
        biases = (heads * head_dim + r_kv + geometry["qk_rope_head_dim"] + _kv_rows(base, geometry)) * biased
        norms = norm if k_norm == "folded" else 2 * norm
        outputs = hidden * heads * geometry["v_head_dim"] * (2 if attention_gate else 1)
        return queries + latent + outputs + norms + biases
    taps = geometry["conv_kernel_size"]
    if mixer == "gated_deltanet":
        gdn_heads, width = geometry["gdn_num_heads"], geometry["gdn_head_dim"]
        key, value = gdn_heads * width, gdn_heads * width * geometry["gdn_expand_v"]
        projections = hidden * (2 * key + 3 * value + 2 * gdn_heads)  # q k | v g o | a b
        scalars_and_norm = 2 * gdn_heads + geometry["gdn_expand_v"] * width
        return projections + scalars_and_norm + (taps + biased) * (2 * key + value)
    if mixer == "kda":
        kda_heads, width = geometry["kda_num_heads"], geometry["kda_head_dim"]
        inner = kda_heads * width
        low_rank = 2 * width * (hidden + inner)  # of the decay and of the gate
        scalars_and_norm = kda_heads + inner + width  # A_log, dt_bias, o_norm
        return hidden * (4 * inner + kda_heads) + low_rank + scalars_and_norm + 3 * (taps + biased) * inner
    d_inner, mamba_heads, channels = geometry["mamba_d_inner"], geometry["mamba_num_heads"], mamba_channels(geometry)
    in_proj = (hidden + biased) * (d_inner + channels + mamba_heads)
    return in_proj + (taps + 1) * channels + 3 * mamba_heads + d_inner + hidden * d_inner


def layer_overhead(base: PreTrainedConfig) -> int:
    """Parameters of what surrounds the mixer in a layer: the MLP and two norms."""
    hidden, intermediate = base.hidden_size, base.intermediate_size
    biases = 2 * intermediate + hidden if getattr(base, "mlp_bias", False) else 0
    return 3 * hidden * intermediate + biases + 2 * hidden


def cached_values_per_token(base: PreTrainedConfig, mixer: str, geometry: Mapping[str, int]) -> int:
    """Values that one layer's cache grows by with every token."""
    if mixer == "attention":
        return 2 * base.num_key_value_heads * base.head_dim
    return geometry["kv_lora_rank"] + geometry["qk_rope_head_dim"] if mixer == "mla" else 0


def extra_values_per_token(base: PreTrainedConfig, mixer: str, k_norm: KNorm = "exact") -> int:
    """What an exact key norm (Qwen3) caches beside MLA's latent: 1/rms per kv head; published figures leave it out."""
    return base.num_key_value_heads if mixer == "mla" and base.model_type == "qwen3" and k_norm == "exact" else 0


def state_values(mixer: str, geometry: Mapping[str, int]) -> tuple[int, int]:
    """Values of one layer that do not grow with context: (recurrent state, convolution columns)."""
    columns = geometry["conv_kernel_size"] - 1
    if mixer == "gated_deltanet":
        heads, width, expand = geometry["gdn_num_heads"], geometry["gdn_head_dim"], geometry["gdn_expand_v"]
        return heads * width * width * expand, columns * heads * width * (2 + expand)
    if mixer == "kda":
        inner = geometry["kda_num_heads"] * geometry["kda_head_dim"]
        return inner * geometry["kda_head_dim"], columns * 3 * inner
    if mixer == "mamba2":
        return geometry["mamba_d_inner"] * geometry["mamba_d_state"], columns * mamba_channels(geometry)
    return 0, 0


def mamba_channels(geometry: Mapping[str, int]) -> int:
    """Channels of Mamba-2's convolution: x | B | C."""
    groups = geometry["mamba_d_xb"] // geometry["mamba_head_dim"]
    return geometry["mamba_d_xb"] + (groups + geometry["mamba_num_heads"]) * geometry["mamba_d_state"]
