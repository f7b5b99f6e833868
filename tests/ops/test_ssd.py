"""The chunked Mamba-2 recurrence against the equations, token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops import naive_ssd, ssd


def operands(
    length: int, groups: int = 2, decay: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    """Four heads of x width 6 and state width 5, and an initial state."""
    tensors = {
        "x": torch.randn(2, length, groups, 6),
        "dt": decay * torch.randn(2, length, 4),
        "A_log": torch.randn(4),
        "B": torch.randn(2, length, groups, 5),
        "C": torch.randn(2, length, 4, 5),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, torch.randn(2, 4, 6, 5, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 37, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("decay", [0.1, 1.0, 100.0])
def test_values_and_gradients(length: int, groups: int, decay: float) -> None:
    tensors, state = operands(length, groups, decay)
    weights = torch.randn(2, length, 4, 6, dtype=torch.float64), torch.randn_like(state)
    results = []
    for function in (ssd, naive_ssd):
        y, last = function(**tensors, initial_state=state, output_final_state=True)
        assert last is not None
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        results.append((y, last, *torch.autograd.grad(loss, [*tensors.values(), state])))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=1e-8, rtol=1e-8)


def test_without_options() -> None:
    tensors, _ = operands(70)
    tensors = {name: tensors[name] for name in ("x", "dt", "A_log", "B", "C")}
    y, state = ssd(**tensors)
    torch.testing.assert_close(y, naive_ssd(**tensors)[0])
    assert state is None


@pytest.mark.parametrize("length", [1, 70])
def test_minus_infinity_stops_a_token(length: int) -> None:
    tensors, state = operands(length)
    tensors["dt"] = torch.full_like(tensors["dt"], float("-inf")).requires_grad_()
    y, last = ssd(**tensors, initial_state=state, output_final_state=True)
    torch.testing.assert_close(last, state)
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors.values())


def test_low_precision_keeps_a_float32_core() -> None:
    tensors, _ = operands(200, dtype=torch.bfloat16)
    exact: Any = naive_ssd(**{name: tensor.double() for name, tensor in tensors.items()})[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd(**tensors, output_final_state=True)
    assert y.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.01)
