"""The linear blocks against transformers' torch implementations of Gated DeltaNet and Mamba-2."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Mamba2Config, OlmoHybridConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from hylo.modeling import HyloConfig
from hylo.modeling.documents import find_documents
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.mamba2 import Mamba2
from hylo.ops import gated_delta_rule


@torch.no_grad()
@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("length", [5, 64, 150])
def test_gated_delta_rule(theirs: type, length: int) -> None:
    q, k, v = torch.randn(2, length, 4, 16), torch.randn(2, length, 4, 16), torch.randn(2, length, 4, 24)
    g, beta = -F.softplus(2 * torch.randn(2, length, 4)), torch.rand(2, length, 4)
    state = torch.randn(2, 4, 16, 24)
    expected = theirs(
        q, k, v, g=g, beta=beta, initial_state=state.clone(), output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ours = gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm=True)
    for mine, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 150])
def test_gated_deltanet_mixer(length: int) -> None:
    """OLMo Hybrid's mixer is flash-linear-attention's, with the three convolutions in one."""
    ours = GatedDeltaNet(HyloConfig(hidden_size=32, gdn_num_heads=2, gdn_head_dim=16, rms_norm_eps=1e-5), 0)
    theirs = OlmoHybridGatedDeltaNet(
        OlmoHybridConfig(
            hidden_size=32,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=32,
            linear_conv_kernel_dim=4,
            linear_allow_neg_eigval=False,
        ),
        layer_idx=0,
    ).eval()
    weights = {name: 0.5 * torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(weights)
    if hasattr(theirs, "conv1d"):
        convolutions = [weights.pop(f"{name}_conv1d.weight") for name in "qkv"]
        weights["conv1d.weight"] = torch.cat(convolutions)
    theirs.load_state_dict(weights)
    x, mask = torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.bool)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    mask[1, :2] = False
    expected = theirs(x, attention_mask=mask)[mask]
    torch.testing.assert_close(ours(x, find_documents((2, length), mask))[mask], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [5, 150])
def test_mamba2_mixer(kv_heads: int, length: int) -> None:
    """transformers has a group per head and repeats nothing: our x and B rows are repeated for it, as kv heads are."""
    config = HyloConfig(
        hidden_size=32,
        mamba_d_state=16,
        mamba_head_dim=16,
        mamba_num_heads=4,
        mamba_d_inner=64,
        mamba_d_xb=16 * kv_heads,
        rms_norm_eps=1e-5,
    )
    ours = Mamba2(config, 0)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32,
            num_heads=4,
            head_dim=16,
            state_size=16,
            n_groups=4,
            expand=2,
            num_hidden_layers=1,
            chunk_size=32,
        ),
        layer_idx=0,
    ).eval()
    weights = {name: 0.5 * torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(weights)

    channels = torch.arange(2 * 16 * kv_heads + 64)
    x, B = (part.view(kv_heads, 16).repeat_interleave(4 // kv_heads, 0).flatten() for part in channels[:-64].chunk(2))
    channels = torch.cat((x, B, channels[-64:]))
    rows = torch.arange(ours.in_proj.weight.shape[0])
    rows = torch.cat((rows[:64], channels + 64, rows[-4:]))
    theirs.load_state_dict(
        weights
        | {
            "in_proj.weight": weights["in_proj.weight"][rows],
            "conv1d.weight": weights["conv1d.weight"][channels],
            "conv1d.bias": weights["conv1d.bias"][channels],
        }
    )
    if not hasattr(theirs.norm, "group_size"):  # earlier versions normalise all heads as one
        theirs.norm.forward = lambda y, gate: ours.norm(y * F.silu(gate))
    hidden_states = torch.randn(2, length, 32)
    torch.testing.assert_close(ours(hidden_states), theirs(hidden_states), atol=1e-4, rtol=1e-4)
