"""The recurrences against flash-linear-attention: its naive references, its signatures, its kernels.

Needs that package; `make compatibility-fla` runs it with TRITON_INTERPRET=1, where its one-token kernel runs on a CPU.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops import gated_delta, gated_delta_rule, kda, kernels, kimi_delta_rule, ssd

pytest.importorskip("fla", reason="flash-linear-attention is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def gated_delta_inputs(length: int, q_heads: int = 2, device: str = "cpu") -> dict[str, Tensor]:
    tensors = {
        "q": torch.randn(2, length, q_heads, 16),
        "k": F.normalize(torch.randn(2, length, q_heads, 16), dim=-1),
        "v": torch.randn(2, length, 2, 32),
        "g": -F.softplus(2 * torch.randn(2, length, 2)),
        "beta": torch.rand(2, length, 2),
        "initial_state": torch.randn(2, 2, 16, 32),
    }
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def kimi_inputs(length: int, device: str = "cpu") -> dict[str, Tensor]:
    inputs = gated_delta_inputs(length, device=device)
    return inputs | {"g": (-F.softplus(2 * torch.randn(2, length, 2, 16))).to(device).requires_grad_()}


def ssd_inputs(length: int, device: str = "cpu") -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(2, length, 2, 16),
        "dt": torch.randn(2, length, 4),
        "A_log": torch.randn(4),
        "B": torch.randn(2, length, 2, 32),
        "C": torch.randn(2, length, 4, 32),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
        "initial_state": torch.randn(2, 4, 16, 32),
    }
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> None:
    weights = [torch.randn_like(tensor) for tensor in ours]
    gradients = []
    for outputs in (ours, theirs):
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, list(inputs.values())))
    for mine, reference in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-4, rtol=2e-4)


def simple_gla_of_ssd(naive: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """SSD as gated linear attention, written here from the two papers' equations, on their reference."""
    dt = F.softplus(inputs["dt"] + inputs["dt_bias"])
    x, B = (inputs[name].repeat_interleave(2, 2) for name in ("x", "B"))
    state = inputs["initial_state"].transpose(2, 3)
    y, state = naive(
        inputs["C"], B, x * dt[..., None], -inputs["A_log"].exp() * dt, 1.0, state, output_final_state=True
    )
    return y + inputs["D"][:, None] * x, state.transpose(2, 3)


