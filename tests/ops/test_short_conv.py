"""The short convolution against torch's own, and its state."""

import pytest
import torch
from torch import Tensor

from hylo.ops import naive_short_conv, short_conv


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients(length: int, bias: bool, with_state: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = [random(2, length, 6), random(6, 1, 4)]
    inputs += [random(6)] if bias else []
    inputs += [random(2, 6, 3)] if with_state else []
    weights = torch.randn(2, length, 6, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    results = []
    for function in (short_conv, naive_short_conv):
        y, state = function(*inputs[:2], inputs[2] if bias else None, inputs[-1] if with_state else None)
        loss = (y * weights[0]).sum() + (state * weights[1]).sum()
        results.append((y, state, *torch.autograd.grad(loss, inputs)))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive)


def test_state_carries_on() -> None:
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 1, 4)
    whole, last = short_conv(x, weight)
    first, state = short_conv(x[:, :2], weight)
    second, state = short_conv(x[:, 2:], weight, state_NCS=state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(state, last)
