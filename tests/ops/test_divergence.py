import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops import head_products, head_tiles
from hylo.ops.divergence import KINDS, Kind, hidden_state_divergence, naive_divergence


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
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(head_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(head_tiles, "BLOCK_ELEMENTS", 40)
    monkeypatch.setattr(head_products, "CPU_COLUMNS", 8)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_naive_form(kind: Kind, temperature: float, reduction: str, masked: bool, biased: bool) -> None:
    args = inputs(v=23)
    options: dict[str, Any] = {"kind": kind, "temperature": temperature, "reduction": reduction, "beta": 0.3}
    trained = list(args[:2])
    if masked:
        options["mask"] = torch.arange(37) % 3 != 0
    if biased:
        options["student_bias"] = torch.randn(23, dtype=torch.float64).requires_grad_()
        options["teacher_bias"] = torch.randn(19, dtype=torch.float64)
        trained.append(options["student_bias"])
    fast, slow = hidden_state_divergence(*args, **options), naive_divergence(*args, **options)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)
    assert fast.dtype == torch.float64
    # Scaled by 3, so that a loss that is not the last step of the graph is covered too.
    for got, want in zip(torch.autograd.grad(3 * fast, trained), torch.autograd.grad(3 * slow, trained), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [8, 64])
@pytest.mark.parametrize("onednn", [False, True])
def test_float32_is_off_by_its_rounding(
    kind: Kind, columns: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_products, "CPU_COLUMNS", columns)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    exact = inputs(n=70, v=83, teacher_v=83, d=16)
    bias = torch.randn(83, dtype=torch.float64).requires_grad_()
    rounded = [x.detach().float().requires_grad_(x.requires_grad) for x in (*exact, bias)]
    options: dict[str, Any] = {"kind": kind, "temperature": 1.7, "mask": torch.rand(70)}
    slow = naive_divergence(*exact, **options, student_bias=bias)
    fast = hidden_state_divergence(*rounded[:4], **options, student_bias=rounded[4])
    fast.backward()
    torch.testing.assert_close(fast.double(), slow, rtol=2e-6, atol=1e-6)
    for x, want in zip((*rounded[:2], rounded[4]), torch.autograd.grad(slow, (*exact[:2], bias)), strict=True):
        assert x.grad is not None
        assert (x.grad - want).norm() < 1e-5 * want.norm()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(n=6, v=7, teacher_v=7, d=3, teacher_d=4)
    bias = torch.randn(7, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"kind": kind, "temperature": 1.3, "beta": 0.8}
    assert torch.autograd.gradcheck(
        lambda h, w, b: hidden_state_divergence(h, w, teacher_hidden, teacher_head, **options, student_bias=b),
        (hidden, head, bias),
    )


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9])
def test_jsd_is_the_paper_s(beta: float) -> None:
    args = inputs()
    p = torch.softmax(args[2] @ args[3].T, -1)
    q = torch.softmax(args[0] @ args[1].T, -1)
    m = beta * p + (1 - beta) * q
    want = beta * (p * (p / m).log()).sum(-1).mean() + (1 - beta) * (q * (q / m).log()).sum(-1).mean()
    torch.testing.assert_close(hidden_state_divergence(*args, kind="jsd", beta=beta), want)


