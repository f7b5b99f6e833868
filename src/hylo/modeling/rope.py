"""Rotary position embeddings (arXiv 2104.09864): the base's own, and MLA's narrow one with YaRN (arXiv 2309.00071).

Pairs are half-split, (j, j + d/2), as in Hugging Face's Llama and Qwen weights. Nothing is stored: the frequencies
follow the configuration at every call, so that a context extended on a live model takes effect at once.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo.modeling.configuration import HyloConfig


def frequencies(config: HyloConfig) -> dict[str, tuple[Tensor, float]]:
    """Inverse frequencies and the factor on cos and sin, by kind of attention: "attention", `mla_rope_key`."""
    kinds: dict[str, tuple[Tensor, float]] = {}
    if "attention" in config.mixers:
        kinds["attention"] = base_frequencies(config)
    for i, mixer in enumerate(config.mixers):
        if mixer == "mla" and (key := mla_rope_key(config, i)) not in kinds:
            kinds[key] = mla_frequencies(config, i)
    return kinds


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


def rotate(x_BHTd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns every pair (j, j + d/2) of x by its angle."""
    cos, sin = rotary
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
