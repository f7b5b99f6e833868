"""A model whose layers all keep the base's attention is the base, as transformers runs it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hylo.modeling import HyloConfig, HyloForCausalLM

GEOMETRY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def bases() -> list[Any]:
    return [
        (LlamaForCausalLM, LlamaConfig(**GEOMETRY, rope_parameters=dict(DEFAULT_ROPE), rms_norm_eps=1e-5)),
        (LlamaForCausalLM, LlamaConfig(**GEOMETRY, rope_parameters=dict(LLAMA3_ROPE), tie_word_embeddings=True)),
        (LlamaForCausalLM, LlamaConfig(**GEOMETRY, mlp_bias=True)),
        (Qwen2ForCausalLM, Qwen2Config(**GEOMETRY, rope_parameters=dict(DEFAULT_ROPE))),
        (Qwen3ForCausalLM, Qwen3Config(**GEOMETRY, rope_parameters=dict(DEFAULT_ROPE))),
    ]


@torch.no_grad()
@pytest.mark.parametrize("index", range(5), ids=["llama", "llama3-rope", "mlp-biases", "qwen2", "qwen3"])
def test_all_attention_equals_the_base(index: int) -> None:
    base_class, base_config = bases()[index]
    base = base_class(base_config).eval()
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    fields = (*GEOMETRY, "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    config = HyloConfig(
        **{name: getattr(base_config, name) for name in fields},
        mlp_bias=getattr(base_config, "mlp_bias", False),
        base_model_type=base_config.model_type,
        qk_norm=base_config.model_type == "qwen3",
        qkv_bias=base_config.model_type == "qwen2",
    )
    model = HyloForCausalLM(config).eval()
    model.load_state_dict({name.replace("self_attn", "mixer"): tensor for name, tensor in base.state_dict().items()})

    ids, mask = torch.randint(0, 61, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-5, rtol=0)
    mask[1, :30] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, theirs = (run(ids, attention_mask=mask, position_ids=positions).logits for run in (model, base))
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], atol=1e-5, rtol=0)
    packed = model(ids, cu_seq_lens_q=torch.tensor([0, 1, 60, 100, 200])).logits.flatten(0, 1)
    apart = [base(part[None]).logits[0] for part in ids.flatten().split([1, 59, 40, 100])]
    torch.testing.assert_close(packed, torch.cat(apart), atol=1e-5, rtol=0)
    generated = [run.generate(ids[:, :8], max_new_tokens=8, do_sample=False) for run in (model, base)]
    assert torch.equal(*generated)
