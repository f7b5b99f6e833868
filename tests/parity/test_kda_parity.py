"""Kimi Delta Attention against transformers' kimi_linear, which its later versions have."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from hylo.modeling import HyloConfig
from hylo.modeling.cache import new_cache
from hylo.modeling.documents import find_documents
from hylo.modeling.kda import KimiDeltaAttention
from hylo.ops import kimi_delta_rule

kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
configuration = pytest.importorskip("transformers.models.kimi_linear.configuration_kimi_linear")


@torch.no_grad()
@pytest.mark.parametrize("theirs", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
@pytest.mark.parametrize("length", [5, 64, 150])
def test_kimi_delta_rule(theirs: str, length: int) -> None:
    q, k, v = torch.randn(3, 2, length, 4, 16)
    g, beta, state = -F.softplus(2 * torch.randn(2, length, 4, 16)), torch.rand(2, length, 4), torch.randn(2, 4, 16, 16)
    expected = getattr(kimi_linear, theirs)(
        q, k, v, g=g, beta=beta, initial_state=state.clone(), output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ours = kimi_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm=True)
    for mine, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 80])
def test_kimi_delta_attention(length: int) -> None:
    """Forward, padded, and token by token behind a prefill."""
    config = HyloConfig(hidden_size=32, num_hidden_layers=1, mixers=["kda"], kda_num_heads=2, kda_head_dim=16)
    theirs_config = configuration.KimiLinearConfig(
        hidden_size=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_head_dim=16,
        linear_num_heads=2,
        rms_norm_eps=config.rms_norm_eps,
    )
    ours, theirs = KimiDeltaAttention(config, 0), kimi_linear.KimiLinearDeltaAttention(theirs_config, 0).eval()
    weights = {name: 0.5 * torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(weights)
    convolutions = [weights.pop(f"{name}_conv1d.weight") for name in "qkv"]
    gate = {f"forget_gate.{name}": weights.pop(name) for name in ("dt_bias", "f_a_proj.weight", "f_b_proj.weight")}
    gate["forget_gate.A_log"] = weights.pop("A_log")[None, None, :, None]
    theirs.load_state_dict(weights | gate | {"conv1d.weight": torch.cat(convolutions)})

    x, mask = torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.bool)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)
    mask[1, :2] = False
    torch.testing.assert_close(
        ours(x, find_documents((2, length), mask))[mask], theirs(x, attention_mask=mask)[mask], atol=1e-5, rtol=1e-4
    )

    caches = new_cache(config), DynamicCache(config=theirs_config)
    parts = x.split([length - 3, 1, 1, 1], dim=1)
    mine = torch.cat([ours(part, past_key_values=caches[0]) for part in parts], dim=1)
    decoded = torch.cat([theirs(part, cache_params=caches[1]) for part in parts], dim=1)
    torch.testing.assert_close(mine, decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
