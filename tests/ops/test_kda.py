"""The chunked Kimi delta rule against the equations, token by token."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops import chunks, gated_delta_rule, kimi_delta_rule, naive_kimi_delta_rule
from hylo.ops import kda as module


def operands(length: int, decay: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v, g, beta for 3 heads of 8 and 12 channels, and an initial state."""
    tensors = {
        "q": torch.randn(2, length, 3, 8),
        "k": torch.randn(2, length, 3, 8),
        "v": torch.randn(2, length, 3, 12),
        "g": -decay * F.softplus(3 * torch.randn(2, length, 3, 8)),
        "beta": torch.rand(2, length, 3),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, torch.randn(2, 3, 8, 12, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 37, 64, 65, 200])
@pytest.mark.parametrize("decay", [0.01, 1.0, 20.0, 100.0])
def test_values_and_gradients(length: int, decay: float) -> None:
    tensors, state = operands(length, decay)
    weights = torch.randn(2, length, 3, 12, dtype=torch.float64), torch.randn_like(state)
    results = []
    for function in (kimi_delta_rule, naive_kimi_delta_rule):
        o, last = function(**tensors, initial_state=state, output_final_state=True, use_qk_l2norm=True)
        assert last is not None
        loss = (o * weights[0]).sum() + (last * weights[1]).sum()
        results.append((o, last, *torch.autograd.grad(loss, [*tensors.values(), state])))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("segment_bytes", [None, 1], ids=["one segment", "a step a segment"])
