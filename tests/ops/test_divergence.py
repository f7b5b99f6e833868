import pytest
import torch
from torch import Tensor

from hylo.ops import divergence
from hylo.ops.divergence import Kind, hidden_state_divergence, naive_divergence

KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl")


def inputs(
    n: int = 37, v: int = 19, teacher_v: int = 19, d: int = 8, teacher_d: int = 12, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(n, d, dtype=dtype).requires_grad_(),
        torch.randn(v, d, dtype=dtype).requires_grad_(),
        torch.randn(n, teacher_d, dtype=dtype),
        torch.randn(teacher_v, teacher_d, dtype=dtype),
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(divergence, "TILE_ROWS", 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_naive_form(kind: Kind, temperature: float, reduction: str, masked: bool) -> None:
    args = inputs()
    options = {"kind": kind, "temperature": temperature, "reduction": reduction}
    options["mask"] = torch.arange(37) % 3 != 0 if masked else None
    fast, slow = hidden_state_divergence(*args, **options), naive_divergence(*args, **options)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)
    assert fast.dtype == torch.float64
    # Scaled by 3, so that a loss that is not the last step of the graph is covered too.
    for got, want in zip(torch.autograd.grad(3 * fast, args[:2]), torch.autograd.grad(3 * slow, args[:2]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(n=6, v=7, teacher_v=7, d=3, teacher_d=4)
    assert torch.autograd.gradcheck(
        lambda h, w: hidden_state_divergence(h, w, teacher_hidden, teacher_head, kind=kind, temperature=1.3),
        (hidden, head),
    )


def test_agrees_with_torch_kl_div() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(dtype=torch.float32)
    want = torch.nn.functional.kl_div(
        torch.log_softmax(hidden @ head.T, -1),
        torch.softmax(teacher_hidden @ teacher_head.T, -1),
        reduction="batchmean",
    )
    torch.testing.assert_close(hidden_state_divergence(hidden, head, teacher_hidden, teacher_head), want)


@pytest.mark.parametrize(("v", "teacher_v"), [(19, 24), (24, 19)])
def test_vocabularies_are_cut_to_the_common_part(v: int, teacher_v: int) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(v=v, teacher_v=teacher_v)
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head)
    torch.testing.assert_close(loss, naive_divergence(hidden, head[:19], teacher_hidden, teacher_head[:19]))
    loss.backward()
    assert head.grad is not None and head.grad.shape == head.shape
    assert head.grad[19:].count_nonzero() == 0


def test_gradient_goes_only_where_something_trains() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    head.requires_grad_(False)
    teacher_hidden.requires_grad_()
    hidden_state_divergence(hidden, head, teacher_hidden, teacher_head).backward()
    assert hidden.grad is not None and head.grad is None and teacher_hidden.grad is None


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    hidden, head, *_ = inputs(dtype=torch.float32)
    loss = hidden_state_divergence(hidden, head, hidden.detach().clone(), head.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-6


def test_an_empty_mask_gives_zero() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head, mask=torch.zeros(37, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.count_nonzero() == 0


def test_huge_logits_stay_finite() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(dtype=torch.float32)
    loss = hidden_state_divergence(hidden * 1e3, head, teacher_hidden * 1e3, teacher_head)
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_autocast_multiplies_in_bf16_and_sums_in_float32() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(n=64, dtype=torch.float32)
    want = naive_divergence(hidden, head, teacher_hidden, teacher_head)
    want_hidden, want_head = torch.autograd.grad(want, (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head)
    got.backward()
    assert got.dtype == torch.float32 and hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == head.grad.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    for gradient, reference in ((hidden.grad, want_hidden), (head.grad, want_head)):
        assert not torch.equal(gradient, reference)
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_bf16_inputs_get_bf16_gradients() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(dtype=torch.bfloat16)
    hidden_state_divergence(hidden, head, teacher_hidden, teacher_head).backward()
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == head.grad.dtype == torch.bfloat16
