"""The base run layer by layer is the base, as transformers runs it, with one layer in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hylo.convert import planned_config, read_base
from hylo.convert.calibration import calibration_rows, samples_of
from hylo.errors import HyloError
from hylo.plan import make_plan

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
def test_samples_are_what_the_base_computes(write_base: Callable[..., Path], family: str) -> None:
    changes: dict[str, Any] = {}
    if family == "llama3":
        changes["rope_parameters"] = LLAMA3 | {"original_max_position_embeddings": 64}
    base = write_base("llama" if family == "llama3" else family, **changes)
    ids = torch.randint(3, 61, (3, 20))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
    model(ids)
    config = planned_config(make_plan(base, "1MLA2GDN"), "pairs-fast")
    samples = list(samples_of(read_base(base), config, ids, [0, 1, 2]))
    for sample, (inputs, outputs), layer in zip(samples, seen, model.model.layers, strict=True):
        assert sample is not None
        torch.testing.assert_close(sample.inputs_BTD, inputs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.outputs_BTD, outputs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.self_attn.o_proj(sample.context_BTHd.flatten(2)), sample.outputs_BTD)
        k = sample.k_BTKd.repeat_interleave(2, 2)
        logits = torch.einsum("bthd,bshd->bhts", sample.q_BTHd, k) * sample.scale
        weights = logits.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        v = layer.self_attn.v_proj(sample.inputs_BTD).view(3, 20, 2, 16).repeat_interleave(2, 2)
        context = torch.einsum("bhts,bshd->bthd", weights, v)
        torch.testing.assert_close(context, sample.context_BTHd, atol=1e-4, rtol=1e-4)
        x = inputs.flatten(0, 1)
        torch.testing.assert_close(sample.covariance(), x.T @ x / 60, atol=1e-4, rtol=1e-4)
    (only,) = samples_of(read_base(base), config, ids, [1])
    assert only is not None and torch.equal(only.inputs_BTD, samples[1].inputs_BTD)  # type: ignore[union-attr]
    assert list(samples_of(read_base(base), config, None, [0, 1])) == [None, None]


def test_rows_are_spread_over_the_text() -> None:
    rows = calibration_rows(np.arange(1000, dtype=np.int32), 300, 100)
    assert rows.shape == (3, 100) and rows[:, 0].tolist() == [0, 450, 900]
    assert calibration_rows(np.arange(150, dtype=np.int32), 300, 100).shape == (1, 100)
    with pytest.raises(HyloError, match="has 50 tokens"):
        calibration_rows(np.arange(50, dtype=np.int32), 300, 100)
