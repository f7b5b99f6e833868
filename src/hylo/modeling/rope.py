"""Rotary position embeddings (arXiv 2104.09864): the base's own, and MLA's narrow one with YaRN (arXiv 2309.00071).

With `positions` hype (HyPE, arXiv 2601.22156) the linear blocks rotate instead, and attention's queries grow with the
logarithm of their position. With none, nothing knows where it stands but through recurrence and causality.

Pairs are half-split, (j, j + d/2), as in Hugging Face's Llama and Qwen weights. Nothing is stored: the frequencies
follow the configuration at every call, so that a context extended on a live model takes effect at once.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo.modeling.configuration import CACHE_KIND, HyloConfig

LINEAR_WIDTHS = {"gated_deltanet": "gdn_head_dim", "mamba2": "mamba_d_state", "kda": "kda_head_dim"}  # of q and k heads


QUERIES = "queries"  # the entry of Rotary that HyPE's factor on attention's queries has, (B,T)
# cos and sin (B,T,width) by `rotary_key`, and QUERIES where there is such a factor.
Rotary = dict[str, tuple[Tensor, ...]]


def frequencies(config: HyloConfig) -> dict[str, tuple[Tensor, float]]:
    """Inverse frequencies and the factor on cos and sin of all that rotates, by `rotary_key`."""
    kinds: dict[str, tuple[Tensor, float]] = {}
    for i, mixer in enumerate(config.mixers):
        if (key := rotary_key(config, mixer, i)) is None or key in kinds:
            continue
        if mixer == "attention":
            kinds[key] = base_frequencies(config)
        elif mixer == "mla":
            kinds[key] = mla_frequencies(config, i)
        else:
            kinds[key] = linear_frequencies(config, mixer)
    return kinds


def rotary_key(config: HyloConfig, mixer: str, layer_idx: int) -> str | None:
    """Under which name a layer with this mixer finds its cos and sin; None: it rotates nothing."""
    if CACHE_KIND[mixer] == "linear_attention":
        return mixer if config.positions == "hype" else None
    if config.positions != "rope":
        return None
    return mla_rope_key(config, layer_idx) if mixer == "mla" else mixer


def base_frequencies(config: HyloConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim/2,) of the base's attention and the factor on cos and sin."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return inverse_frequencies(config.head_dim, config.rope_parameters["rope_theta"]), 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](config)


def mla_frequencies(config: HyloConfig, layer_idx: int) -> tuple[Tensor, float]:
    """Inverse frequencies (rope/2,) of an MLA layer's rotated part and the factor on cos and sin."""
    parameters, listed = config.mla_rope_parameters, config.mla_inv_freq
    if listed is None:
        pairs = config.qk_rope_head_dim // 2
        inv_freq = inverse_frequencies(2 * pairs, parameters["rope_theta"])
    else:  # some of the base's pairs, whose place among all of them YaRN goes by
        pairs = config.head_dim // 2
        inv_freq = torch.tensor(listed[layer_idx], dtype=torch.float32, device="cpu")
    if parameters["rope_type"] == "default":
        return inv_freq, 1.0
    return yarn(inv_freq, parameters, pairs), parameters["attention_factor"]


def linear_frequencies(config: HyloConfig, mixer: str) -> tuple[Tensor, float]:
    """Inverse frequencies (width/2,) over the whole width of a linear block's heads, by the base's theta, unscaled."""
    return inverse_frequencies(getattr(config, LINEAR_WIDTHS[mixer]), config.rope_parameters["rope_theta"]), 1.0


def mla_rope_key(config: HyloConfig, layer_idx: int) -> str:
    """Under which name an MLA layer finds its cos and sin: one for all, or one each where layers keep other pairs."""
    return "mla" if config.mla_inv_freq is None else f"mla.{layer_idx}"


def inverse_frequencies(width: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


def yarn(inv_freq: Tensor, parameters: Mapping[str, Any], pairs: int) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a linear ramp over pair indices in between.

    Pair j of all `pairs` turns by theta^(-j/pairs) a token; the ramp's ends are the pairs that turn beta_fast and
    beta_slow times within the original length.
    """
    log_theta, original = math.log(parameters["rope_theta"]), parameters["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / log_theta

    low = max(math.floor(pair_turning(parameters["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(parameters["beta_slow"])), 2 * pairs - 1)
    index = -pairs * inv_freq.log() / log_theta
    slow = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv_freq * (1 - slow) + inv_freq / parameters["factor"] * slow


def cos_sin(inv_freq: Tensor, factor: float, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B,T,d), each half repeated, times the factor."""
    angles = position_ids_BT[..., None].float() * inv_freq.to(position_ids_BT.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def query_factor(config: HyloConfig, position_ids_BT: Tensor) -> Tensor:
    """HyPE's factor on the logits of the query at position t, counted from 0: log(t + a) / log(a), (B,T) in float32."""
    a = config.hype_scale or config.max_position_embeddings
    return torch.log(position_ids_BT.float() + a) / math.log(a)


def turned(x: Tensor, rotary: Rotary | None, key: str | None, heads: int = 1) -> Tensor:
    """x (B,H,T,d), or (B,T,H,d) with `heads` 2, rotated as its layer's `rotary_key` says, or x itself."""
    if key is None:
        return x
    assert rotary is not None, "a layer that rotates was called without cos and sin: give those of layer_inputs"
    cos, sin = rotary[key]
    return rotate(x, (cos, sin), heads)


def scaled(q_BHTd: Tensor, rotary: Rotary) -> Tensor:
    """Queries times the factor that stands in `rotary`, if one does."""
    if QUERIES not in rotary:
        return q_BHTd
    return (q_BHTd * rotary[QUERIES][0][:, None, :, None]).to(q_BHTd.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], heads: int = 1) -> Tensor:
    """Turns every pair (j, j + d/2) of x (B,H,T,d), or (B,T,H,d) with `heads` 2, by its angle."""
    cos, sin = (t.unsqueeze(heads) for t in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
