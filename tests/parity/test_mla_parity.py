"""Multi-head latent attention against transformers' DeepSeek-V3, RoPE and YaRN against transformers' own."""

import math
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from hylo.modeling import HyloConfig
from hylo.modeling.attention import RMSNorm
from hylo.modeling.mla import MultiHeadLatentAttention
from hylo.modeling.rope import cos_sin, mla_frequencies, rotate

GEOMETRY: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def extended(theta: float, length: int, original: int, **geometry: Any) -> HyloConfig:
    config = HyloConfig(**geometry, mla_rope_parameters={"rope_type": "default", "rope_theta": theta})
    config.extend_context(length, original)
    return config


@torch.no_grad()
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("length", [64, 1024])
def test_deepseek_attention(interleave: bool, length: int) -> None:
    """With a kv head per head and DeepSeek's latent norms taken out; theirs may pair (2i, 2i+1), ours never does."""
    config = extended(10000.0, length, 64, **GEOMETRY)
    theirs_config = DeepseekV3Config(
        **GEOMETRY,
        rope_interleave=interleave,
        rope_parameters=dict(config.mla_rope_parameters),
        max_position_embeddings=length,
        attn_implementation="eager",
    )
    ours, theirs = MultiHeadLatentAttention(config, 0), DeepseekV3Attention(theirs_config, 0)
    theirs.q_a_layernorm = theirs.kv_a_layernorm = torch.nn.Identity()
    weights = {name: 0.3 * torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    if interleave:
        half_split = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))
        q_rows = torch.arange(4 * 16).view(4, 16)
        q_rows[:, 8:] = q_rows[:, 8:][:, half_split]
        weights["q_b_proj.weight"] = weights["q_b_proj.weight"][q_rows.flatten()]
        weights["kv_a_proj_with_mqa.weight"] = torch.cat(
            (weights["kv_a_proj_with_mqa.weight"][:20], weights["kv_a_proj_with_mqa.weight"][20:][half_split])
        )
    ours.load_state_dict(weights)

    x, positions = torch.randn(2, 70, 32), torch.arange(70)[None]
    mask = torch.full((70, 70), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = theirs(x, DeepseekV3RotaryEmbedding(theirs_config)(x, positions), mask)[0]
    inv_freq, factor = mla_frequencies(config, 0)
    rotary = {"mla": cos_sin(inv_freq, factor, positions, x.dtype)}
    torch.testing.assert_close(ours(x, None, rotary), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_key_norm_is_that_of_the_assembled_head() -> None:
    """Qwen3's norms: over [nope | rope] of every head, before RoPE, as its attention does, written out head by head."""
    config = HyloConfig(**{**GEOMETRY, "num_key_value_heads": 2}, qk_norm=True)
    mixer = MultiHeadLatentAttention(config, 0)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    x, positions = torch.randn(2, 9, 32), torch.arange(9)[None]
    rotary = cos_sin(*mla_frequencies(config, 0), positions, x.dtype)

    def turned(head: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        head = torch.nn.functional.rms_norm(head, (16,), norm.weight, norm.eps)
        return torch.cat((head[..., :8], rotate(head[:, None, :, 8:], rotary)[:, 0]), dim=-1)

    q = mixer.q_b_proj(mixer.q_a_proj(x)).view(2, 9, 4, 16)
    latent, key_rope = mixer.kv_a_proj_with_mqa(x).split([20, 8], dim=-1)
    up = (latent @ mixer.kv_b_proj.weight.T).view(2, 9, 2, 20)
    outputs = []
    for head in range(4):
        k = turned(torch.cat((up[:, :, head // 2, :8], key_rope), dim=-1), mixer.k_norm)
        logits = turned(q[:, :, head], mixer.q_norm) @ k.transpose(1, 2) / math.sqrt(16)
        logits = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(logits.softmax(-1) @ up[:, :, head // 2, 8:])
    expected = mixer.o_proj(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(mixer(x, None, {"mla": rotary}), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("theta", "width"), [(10000.0, 16), (500000.0**0.5, 32), (1e6, 64)])
@pytest.mark.parametrize(("length", "original"), [(8192, 2048), (65536, 2048), (65536, 32768), (2048, 256), (256, 256)])
def test_yarn_is_that_of_transformers(theta: float, width: int, length: int, original: int) -> None:
    config = extended(theta, length, original)
    config.qk_rope_head_dim = width
    inv_freq, factor = mla_frequencies(config, 0)
    if length == original:
        assert factor == 1.0
        torch.testing.assert_close(inv_freq, theta ** -(torch.arange(0, width, 2) / width))
        return
    llama = LlamaConfig(
        head_dim=width, rope_parameters=dict(config.mla_rope_parameters), max_position_embeddings=length
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](llama)
    torch.testing.assert_close(inv_freq, expected)
    assert factor == pytest.approx(expected_factor) == pytest.approx(0.1 * math.log(length / original) + 1)
