"""Absorbed and expanded attention over a latent are one function; the expanded one is checked by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hylo.ops import absorbed_latent_attention, expanded_latent_attention

KV_HEADS, NOPE, ROPE, V, RANK = 2, 6, 4, 5, 7


def operands(queries: int, tokens: int) -> list[Tensor]:
    """q for 6 heads, the latent, the shared rotated key, the up-projection and its bias."""
    shapes: list[tuple[int, ...]] = [(2, 6, queries, NOPE + ROPE), (2, tokens, RANK), (2, tokens, ROPE)]
    shapes += [(KV_HEADS * (NOPE + V), RANK), (KV_HEADS * (NOPE + V),)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("mask_kind", ["none", "boolean", "additive"])
def test_absorbed_is_expanded(queries: int, with_scale: bool, mask_kind: str) -> None:
    inputs = operands(queries, 9)
    key_scale = torch.rand(2, KV_HEADS, 9, dtype=torch.float64, requires_grad=True) if with_scale else None
    visible = torch.rand(2, 1, queries, 9) > 0.3
    visible[..., 0] = True
    if mask_kind == "none":
        visible[:] = True
    mask = visible if mask_kind == "boolean" else torch.zeros(visible.shape).masked_fill(~visible, -1e9).double()
    weights = torch.randn(2, 6, queries, V, dtype=torch.float64)
    leaves = inputs + ([key_scale] if key_scale is not None else [])
    results = []
    for function in (expanded_latent_attention, absorbed_latent_attention):
        passed = None if mask_kind == "none" and function is absorbed_latent_attention else mask
        o = function(*inputs, KV_HEADS, 0.3, passed, key_scale)
        results.append((o, *torch.autograd.grad((o * weights).sum(), leaves)))
    for expanded, absorbed in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, expanded)


def test_expanded_head_by_head() -> None:
    q, latent, key_rope, up_weight, up_bias = operands(9, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    o = expanded_latent_attention(q, latent, key_rope, up_weight, up_bias, KV_HEADS, 0.3)
    for head in range(6):
        rows = up_weight.view(KV_HEADS, NOPE + V, RANK)[head // 3]  # three query heads read one kv head
        bias = up_bias.view(KV_HEADS, NOPE + V)[head // 3]
        k = torch.cat((latent @ rows[:NOPE].T + bias[:NOPE], key_rope), dim=-1)
        logits = (q[:, head] @ k.transpose(1, 2) * 0.3).masked_fill(~causal, float("-inf"))
        torch.testing.assert_close(o[:, head], logits.softmax(-1) @ (latent @ rows[NOPE:].T + bias[NOPE:]))


@pytest.mark.parametrize("function", [expanded_latent_attention, absorbed_latent_attention])
def test_a_query_that_sees_nothing_is_finite(function: Callable[..., Tensor]) -> None:
    o = function(*operands(1, 9), KV_HEADS, 0.3, torch.zeros(2, 1, 1, 9, dtype=torch.bool))
    assert o.isfinite().all()