@pytest.mark.parametrize("leaves_state", [False, True])
def test_packed_documents(leaves_state: bool, segment_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of different numbers of chunks, some of them empty, each as if it were alone."""
    if segment_bytes:
        monkeypatch.setitem(chunks.SEGMENT_BYTES, "cpu", segment_bytes)
    bounds = torch.tensor([0, 0, 70, 71, 230, 230, 300])
    tensors = {name: tensor[:1].detach().requires_grad_() for name, tensor in operands(300)[0].items()}
    state = torch.randn(6, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    options = {"initial_state": state, "output_final_state": leaves_state, "cu_seqlens": bounds, "use_qk_l2norm": True}
    results = []
    for function in (kimi_delta_rule, naive_kimi_delta_rule):
        o, last = function(**tensors, **options)
        loss = o.sin().sum() + (last.sin().sum() if last is not None else 0)
        results.append((o, *torch.autograd.grad(loss, [*tensors.values(), state])))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        plain, last = kimi_delta_rule(**tensors, **options)
        assert torch.equal(plain, results[0][0])
    assert not leaves_state or torch.equal(last[[0, 4]], state[[0, 4]])


def test_one_decay_for_all_channels_is_the_gated_delta_rule() -> None:
    tensors, state = operands(150)
    g = tensors.pop("g")[..., 0]
    expected = gated_delta_rule(**tensors, g=g, initial_state=state, output_final_state=True)
    ours = kimi_delta_rule(
        **tensors, g=g[..., None].expand(-1, -1, -1, 8), initial_state=state, output_final_state=True
    )
    for mine, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_scale_and_missing_state() -> None:
    tensors, _ = operands(70)
    tensors["k"] = F.normalize(tensors["k"], dim=-1)
    expected, _ = naive_kimi_delta_rule(**tensors, scale=0.3)
    o, state = kimi_delta_rule(**tensors, scale=0.3)
    torch.testing.assert_close(o, expected)
    assert state is None


@pytest.mark.parametrize("first", [1, 80])
def test_a_sequence_in_two_calls(first: int) -> None:
    tensors, _ = operands(150)
    whole, last = kimi_delta_rule(**tensors, use_qk_l2norm=True, output_final_state=True)
    parts = [{name: tensor[:, part] for name, tensor in tensors.items()} for part in (slice(first), slice(first, None))]
    o, state = kimi_delta_rule(**parts[0], use_qk_l2norm=True, output_final_state=True)
    rest, state = kimi_delta_rule(**parts[1], use_qk_l2norm=True, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat((o, rest), dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("decay", [1.0, 1000.0])
def test_low_precision_keeps_a_float32_core(decay: float) -> None:
    tensors, _ = operands(200, decay, torch.bfloat16)
    exact, _ = naive_kimi_delta_rule(**{n: t.double() for n, t in tensors.items()}, use_qk_l2norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = kimi_delta_rule(**tensors, use_qk_l2norm=True, output_final_state=True)
    assert o.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    torch.testing.assert_close(o.double(), exact, atol=0.005, rtol=0.005)
    o.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_are_the_finite_differences(
    length: int, packed: bool, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of four tokens, so that a short sequence has several, and not a whole number of them."""
    monkeypatch.setattr(module, "CHUNK", 4)
    bounds = torch.tensor([0, 7, 7, 16, 17]) if packed else None
    B, T, N = (1, 17, 4) if packed else (2, length, 2)
    shapes = [(B, T, 2, 3), (B, T, 2, 3), (B, T, 2, 2), (B, T, 2, 3), (B, T, 2), (N, 2, 3, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[3], inputs[4] = -3 * inputs[3].sigmoid(), inputs[4].sigmoid()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return kimi_delta_rule(*tensors[:5], 0.5, tensors[5], True, normalised, bounds)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def decay_gradients(recurrence: type, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of A_log and dt_bias, at decays of exp(-150) a token and more next to some of nearly one."""
    generator = torch.Generator().manual_seed(0)
    T, H, K = 512, 4, 32
    dt, q, k, v, weights, beta = torch.randn(6, 1, T, H, K, generator=generator, dtype=torch.float64).to(dtype)
    A_log = torch.linspace(0, 2.77, H, dtype=torch.float64).to(dtype).requires_grad_()
    dt_bias = torch.linspace(-4, 4, H * K, dtype=torch.float64).view(H, K).to(dtype).requires_grad_()
    g = -A_log.exp()[:, None] * F.softplus(3 * dt + dt_bias)
    assert g.min() < -150 and g.max() > -0.01
    o, _ = recurrence(q, k, v, g, beta[..., 0].sigmoid(), use_qk_l2norm=True)
    return torch.autograd.grad((o * weights).sum(), (A_log, dt_bias))


def test_strong_decay_keeps_its_gradient() -> None:
    """In float32 to what token by token, in float32, keeps: some 1e-6 of A_log's, whose terms cancel."""
    exact = decay_gradients(naive_kimi_delta_rule, torch.float64)
    for run, dtype, allowed in (
        (kimi_delta_rule, torch.float64, 1e-12),
        (naive_kimi_delta_rule, torch.float32, 5e-6),
        (kimi_delta_rule, torch.float32, 5e-6),
    ):
        for gradient, reference in zip(decay_gradients(run, dtype), exact, strict=True):
            assert (gradient.double() - reference).norm() < allowed * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("g", [-20.0, -1e4, float("-inf")])
def test_any_decay_forgets_and_stays_finite(g: float, dtype: torch.dtype) -> None:
    tensors, state = operands(100, dtype=dtype)
    with torch.no_grad():
        tensors["g"][:, :, :, :4] = g
    inputs = [*tensors.values(), state]
    results = []
    for function in (kimi_delta_rule, naive_kimi_delta_rule):
        o, last = function(**tensors, initial_state=state, output_final_state=True, use_qk_l2norm=True)
        results.append((o, last, *torch.autograd.grad(o.sum() + last.sum(), inputs)))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, atol=2e-5, rtol=2e-5)
        assert fast.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    tensors, _ = operands(9)
    with torch.no_grad():
        tensors["g"][0, 3, 0, 0] = bad
    assert not kimi_delta_rule(**tensors)[0].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_compiled_is_the_same(packed: bool) -> None:
    tensors, state = operands(90, dtype=torch.float32)
    bounds = None
    if packed:
        tensors = {name: tensor[:1].detach().requires_grad_() for name, tensor in tensors.items()}
        bounds = torch.tensor([0, 40, 90])

    def function(tensors: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor | None]:
        return kimi_delta_rule(**tensors, initial_state=state, output_final_state=True, cu_seqlens=bounds)

    results = []
    for form in (function, torch.compile(function, backend="aot_eager", fullgraph=not packed)):
        o, last = form(tensors, state)
        gradients = torch.autograd.grad(o.sin().sum() + last.sin().sum(), [*tensors.values(), state])
        with torch.no_grad():
            results.append((o, last, *gradients, *form(tensors, state)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_operation_is_registered_right() -> None:
    tensors, state = operands(70, dtype=torch.float32)
    torch.library.opcheck(module._chunked, (*tensors.values(), state, 0.3, True, None, True))


def test_what_does_not_fit_is_named() -> None:
    tensors, state = operands(5)
    with pytest.raises(ValueError, match=r"kimi_delta_rule: g has shape \(2, 5, 3\), expected \(B=2, T=5, H=3, K=8\)"):
        kimi_delta_rule(**{**tensors, "g": tensors["g"][..., 0]})
    with pytest.raises(ValueError, match="initial_state holds 1 states, expected 2"):
        kimi_delta_rule(**tensors, initial_state=state[:1])
