"""Packed documents in every operation that carries a state: each is what it is alone, in values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops import gated_delta_rule, naive_gated_delta_rule, naive_short_conv, naive_ssd, short_conv, ssd
from hylo.ops.chunks import make_chunks

Tensors = dict[str, Tensor]
LENGTHS = [[200], [1], [1, 1, 1], [3, 64, 0, 130, 1, 65, 2], [0, 128, 64, 0], [40, 7, 23]]


class Case:
    """An operation's tensors of tokens (1,T,...), those without tokens, and the documents' states, in float64."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        T, N = sum(lengths), len(lengths)
        if name.startswith("gated_delta_rule"):
            self.fast, self.naive, self.state = gated_delta_rule, naive_gated_delta_rule, "initial_state"
            q_heads = 2 if name.endswith("grouped") else 4
            self.tokens = {"q": torch.randn(1, T, q_heads, 8), "k": torch.randn(1, T, q_heads, 8)}
            self.tokens |= {"v": torch.randn(1, T, 4, 12), "g": -F.softplus(3 * torch.randn(1, T, 4))}
            self.tokens |= {"beta": torch.rand(1, T, 4)}
            self.others, states = {}, torch.randn(N, 4, 8, 12)
            self.options = {"use_qk_l2norm": True, "output_final_state": True}
        elif name.startswith("ssd"):
            self.fast, self.naive, self.state = ssd, naive_ssd, "initial_state"
            groups = 2 if name.endswith("grouped") else 4
            self.tokens = {"x": torch.randn(1, T, groups, 6), "dt": torch.randn(1, T, 4)}
            self.tokens |= {"B": torch.randn(1, T, groups, 5), "C": torch.randn(1, T, 4, 5)}
            self.others = {"A_log": torch.randn(4), "D": torch.randn(4), "dt_bias": torch.randn(4)}
            states, self.options = torch.randn(N, 4, 6, 5), {"output_final_state": True}
        else:
            self.fast, self.naive, self.state = short_conv, naive_short_conv, "state_NCS"
            self.tokens, states, self.options = {"x_BTC": torch.randn(1, T, 6)}, torch.randn(N, 6, 3), {}
            self.others = {"weight_C1W": torch.randn(6, 1, 4), "bias_C": torch.randn(6)}
        self.tokens, self.others = (
            {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
            for tensors in (self.tokens, self.others)
        )
        self.states: Tensor | None = states.double().requires_grad_()
        self.leaves = [*self.tokens.values(), *self.others.values(), self.states]

    def packed(self, run: Callable[..., tuple[Tensor, Tensor]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        states = {self.state: self.states}
        return run(**self.tokens, **self.others, **states, **self.options, cu_seqlens=bounds)

    def alone(self, run: Callable[..., tuple[Tensor, Tensor]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """An empty document keeps its state."""
        outputs, states, start = [], [], 0
        for length, state in zip(lengths, self.states.split(1), strict=True):
            tokens = {name: tensor[:, start : start + length] for name, tensor in self.tokens.items()}
            start += length
            if length:
                output, state = run(**tokens, **self.others, **{self.state: state}, **self.options)
                outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)


CASES = ["gated_delta_rule", "gated_delta_rule-grouped", "ssd", "ssd-grouped", "short_conv"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_documents_are_what_they_are_alone(name: str, lengths: list[int]) -> None:
    case, results, weights = Case(name, lengths), [], None
    for outputs in (
        case.alone(case.naive, lengths),
        case.packed(case.naive, lengths),
        case.packed(case.fast, lengths),
        case.alone(case.fast, lengths),
    ):
        weights = weights or [torch.randn_like(output) for output in outputs]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append((*outputs, *torch.autograd.grad(loss, case.leaves)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_states_start_at_zero(name: str) -> None:
    case, lengths = Case(name, [5, 70, 1]), [5, 70, 1]
    case.states = torch.zeros_like(case.states)
    outputs = case.packed(case.naive, lengths)
    case.states = None
    for run in (case.fast, case.naive):
        for actual, expected in zip(case.packed(run, lengths), outputs, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_empty_documents(name: str) -> None:
    """As where a call sees nothing but padding."""
    case = Case(name, [0, 0])
    output, states = case.packed(case.fast, [0, 0])
    assert output.shape[1] == 0
    torch.testing.assert_close(states, case.states)


@pytest.mark.parametrize("name", CASES)
def test_bounds_that_do_not_fit(name: str) -> None:
    case = Case(name, [6])
    for lengths in ([5], [4, -1, 3], [7]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
            case.packed(case.fast, lengths)
    case.tokens = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in case.tokens.items()}
    with pytest.raises(ValueError, match="one packed row; got a batch of 2"):
        case.packed(case.fast, [6])


def test_documents_are_not_padded_to_the_longest() -> None:
    chunks = make_chunks(torch.empty(1, 1000), torch.tensor([0, 900, 910, 1000]), 64)
    assert sum(chunks.steps) == 15 + 1 + 2 and len(chunks.steps) == 15
