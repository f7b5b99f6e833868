"""MLA's output through a sigmoid gate: what it computes, and that caches, padding and packing know nothing of it."""

from collections.abc import Callable

import pytest
import torch

from hylo.modeling import HyloForCausalLM

MakeModel = Callable[..., HyloForCausalLM]
QWEN3 = {"qk_norm": True, "base_model_type": "qwen3"}


@pytest.mark.parametrize("family", [{}, QWEN3, {"qkv_bias": True}])
def test_written_out(make_model: MakeModel, family: dict[str, object]) -> None:
    """Each channel of each head's output, before the output projection, times sigmoid(g_proj x)."""
    model = make_model(["mla"], attention_gate=True, **family).double()
    layer, x = model.model.layers[0].mixer, torch.randn(2, 9, 32, dtype=torch.float64)
    rotary = model.model.layer_inputs(x)["rotary"]
    ungated = make_model(["mla"], **family).double().model.layers[0].mixer
    state = layer.state_dict()
    gate = state.pop("g_proj.weight")
    assert gate.shape == (64, 32)
    ungated.load_state_dict(state)
    heads: list[torch.Tensor] = []
    ungated.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    ungated(x, None, rotary)
    expected = (heads[0] / (1 + torch.exp(-x @ gate.T))) @ state["o_proj.weight"].T
    torch.testing.assert_close(layer(x, None, rotary), expected)


@torch.no_grad()
@pytest.mark.parametrize("mixers", [["mla"] * 2, ["mla", "gated_deltanet", "attention"]])
def test_caches_padding_and_packing(make_model: MakeModel, mixers: list[str]) -> None:
    model, ids = make_model(mixers, attention_gate=True), torch.randint(1, 61, (2, 12))
    cache, logits = None, []
    for part in ids.split([8, 1, 2, 1], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=1e-4, rtol=0)

    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    alone = model(ids[1:, 5:]).logits
    for cached in (True, False):
        padded = model(ids, attention_mask=mask, use_cache=cached).logits
        torch.testing.assert_close(padded[1:, 5:], alone, atol=1e-4, rtol=0)

    packed = model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 12]), use_cache=False).logits
    apart = torch.cat([model(part).logits for part in ids[:1].split([5, 7], dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=0)


def test_a_gate_that_starts_at_zero_learns(make_model: MakeModel) -> None:
    model, ids = make_model(["mla"], attention_gate=True).train(), torch.randint(1, 61, (2, 12))
    gate = model.model.layers[0].mixer.g_proj.weight
    with torch.no_grad():
        gate.zero_()
    model(ids, labels=ids).loss.backward()
    assert gate.grad is not None and gate.grad.abs().min(dim=0).values.max() > 0


def test_the_bases_own_attention_has_none(make_model: MakeModel) -> None:
    model = make_model(["attention", "mla"], attention_gate=True)
    assert [name for name, _ in model.named_parameters() if "g_proj" in name] == ["model.layers.1.mixer.g_proj.weight"]
