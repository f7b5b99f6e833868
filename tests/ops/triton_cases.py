"""The Triton kernels against the torch form, on a CPU: run by test_divergence_triton.py with TRITON_INTERPRET=1."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops import cross_entropy, divergence, divergence_triton, head_tiles
from hylo.ops.cross_entropy import hidden_state_cross_entropy
from hylo.ops.divergence import KINDS, Kind, hidden_state_divergence, naive_divergence


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(head_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(divergence_triton, "BLOCK", 16)


def use(kernels: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (divergence, cross_entropy):
        monkeypatch.setattr(module, "row_kernels", lambda hidden: kernels)


def inputs(n: int = 7, v: int = 37, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    tensors = [torch.randn(n, 8), torch.randn(v, 8), torch.randn(n, 12), torch.randn(v + 5, 12)]
    tensors = [(x * scale if i % 2 == 0 else x).to(dtype) for i, x in enumerate(tensors)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [16, 37])
@pytest.mark.parametrize("options", [{"temperature": 1.7, "beta": 0.2, "mask": 1}, {"bias": 1, "reduction": "sum"}])
def test_divergence(kind: Kind, v: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = inputs(v=v), dict(options)
    trained = args[:2]
    if options.pop("mask", None):
        options["mask"] = torch.rand(7)
    if options.pop("bias", None):
        options |= {"student_bias": torch.randn(v).requires_grad_(), "teacher_bias": torch.randn(v + 5)}
        trained.append(options["student_bias"])
    results = []
    for kernels in (divergence_triton, None):
        use(kernels, monkeypatch)
        loss = hidden_state_divergence(*args, kind=kind, **options)
        results.append((loss, *torch.autograd.grad(3 * loss, trained)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in args]
    want = naive_divergence(*exact, kind=kind)
    use(divergence_triton, monkeypatch)
    got = hidden_state_divergence(*args, kind=kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0)
    gradients = zip(torch.autograd.grad(got, args[:2]), torch.autograd.grad(want, exact[:2]), strict=True)
    for gradient, reference in gradients:
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    use(divergence_triton, monkeypatch)
    args = inputs(scale=1e4)
    loss = hidden_state_divergence(*args, kind=kind)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, args[:2]))
    hidden, head, *_ = inputs()
    loss = hidden_state_divergence(hidden, head, hidden.detach().clone(), head.detach().clone(), kind=kind)
    assert abs(loss.item()) < 1e-6
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("v", [1, 16, 37])
def test_cross_entropy(biased: bool, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, *_ = inputs(v=v)
    labels = torch.randint(v, (7,))
    labels[2] = -100
    bias = torch.randn(v).requires_grad_() if biased else None
    trained = [hidden, head] if bias is None else [hidden, head, bias]
    results = []
    for kernels in (divergence_triton, None):
        use(kernels, monkeypatch)
        loss = hidden_state_cross_entropy(hidden, head, labels, bias=bias)
        results.append((loss, *torch.autograd.grad(3 * loss, trained)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-5, atol=1e-5)