@pytest.mark.parametrize("name", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_gated_delta_rule_is_their_reference(name: str) -> None:
    naive = getattr(importlib.import_module("fla.ops.gated_delta_rule.naive"), name)
    inputs = gated_delta_inputs(130)
    ours = gated_delta_rule(**inputs, output_final_state=True)
    assert_same(ours, naive(**inputs, output_final_state=True), inputs)


@pytest.mark.parametrize("name", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_kimi_delta_rule_is_their_reference(name: str) -> None:
    naive = getattr(importlib.import_module("fla.ops.kda.naive"), name)
    inputs = kimi_inputs(128)  # whole chunks, or their chunked one refuses; decays that it does not overflow with
    inputs["g"] = (inputs["g"] / 8).detach().requires_grad_()
    ours = kimi_delta_rule(**inputs, output_final_state=True)
    assert_same(ours, naive(**inputs, output_final_state=True), inputs)


def test_ssd_is_their_reference() -> None:
    naive = importlib.import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    inputs = ssd_inputs(130)
    assert_same(ssd(**inputs, output_final_state=True), simple_gla_of_ssd(naive, inputs), inputs)


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_handed_over_fits_their_functions(length: int, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their real functions bind our arguments; their references, given these, return what torch's operations do."""
    asked = []

    def kernel(name: str, tensor: Tensor) -> Callable[..., Any]:
        module = importlib.import_module(kernels.MODULES[name])
        signature = inspect.signature(getattr(module, name))
        naive_name = f"naive_recurrent_{kernels.MODULES[name].rsplit('.', 1)[1]}"
        naive = getattr(importlib.import_module(f"{kernels.MODULES[name]}.naive"), naive_name)

        def run(**arguments: Any) -> tuple[Tensor, Tensor]:
            known = signature.bind(**arguments).arguments
            assert "kwargs" not in known  # swallowed, not understood
            asked.append(name)
            assert arguments.pop("cu_seqlens") is None
            first = arguments.pop("state_v_first", False)
            if arguments.pop("use_qk_l2norm_in_kernel", False):
                arguments |= {name: F.normalize(arguments[name], dim=-1) for name in "qk"}
            if first:
                arguments["initial_state"] = arguments["initial_state"].transpose(2, 3)
            o, state = naive(**arguments)
            return o, state.transpose(2, 3) if first else state

        return run

    with torch.set_grad_enabled(grad):
        gated, kimi, state_space = gated_delta_inputs(length), kimi_inputs(length), ssd_inputs(length)
        expected = gated_delta_rule(**gated, use_qk_l2norm=True, output_final_state=True)
        expected += kimi_delta_rule(**kimi, use_qk_l2norm=True, output_final_state=True)
        expected += ssd(**state_space, output_final_state=True)
        monkeypatch.setattr(gated_delta, "fla_kernel", kernel)
        monkeypatch.setattr(kda, "fla_kernel", kernel)
        monkeypatch.setitem(ssd.__globals__, "fla_kernel", kernel)
        handed = gated_delta_rule(**gated, use_qk_l2norm=True, output_final_state=True)
        handed += kimi_delta_rule(**kimi, use_qk_l2norm=True, output_final_state=True)
        handed += ssd(**state_space, output_final_state=True)
    for mine, reference in zip(handed, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
    first = "fused_recurrent" if length == 1 and not grad else "chunk"
    assert asked[:2] == [f"{first}_gated_delta_rule", f"{first}_kda"]


@torch.no_grad()
@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["shared heads", "gated delta", "kimi delta"])
def test_their_one_token_kernels(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, run = (kda, kimi_delta_rule) if case == "kimi delta" else (gated_delta, gated_delta_rule)
    heads = 1 if case == "shared heads" else 2
    inputs = kimi_inputs(1, device) if case == "kimi delta" else gated_delta_inputs(1, heads, device)
    inputs |= {name: inputs[name].to(dtype) for name in "qkv"}
    monkeypatch.setattr(kernels, "FORCED", "torch")
    expected = run(**inputs, use_qk_l2norm=True, output_final_state=True)
    their = importlib.import_module
    monkeypatch.setattr(ours, "fla_kernel", lambda name, tensor: getattr(their(kernels.MODULES[name]), name))
    handed = run(**inputs, use_qk_l2norm=True, output_final_state=True)
    assert handed[0].dtype == dtype and handed[1].dtype == torch.float32
    for mine, reference in zip(handed, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="their chunked kernels need a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_their_chunked_kernels(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, as training has it: forward and gradients against torch's operations in float64."""
    bounds = torch.tensor([0, 100, 101, 300]) if packed else None
    cases = ((gated_delta_rule, gated_delta_inputs), (kimi_delta_rule, kimi_inputs), (ssd, ssd_inputs))
    for run, make in cases:
        inputs = {name: tensor.detach() for name, tensor in make(300, device="cuda").items()}
        if packed:
            inputs = {n: t[:1] if t.ndim > 1 else t for n, t in inputs.items() if n != "initial_state"}
        results = []
        for forced, dtype in (("torch", torch.float64), ("fla", torch.bfloat16)):
            monkeypatch.setattr(kernels, "FORCED", forced)
            typed = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
            o, _ = run(**typed, cu_seqlens=bounds)
            results.append((o, *torch.autograd.grad(o.double().square().sum(), list(typed.values()))))
        for mine, reference in zip(*results, strict=True):
            assert (mine - reference).norm() < 0.03 * reference.norm()
