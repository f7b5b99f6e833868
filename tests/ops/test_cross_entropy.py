from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops import head_products, head_tiles
from hylo.ops.cross_entropy import hidden_state_cross_entropy, naive_cross_entropy


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(head_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(head_tiles, "BLOCK_ELEMENTS", 40)
    monkeypatch.setattr(head_products, "CPU_COLUMNS", 8)


def inputs(n: int = 37, v: int = 19, d: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    labels = torch.randint(v, (n,))
    labels[::4] = -100
    return torch.randn(n, d, dtype=dtype).requires_grad_(), torch.randn(v, d, dtype=dtype).requires_grad_(), labels


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_naive_form(
    reduction: str, masked: bool, biased: bool, dtype: torch.dtype, tolerance: float
) -> None:
    args = inputs(dtype=dtype)
    trained, options = list(args[:2]), {}
    if masked:
        options["mask"] = torch.arange(37) % 3 != 0
    if biased:
        options["bias"] = torch.randn(19, dtype=dtype).requires_grad_()
        trained.append(options["bias"])
    fast = hidden_state_cross_entropy(*args, reduction=reduction, **options)
    slow = naive_cross_entropy(*args, reduction=reduction, **options)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(3 * fast, trained), torch.autograd.grad(3 * slow, trained), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_agrees_with_torch() -> None:
    hidden, head, labels = inputs()
    want = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(hidden_state_cross_entropy(hidden, head, labels), want)


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck() -> None:
    hidden, head, labels = inputs(n=6, v=7, d=3)
    bias = torch.randn(7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: hidden_state_cross_entropy(h, w, labels, bias=b), (hidden, head, bias)
    )


def test_no_labels_give_zero() -> None:
    hidden, head, labels = inputs()
    loss = hidden_state_cross_entropy(hidden, head, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None and hidden.grad.count_nonzero() == 0


def test_gradient_goes_only_where_something_trains() -> None:
    hidden, head, labels = inputs()
    head.requires_grad_(False)
    hidden_state_cross_entropy(hidden, head, labels).backward()
    assert hidden.grad is not None and head.grad is None


def test_bf16_inputs_get_bf16_gradients() -> None:
    hidden, head, labels = inputs(dtype=torch.bfloat16)
    loss = hidden_state_cross_entropy(hidden, head, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == head.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, naive_cross_entropy(hidden, head, labels).float(), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((37,), 19)}, "labels holds 19, expected -100 or 0 to 18"),
        ({"labels": torch.full((37,), -1)}, "labels holds -1, expected -100 or 0 to 18"),
        ({"labels": torch.zeros(37)}, "labels is torch.float32, expected torch.int64"),
        ({"labels": torch.zeros(36).long()}, r"labels has shape \(36,\), expected \(N=37\)"),
        ({"head": torch.ones(19, 7)}, r"head has shape \(19, 7\), expected \(V.*, D=8\)"),
        ({"bias": torch.ones(7)}, r"bias has shape \(7,\), expected \(V=19\)"),
        ({"mask": torch.ones(7)}, r"mask has shape \(7,\), expected \(N=37\)"),
        ({"reduction": "none"}, "reduction is 'none', expected one of 'mean', 'sum'"),
    ],
)
def test_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("hidden", "head", "labels"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=f"^hidden_state_cross_entropy: {message}"):
        hidden_state_cross_entropy(**arguments)
