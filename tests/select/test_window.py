"""One layer of a base that sees a window, against transformers' own sliding windows."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hylo.select.window import windowed

FIGURES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IDS = torch.arange(30)[None] * 7 % 61


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_as_a_sliding_layer_of_transformers(layer: int, implementation: str) -> None:
    kinds = ["sliding_attention" if i == layer else "full_attention" for i in range(3)]
    window = {"use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    base = Qwen2ForCausalLM(Qwen2Config(**FIGURES, attn_implementation=implementation)).eval()
    reference = Qwen2ForCausalLM(Qwen2Config(**FIGURES, **window, attn_implementation=implementation)).eval()
    reference.load_state_dict(base.state_dict())
    with torch.no_grad():
        plain = base(IDS, use_cache=False).logits
        with windowed(base, layer, 5, 30):
            narrow = base(IDS, use_cache=False).logits
        torch.testing.assert_close(narrow, reference(IDS, use_cache=False).logits)
        assert not torch.allclose(narrow, plain, atol=1e-3)
        torch.testing.assert_close(base(IDS, use_cache=False).logits, plain, rtol=0, atol=0)


def test_a_window_as_long_as_the_row_changes_nothing() -> None:
    base = LlamaForCausalLM(LlamaConfig(**FIGURES)).eval()
    with torch.no_grad(), windowed(base, 1, 30, 30):
        narrow = base(IDS, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(narrow, base(IDS, use_cache=False).logits)