@pytest.mark.parametrize(("beta", "factor", "limit"), [(1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")])
def test_jsd_tends_to_the_kls(beta: float, factor: float, limit: Kind) -> None:
    args = inputs(d=2, teacher_d=2)
    jsd = hidden_state_divergence(*args, kind="jsd", beta=beta) / factor
    torch.testing.assert_close(jsd, hidden_state_divergence(*args, kind=limit), rtol=1e-3, atol=0)


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


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_computes_nothing_for_what_does_not_train(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("times_head", "add_head_gradient"):
        function = getattr(head_products, name)
        monkeypatch.setattr(head_products, name, lambda *a, f=function, n=name: called.append(n) or f(*a))
    *args, teacher_hidden, teacher_head = inputs()
    args.append(torch.randn(19, dtype=torch.float64).requires_grad_())
    for i in frozen:
        args[i].requires_grad_(False)
    loss = hidden_state_divergence(args[0], args[1], teacher_hidden, teacher_head, student_bias=args[2])
    assert ("times_head" in called, "add_head_gradient" in called) == (0 not in frozen, 1 not in frozen)
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    assert [x.grad is not None for x in args] == [i not in frozen for i in range(3)]


def test_computes_no_gradient_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    want = hidden_state_divergence(*args)
    monkeypatch.delattr(head_products, "times_head")
    monkeypatch.delattr(head_products, "add_head_gradient")
    with torch.no_grad():
        assert torch.equal(hidden_state_divergence(*args), want)


def test_a_kept_graph_can_be_gone_through_again() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head)
    want = torch.autograd.grad(naive_divergence(hidden, head, teacher_hidden, teacher_head), (hidden, head))
    kept = []
    for factor in (0.0, 4.0, 4.0, 1.0, -2.0):
        kept.append((factor, torch.autograd.grad(loss, (hidden, head), loss.new_tensor(factor), retain_graph=True)))
    for factor, gradients in kept:
        for got, once in zip(gradients, want, strict=True):
            torch.testing.assert_close(got, factor * once)


def test_the_head_s_gradient_is_not_copied() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head)
    saved = loss.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[union-attr]
    (loss / 4).backward()
    assert head.grad is not None and head.grad.data_ptr() == saved


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind: Kind) -> None:
    hidden, head, *_ = inputs(dtype=torch.float32)
    loss = hidden_state_divergence(hidden, head, hidden.detach().clone(), head.detach().clone(), kind=kind)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-6


def test_an_empty_mask_gives_zero() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs()
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head, mask=torch.zeros(37, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_huge_logits_stay_finite(kind: Kind, scale: float) -> None:
    """And so do probabilities that are zero in float32, in one model or in both."""
    hidden, head, teacher_hidden, teacher_head = inputs(dtype=torch.float32)
    loss = hidden_state_divergence(hidden * scale, head, teacher_hidden * scale, teacher_head, kind=kind)
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()
    assert head.grad is not None and head.grad.isfinite().all()
    if kind == "jsd":
        assert 0.0 <= loss.item() <= math.log(2)


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


def test_no_tokens_give_zero() -> None:
    hidden, head, teacher_hidden, teacher_head = inputs(n=0)
    loss = hidden_state_divergence(hidden, head, teacher_hidden, teacher_head)
    loss.backward()
    assert loss.item() == 0.0 and head.grad is not None and head.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_head": torch.ones(19, 7)}, r"student_head has shape \(19, 7\), expected \(V_s.*, D_s=8\)"),
        ({"teacher_hidden": torch.ones(3, 12)}, r"teacher_hidden has shape \(3, 12\), expected \(N=37, D_t.*\)"),
        ({"teacher_head": torch.ones(19)}, r"teacher_head has shape \(19,\), expected \(V_t, D_t=12\)"),
        ({"student_head": torch.ones(19, 8).long()}, "student_head is torch.int64, expected a floating-point type"),
        ({"student_bias": torch.ones(4)}, r"student_bias has shape \(4,\), expected \(V_s=19\)"),
        ({"teacher_bias": torch.ones(4)}, r"teacher_bias has shape \(4,\), expected \(V_t=19\)"),
        ({"teacher_head": torch.ones(19, 12, device="meta")}, "teacher_head is on meta, expected cpu"),
        ({"mask": torch.ones(36)}, r"mask has shape \(36,\), expected \(N=37\)"),
        ({"mask": torch.ones(37, device="meta")}, "mask is on meta, expected cpu"),
        ({"mask": torch.ones(37, dtype=torch.complex64)}, "mask is torch.complex64, expected a real type"),
        ({"kind": "kl"}, "kind is 'kl', expected one of 'forward_kl', 'reverse_kl', 'jsd'"),
        ({"reduction": "none"}, "reduction is 'none', expected one of 'mean', 'sum'"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected a number above 0"),
        ({"beta": 1.0}, "beta is 1.0, expected a number between 0 and 1, neither included"),
        ({"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_names_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, inputs(dtype=torch.float32), strict=True)) | options
    with pytest.raises(ValueError, match=f"^hidden_state_divergence: {message}") as error:
        hidden_state_divergence(**arguments)
    assert "\n" not in str(error.value)
