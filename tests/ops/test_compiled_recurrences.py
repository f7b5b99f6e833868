"""The recurrences under torch.compile: one operation each, whose shapes and gradients it is told."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hylo.ops import gated_delta, gated_delta_rule, ssd

BOUNDS = torch.tensor([0, 3, 3, 70, 90])


def gated_delta_inputs(batch: int, length: int, sequences: int) -> dict[str, Tensor]:
    tensors = {
        "q": torch.randn(batch, length, 2, 8),
        "k": torch.randn(batch, length, 2, 8),
        "v": torch.randn(batch, length, 4, 6),
        "g": -torch.rand(batch, length, 4),
        "beta": torch.rand(batch, length, 4),
        "initial_state": torch.randn(sequences, 4, 8, 6),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ssd_inputs(batch: int, length: int, sequences: int) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(batch, length, 2, 8),
        "dt": torch.randn(batch, length, 4),
        "A_log": torch.randn(4),
        "B": torch.randn(batch, length, 2, 6),
        "C": torch.randn(batch, length, 4, 6),
        "D": torch.randn(4),
        "initial_state": torch.randn(sequences, 4, 8, 6),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("run", "make"), [(gated_delta_rule, gated_delta_inputs), (ssd, ssd_inputs)])
def test_compiled_is_the_same(
    run: Callable[..., tuple[Tensor, Tensor]], make: Callable[..., dict[str, Tensor]], packed: bool
) -> None:
    inputs = make(1, 90, 4) if packed else make(2, 90, 2)
    bounds = BOUNDS if packed else None

    def function(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return run(**tensors, output_final_state=True, cu_seqlens=bounds)

    results = []
    for form in (function, torch.compile(function, backend="aot_eager", fullgraph=not packed)):
        outputs = form(inputs)
        loss = sum((output * output.detach().cos()).sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
        with torch.no_grad():
            results[-1] += form(inputs)
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_operations_are_registered_right() -> None:
    t = gated_delta_inputs(2, 70, 2)
    torch.library.opcheck(gated_delta._chunked, (*t.values(), 0.3, True, None, True, False, True))
    t = ssd_inputs(2, 70, 2)
    g = -torch.rand(2, 70, 4).requires_grad_()
    arguments = (t["x"], t["dt"], g, t["B"], t["C"], t["D"], t["initial_state"], None, True)
    torch.library.opcheck(ssd.__globals__["_chunked"], arguments)
