"""Tiny hybrids with weights large enough that every part of a mixer shows in the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hylo.modeling import HyloConfig, HyloForCausalLM


def tiny_config(mixers: list[str], **changes: Any) -> HyloConfig:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mixers": mixers,
        "kv_lora_rank": 20,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "gdn_num_heads": 2,
        "gdn_head_dim": 12,
        "mamba_d_state": 12,
        "mamba_head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_d_inner": 64,
        "mamba_d_xb": 32,
        "kda_num_heads": 2,
        "kda_head_dim": 12,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return HyloConfig(**{**sizes, **changes})


def tiny_model(mixers: list[str], **changes: Any) -> HyloForCausalLM:
    model = HyloForCausalLM(tiny_config(mixers, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def make_config() -> Callable[..., HyloConfig]:
    return tiny_config


@pytest.fixture
def make_model() -> Callable[..., HyloForCausalLM]:
    return tiny_model
