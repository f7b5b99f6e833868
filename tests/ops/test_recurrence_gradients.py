"""Gradients of the two recurrences: by finite differences, over several segments, and under strong decay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops import chunks, gated_delta, gated_delta_rule, naive_gated_delta_rule, naive_ssd, ssd

Recurrence = Callable[..., tuple[Tensor, Tensor]]
LENGTHS = [7, 0, 9, 1]  # of packed documents


@pytest.fixture(params=["one segment", "a step a segment"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one segment":
        monkeypatch.setitem(chunks.SEGMENT_BYTES, "cpu", 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four tokens, so that a short sequence has several, and not a whole number of them."""
    monkeypatch.setattr(gated_delta, "CHUNK", 4)
    monkeypatch.setitem(ssd.__globals__, "CHUNK", 4)


def gated_delta_inputs(batch: int, length: int, sequences: int) -> dict[str, Tensor]:
    tensors = {
        "q": torch.randn(batch, length, 1, 3),
        "k": torch.randn(batch, length, 1, 3),
        "v": torch.randn(batch, length, 2, 2),
        "g": -torch.rand(batch, length, 2) * 3,
        "beta": torch.rand(batch, length, 2),
        "initial_state": torch.randn(sequences, 2, 3, 2),
    }
    return {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}


def ssd_inputs(batch: int, length: int, sequences: int) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(batch, length, 1, 2),
        "dt": torch.randn(batch, length, 2),
        "A_log": torch.randn(2),
        "B": torch.randn(batch, length, 1, 3),
        "C": torch.randn(batch, length, 2, 3),
        "D": torch.randn(2),
        "dt_bias": torch.randn(2),
        "initial_state": torch.randn(sequences, 2, 2, 3),
    }
    return {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.usefixtures("small_chunks", "segments")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_delta_rule-normalised", "ssd", "one token"])
def test_gradients_are_the_finite_differences(name: str, packed: bool) -> None:
    lengths = LENGTHS if packed else [1 if name == "one token" else 10] * 2
    shape = (1, sum(lengths), len(lengths)) if packed else (2, lengths[0], 2)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    make, run = (ssd_inputs, ssd) if name == "ssd" else (gated_delta_inputs, gated_delta_rule)
    inputs, options = make(*shape), {"use_qk_l2norm": True} if name.endswith("normalised") else {}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return run(**named, **options, output_final_state=True, cu_seqlens=bounds)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
def test_segments_go_on_from_each_other(name: str, packed: bool) -> None:
    """At the real chunk length, rows of several chunks and documents of different numbers of them."""
    lengths = [150, 40, 0, 300, 64] if packed else [200]
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    make = ssd_inputs if name == "ssd" else gated_delta_inputs
    fast, naive = (ssd, naive_ssd) if name == "ssd" else (gated_delta_rule, naive_gated_delta_rule)
    inputs = make(1 if packed else 3, sum(lengths), len(lengths) if packed else 3)
    results = []
    for run in (fast, naive):
        outputs = run(**inputs, output_final_state=True, cu_seqlens=bounds)
        loss = sum((output * output.detach().cos()).sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
        with torch.no_grad():
            for kept, plain in zip(outputs, run(**inputs, output_final_state=True, cu_seqlens=bounds), strict=True):
                assert torch.equal(kept, plain)
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-8, rtol=1e-8)


def decay_gradients(recurrence: Recurrence, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of A_log and dt_bias, at decays of exp(-200) a token next to some of nearly one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    T, H = 512, 4
    A_log = torch.linspace(0, 2.77, H).to(dtype).requires_grad_()
    dt_bias = torch.linspace(-4, 4, H).to(dtype).requires_grad_()
    dt, q, k, v, beta, weights = 3 * normal(1, T, H), *(normal(1, T, H, 32) for _ in "qkv"), normal(1, T, H), None
    weights = normal(1, T, H, 32)
    if name == "ssd":
        o, _ = recurrence(v, dt, A_log, k, q, None, dt_bias)
    else:
        g = -A_log.exp() * F.softplus(dt + dt_bias)
        assert g.min() < -150 and g.max() > -0.01
        o, _ = recurrence(q, k, v, g, beta.sigmoid(), use_qk_l2norm=True)
    gradients = torch.autograd.grad((o * weights).sum(), (A_log, dt_bias))
    return gradients[0], gradients[1]


@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
def test_strong_decay_keeps_its_gradient(name: str) -> None:
    """To 1e-6 in float64, and in float32 to what token by token, in float32, keeps: a few 1e-7."""
    fast, naive = (ssd, naive_ssd) if name == "ssd" else (gated_delta_rule, naive_gated_delta_rule)
    exact = decay_gradients(naive, name, torch.float64)
    for run, dtype, allowed in (
        (fast, torch.float64, 1e-10),
        (naive, torch.float32, 2e-6),
        (fast, torch.float32, 2e-6),
    ):
        for gradient, reference in zip(decay_gradients(run, name, dtype), exact, strict=True):
            assert (gradient.double() - reference).norm() < allowed * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_to_nothing_forgets_and_stays_finite(dtype: torch.dtype) -> None:
    inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in gated_delta_inputs(1, 9, 1).items()}
    with torch.no_grad():
        inputs["g"][:, 5] = float("-inf")
    o, state = gated_delta_rule(**inputs, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs.values())
    alone = {name: tensor.detach()[:, 5:] for name, tensor in inputs.items() if name != "initial_state"}
    torch.testing.assert_close(o[:, 5:], gated_delta_rule(**alone)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    inputs = {name: tensor.detach().clone() for name, tensor in gated_delta_inputs(1, 9, 1).items()}
    inputs["g"][0, 3, 0] = bad
    assert not gated_delta_rule(**inputs)[0].isfinite().all()
    inputs = {name: tensor.detach().clone() for name, tensor in ssd_inputs(1, 9, 1).items()}
    inputs["dt"][0, 3, 0] = bad
    assert not ssd(**inputs)[0].isfinite().all()
