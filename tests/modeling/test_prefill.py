"""A long prefill makes no matrix of tokens by tokens, in chunks of queries it is the same, and 4-D masks still pass."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from largest import Largest
from transformers import StaticCache

from hylo.modeling import HyloForCausalLM

OPS = sys.modules["hylo.ops.latent_attention"]
MODELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "attention": (["attention"], {}),
    "attention of all heads": (["attention"], {"num_key_value_heads": 4}),
    "mla": (["mla"], {}),
    "mla-qwen3": (["mla"], {"qk_norm": True, "base_model_type": "qwen3"}),
    "mla of wide values": (["mla"], {"v_head_dim": 24}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., HyloForCausalLM]) -> HyloForCausalLM:
    mixers, changes = MODELS[request.param]
    return make_model(mixers, **changes)


@pytest.mark.parametrize(
    "kind", ["whole", "padded", "padded training", "padded with a cache", "in two calls", "packed"]
)
def test_no_matrix_of_tokens_by_tokens(model: HyloForCausalLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS, "MASK_BYTES", 1 << 20)
    ids, mask = torch.randint(1, 61, (1, 1536)), torch.ones(1, 1536, dtype=torch.long)
    mask[:, :5] = 0
    body = model.model
    with torch.set_grad_enabled(kind == "padded training"), Largest() as largest:
        match kind:
            case "whole":
                body(ids, use_cache=False)
            case "padded":
                body(ids, mask, use_cache=False)
            case "padded training":
                body.train()(ids, mask).last_hidden_state.sum().backward()
            case "padded with a cache":
                body(ids, mask, use_cache=True)
            case "in two calls":
                cache = body(ids[:, :512], use_cache=True).past_key_values
                body(ids[:, 512:], past_key_values=cache)
            case "packed":
                body(ids, cu_seq_lens_q=torch.tensor([0, 30, 1536]))
    assert 0 < largest.numel < 1536 * 1536 // 4


@torch.no_grad()
@pytest.mark.parametrize("mask_bytes", [1, 9 * 40 * 4])
def test_chunks_of_queries_change_nothing(
    model: HyloForCausalLM, mask_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = torch.randint(1, 61, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    expected = [model(ids, attention_mask=mask, use_cache=True).logits, model(ids).logits]
    monkeypatch.setattr(OPS, "MASK_BYTES", mask_bytes)
    cache = model(ids[:, :11], use_cache=True).past_key_values
    parts = [model(ids[:, :11]).logits, model(ids[:, 11:], past_key_values=cache).logits]
    actual = [model(ids, attention_mask=mask, use_cache=True).logits, torch.cat(parts, dim=1)]
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine[mask == 1], wanted[mask == 1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_masks_of_four_dimensions(model: HyloForCausalLM) -> None:
    """Boolean or additive, for a prefill and for a token decoded."""
    ids = torch.randint(1, 61, (2, 12))
    visible = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    visible[..., 2:5] &= torch.eye(12, dtype=torch.bool)[:, 2:5]  # three tokens that only they see
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.arange(12)[None]
    others = torch.tensor([0, 1, *range(5, 12)])
    expected = model(ids[:, others], position_ids=positions[:, others]).logits
    for mask in (visible, additive):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[:, others], expected, atol=1e-5, rtol=1e-4)
        first = model(ids[:, :11], mask[..., :11, :11], positions[:, :11], use_cache=True)
        last = model(ids[:, 11:], mask[..., 11:, :], positions[:, 11:], past_key_values=first.past_key_values)
        torch.testing.assert_close(last.logits[:, -1], expected[:, -1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_has_room_that_nobody_sees(make_model: Callable[..., HyloForCausalLM], padded: bool) -> None:
    model = make_model(["attention"] * 2)
    ids, mask = torch.randint(1, 61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    cache, logits = StaticCache(config=model.config, max_cache_len=20), []
    for start, end in ((0, 5), (5, 8), (8, 9)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-4)
