"""Bytes counted in a real cache, against arithmetic by hand on the configuration."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hylo.evaluate.memory import measure_memory
from hylo.modeling import HyloConfig, HyloForCausalLM

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ATTENTION = 2 * 2 * 16  # keys and values of two heads


def hybrid(*mixers: str) -> HyloForCausalLM:
    config = HyloConfig(**SHAPE, num_hidden_layers=len(mixers), mixers=list(mixers), gdn_num_heads=2, gdn_head_dim=8)
    return HyloForCausalLM(config).eval()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are read in several pieces with a remainder."""
    monkeypatch.setattr("hylo.evaluate.memory.CHUNK", 5)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_attention_grows_and_has_no_state(small_chunks: None, dtype: torch.dtype, size: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3)).to(dtype).eval()
    assert measure_memory(model, 33) == {
        "cache_bytes_per_token": 3 * ATTENTION * size,
        "state_bytes": 0,
        "total_bytes": 33 * 3 * ATTENTION * size,
    }


def test_a_hybrid_has_both(small_chunks: None) -> None:
    model = hybrid("attention", "mla", "gated_deltanet", "gated_deltanet")
    config = model.config
    per_token = 4 * (ATTENTION + config.kv_lora_rank + config.qk_rope_head_dim)
    width, value = 2 * 8, 2 * 8 * config.gdn_expand_v
    state = 4 * (2 * 8 * 8 * config.gdn_expand_v + (config.conv_kernel_size - 1) * (2 * width + value))
    for length in (2, 21):
        assert measure_memory(model, length) == {
            "cache_bytes_per_token": per_token,
            "state_bytes": 2 * state,
            "total_bytes": per_token * length + 2 * state,
        }


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_linear_blocks_alone_do_not_grow(small_chunks: None, mixer: str) -> None:
    short, long = (measure_memory(hybrid(mixer, mixer), length) for length in (10, 60))
    assert short == long and short["cache_bytes_per_token"] == 0 and short["state_bytes"] == short["total_bytes"] > 0
