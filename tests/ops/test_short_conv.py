"""The short convolution against torch's own, and its state."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops import naive_short_conv, short_conv

OPS = sys.modules["hylo.ops.short_conv"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=[1 << 18, 1], ids=["at once", "in blocks of a window"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS, "CPU_BLOCK", request.param)


def operands(shape: tuple[int, ...], width: int, bias: bool, states: int) -> dict[str, Tensor]:
    inputs = {"x_BTC": random(*shape), "weight_C1W": random(shape[-1], 1, width)}
    inputs |= {"bias_C": random(shape[-1])} if bias else {}
    return inputs | ({"state_NCS": random(states, shape[-1], width - 1)} if states else {})


def same_as_naive(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None, with_state: bool = True) -> None:
    """Values and gradients, of the output alone or of both."""
    results, weights = [], None
    for function in (short_conv, naive_short_conv):
        outputs = function(**inputs, cu_seqlens=cu_seqlens)
        weights = weights or [torch.randn_like(output) for output in outputs]
        loss = sum((o * w).sum() for o, w in zip(outputs[: 1 + with_state], weights, strict=False))
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 20])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients(length: int, width: int, bias: bool, with_state: bool) -> None:
    inputs = operands((2, length, 6), width, bias, 2 * with_state)
    same_as_naive(inputs, with_state=width > 1)
    same_as_naive(inputs, with_state=False)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("lengths", [[20], [7, 13], [1, 2, 3, 4, 5, 5], [0, 4, 0, 0, 16, 0], [1] * 20])
@pytest.mark.parametrize("with_state", [False, True])
def test_documents_see_themselves(lengths: list[int], with_state: bool) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    same_as_naive(operands((1, 20, 6), 4, True, len(lengths) * with_state), bounds)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("bounds", [None, [0, 1, 3, 7]])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_gradients_by_differences(length: int, bounds: list[int] | None) -> None:
    if bounds is not None and length != bounds[-1]:
        bounds = [0, 0, length]
    rows, states = (2, 2) if bounds is None else (1, len(bounds) - 1)
    inputs = operands((rows, length, 3), 4, True, states)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    assert torch.autograd.gradcheck(lambda *tensors: short_conv(*tensors, cu_seqlens), tuple(inputs.values()))


@pytest.mark.parametrize("asked", [["x_BTC"], ["weight_C1W"], ["bias_C"], ["state_NCS"], ["x_BTC", "bias_C"]])
def test_only_what_trains_gets_a_gradient(asked: list[str]) -> None:
    inputs = operands((2, 9, 6), 4, True, 2)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in asked)
    outputs = [function(**inputs)[0].square().sum() for function in (short_conv, naive_short_conv)]
    wanted = [torch.autograd.grad(output, [inputs[name] for name in asked]) for output in outputs]
    for fast, naive in zip(*wanted, strict=True):
        torch.testing.assert_close(fast, naive)


def test_inputs_of_any_layout() -> None:
    """A slice of a wider projection, and a gradient that is one number for all."""
    wide = random(2, 9, 10)
    weight = random(6, 1, 4)
    results = []
    for function in (short_conv, naive_short_conv):
        results.append(torch.autograd.grad(function(wide[..., 2:8], weight)[0].sum(), (wide, weight)))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive)


@pytest.mark.parametrize("cuts", [[2, 7], [1] * 9, [4, 1, 1, 3]])
@pytest.mark.parametrize("bias", [False, True])
def test_state_carries_on(cuts: list[int], bias: bool) -> None:
    x, weight, bias_C = torch.randn(2, 9, 6), torch.randn(6, 1, 4), torch.randn(6) if bias else None
    whole, last = short_conv(x, weight, bias_C)
    state, outputs = None, []
    for part in x.split(cuts, dim=1):
        y, state = short_conv(part, weight, bias_C, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_the_state_does_not_keep_the_inputs() -> None:
    _, state = short_conv(torch.randn(1, 1000, 6), torch.randn(6, 1, 4))
    assert state.untyped_storage().nbytes() == 3 * 6 * 4


@pytest.mark.parametrize("length", [1, 40])
def test_sums_are_in_float32(length: int) -> None:
    x, weight, state = torch.randn(1, length, 64), torch.randn(64, 1, 4), torch.randn(1, 64, 3)
    x, weight, state = (t.bfloat16().requires_grad_() for t in (x, weight, state))
    exact = short_conv(*(t.double() for t in (x, weight)), state_NCS=state.double())[0]
    y, last = short_conv(x, weight, state_NCS=state)
    assert y.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), atol=0, rtol=0.004)
    gradients = [torch.autograd.grad(each.double().sum(), (x, weight, state)) for each in (y, exact)]
    for rounded, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(rounded, wanted, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_BTC": torch.randn(9, 6)}, "x has shape (9, 6), expected (B, T, C)"),
        ({"weight_C1W": torch.randn(6, 4)}, "weight has shape (6, 4), expected (C=6, 1, W)"),
        ({"weight_C1W": torch.randn(5, 1, 4)}, "weight has shape (5, 1, 4), expected (C=6, 1, W)"),
        ({"bias_C": torch.randn(5)}, "bias has shape (5,), expected (C=6)"),
        ({"state_NCS": torch.randn(2, 6, 4)}, "state has shape (2, 6, 4), expected (N, C, W-1) = (2, 6, 3)"),
        ({"state_NCS": torch.randn(1, 6, 3)}, "state has shape (1, 6, 3), expected (N, C, W-1) = (2, 6, 3)"),
        ({"x_BTC": torch.ones(2, 9, 6).long()}, "x is torch.int64, expected a floating-point type"),
        ({"bias_C": torch.randn(6, device="meta")}, "bias is on meta, expected cpu as the first argument"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "2"),
        ({"x_BTC": torch.randn(1, 9, 6), "cu_seqlens": torch.tensor([0, 8])}, "9"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x_BTC": torch.randn(2, 9, 6), "weight_C1W": torch.randn(6, 1, 4)} | changes
    with pytest.raises(ValueError) as error:
        short_conv(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
