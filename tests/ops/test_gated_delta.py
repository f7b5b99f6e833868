"""The chunked gated delta rule against the equations, token by token."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops import gated_delta_rule, naive_gated_delta_rule


def operands(
    length: int, q_heads: int = 4, decay: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v, g, beta for 4 value heads, and an initial state."""
    tensors = {
        "q": torch.randn(2, length, q_heads, 8),
        "k": torch.randn(2, length, q_heads, 8),
        "v": torch.randn(2, length, 4, 12),
        "g": -decay * F.softplus(3 * torch.randn(2, length, 4)),
        "beta": torch.rand(2, length, 4),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, torch.randn(2, 4, 8, 12, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 37, 64, 65, 200])
@pytest.mark.parametrize("q_heads", [2, 4])
@pytest.mark.parametrize("decay", [0.01, 1.0, 100.0])
def test_values_and_gradients(length: int, q_heads: int, decay: float) -> None:
    tensors, state = operands(length, q_heads, decay)
    weights = torch.randn(2, length, 4, 12, dtype=torch.float64), torch.randn_like(state)
    results = []
    for function in (gated_delta_rule, naive_gated_delta_rule):
        o, last = function(**tensors, initial_state=state, output_final_state=True, use_qk_l2norm=True)
        assert last is not None
        loss = (o * weights[0]).sum() + (last * weights[1]).sum()
        results.append((o, last, *torch.autograd.grad(loss, [*tensors.values(), state])))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", [2, 64, 100, 200])
@pytest.mark.parametrize("leaves_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_from_a_state_of_zero(length: int, leaves_state: bool, packed: bool) -> None:
    tensors, _ = operands(length)
    bounds = None
    if packed:
        tensors = {name: tensor[:1].detach().requires_grad_() for name, tensor in tensors.items()}
        bounds = torch.tensor([0, 0, length // 2, length // 2 + 1, length])
    results = []
    for function in (gated_delta_rule, naive_gated_delta_rule):
        o, last = function(**tensors, output_final_state=leaves_state, use_qk_l2norm=True, cu_seqlens=bounds)
        loss = o.sin().sum() + (last.sin().sum() if last is not None else 0)
        results.append((o, *torch.autograd.grad(loss, list(tensors.values()))))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=1e-9, rtol=1e-9)


def test_scale_and_missing_state() -> None:
    tensors, _ = operands(70)
    expected, _ = naive_gated_delta_rule(**{**tensors, "k": F.normalize(tensors["k"], dim=-1)}, scale=0.3)
    o, state = gated_delta_rule(**{**tensors, "k": F.normalize(tensors["k"], dim=-1)}, scale=0.3)
    torch.testing.assert_close(o, expected)
    assert state is None


def test_a_sequence_in_two_calls() -> None:
    tensors, _ = operands(150)
    whole, last = gated_delta_rule(**tensors, use_qk_l2norm=True, output_final_state=True)
    first = {name: tensor[:, :80] for name, tensor in tensors.items()}
    second = {name: tensor[:, 80:] for name, tensor in tensors.items()}
    o, state = gated_delta_rule(**first, use_qk_l2norm=True, output_final_state=True)
    rest, state = gated_delta_rule(**second, use_qk_l2norm=True, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat((o, rest), dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("decay", [1.0, 1000.0])
def test_low_precision_keeps_a_float32_core(decay: float) -> None:
    tensors, _ = operands(200, decay=decay, dtype=torch.bfloat16)
    exact, _ = naive_gated_delta_rule(**{n: t.double() for n, t in tensors.items()}, use_qk_l2norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gated_delta_rule(**tensors, use_qk_l2norm=True, output_final_state=True)
    assert o.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    torch.testing.assert_close(o.double(), exact, atol=0.005, rtol=0.005)
    o.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors.values())
