"""A teacher kept as one vector and one number a token gives the live teacher's loss and gradient."""

import pytest
import torch
from torch import Tensor

from hylo.ops import head_tiles
from hylo.ops.divergence import cached_divergence, hidden_state_divergence, teacher_vectors


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 2000)


def inputs(dtype: torch.dtype = torch.float64, v: int = 19, teacher_v: int = 19) -> tuple[Tensor, ...]:
    return (
        torch.randn(37, 8, dtype=dtype).requires_grad_(),
        torch.randn(v, 8, dtype=dtype),
        torch.randn(37, 12, dtype=dtype),
        torch.randn(teacher_v, 12, dtype=dtype),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_live_teacher(
    dtype: torch.dtype, tolerance: float, temperature: float, reduction: str, masked: bool
) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(dtype)
    options = {"temperature": temperature, "reduction": reduction}
    options["mask"] = torch.arange(37) % 3 != 0 if masked else None
    live = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head, **options)
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head, temperature)
    assert vectors.dtype == neg_entropy.dtype == dtype and not vectors.requires_grad
    cached = cached_divergence(hidden, head, vectors, neg_entropy, **options)
    torch.testing.assert_close(cached, live, rtol=tolerance, atol=tolerance)
    (got,), (want,) = (torch.autograd.grad(3 * loss, hidden) for loss in (cached, live))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("v", "teacher_v"), [(19, 24), (24, 19)])
def test_vocabularies_are_cut_to_the_common_part(v: int, teacher_v: int) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(v=v, teacher_v=teacher_v)
    cached = cached_divergence(hidden, head[:19], *teacher_vectors(teacher_hidden, teacher_head, head))
    torch.testing.assert_close(cached, hidden_state_divergence(hidden, head, teacher_hidden, teacher_head))


def test_gradcheck() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head, 1.3)
    assert torch.autograd.gradcheck(lambda h: cached_divergence(h, head, vectors, neg_entropy, 1.3), hidden)


def test_a_bf16_teacher_gives_float32_vectors() -> None:
    hidden, head, teacher_hidden, teacher_head = (x.detach().bfloat16() for x in inputs())
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head)
    want, want_entropy = teacher_vectors(teacher_hidden.double(), teacher_head.double(), head.double())
    assert vectors.dtype == neg_entropy.dtype == torch.float32
    assert (vectors - want).norm() < 2e-2 * want.norm()  # the logits' own rounding
    torch.testing.assert_close(neg_entropy.double(), want_entropy, rtol=0, atol=0.02)


def test_autocast_keeps_a_float32_loss() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(torch.float32)
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head)
    want = cached_divergence(hidden, head, vectors, neg_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        got = cached_divergence(hidden, head, vectors, neg_entropy)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)


def test_refuses_a_head_that_trains() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head)
    with pytest.raises(ValueError, match="student_head requires a gradient, expected the frozen head"):
        cached_divergence(hidden, head.requires_grad_(), vectors, neg_entropy)


def test_names_what_does_not_fit() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    vectors, neg_entropy = teacher_vectors(teacher_hidden, teacher_head, head)
    with pytest.raises(ValueError, match=r"vectors has shape \(36, 8\), expected \(N=37, D=8\)"):
        cached_divergence(hidden, head, vectors[1:], neg_entropy)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(N=37\)"):
        cached_divergence(hidden, head, vectors, neg_entropy, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"teacher_head has shape \(19, 11\), expected \(V_t.*, D_t=12\)"):
        teacher_vectors(teacher_hidden, teacher_head[:, 1:], head)
    with pytest.raises(ValueError, match="temperature is 0.0, expected a number above 0"):
        teacher_vectors(teacher_hidden, teacher_head, head, 0.0)
