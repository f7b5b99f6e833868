"""Kimi Delta Attention initialised from attention; what all linear blocks have in common is in test_linear_init.py."""

import pytest
import torch
from linear_blocks import D_HEAD, NORM, D, H, K, attention, config, per_head, same_direction, sample_of, state
from torch import nn

from hylo.convert.kda import fill_kda
from hylo.convert.linear import VALUE_RMS
from hylo.convert.linear_fit import inputs_of, outputs_of
from hylo.convert.rows import share_heads
from hylo.modeling.kda import KimiDeltaAttention


def test_recipe_copies_top_left_overlaps() -> None:
    base = attention()
    mixer = KimiDeltaAttention(config(kda_num_heads=2, kda_head_dim=20), 0)  # 40 rows for 32
    before = state(mixer)
    assert fill_kda(mixer, base, "recipe", None, NORM) is None
    after = state(mixer)
    keys, values = (t.repeat_interleave(H // K, 0).flatten(0, 1) for t in (base.k, base.v))
    for name, rows in (("q_proj", base.q.flatten(0, 1)), ("k_proj", keys), ("v_proj", values)):
        assert torch.equal(after[f"{name}.weight"][:32], rows)
        assert torch.equal(after[f"{name}.weight"][32:], before[f"{name}.weight"][32:])
    assert torch.equal(after["o_proj.weight"][:, :32], base.o.flatten(1))
    untouched = set(before) - {f"{name}_proj.weight" for name in "qkvo"}
    assert all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize(("heads", "width"), [(4, 8), (2, 16), (2, 8), (3, 8), (5, 8), (2, 20), (2, 6)])
def test_aligned_copies_whole_heads(heads: int, width: int) -> None:
    base = attention()
    mixer = KimiDeltaAttention(config(kda_num_heads=heads, kda_head_dim=width), 0)
    fill_kda(mixer, base, "aligned", None, NORM)
    keys_of = share_heads(H, D_HEAD, heads, width)
    if heads == H:
        assert keys_of == [[0], [1], [2], [3]]
    for head, taken in enumerate(keys_of):
        rows = min(len(taken) * D_HEAD, width)
        q, k, v = (per_head(getattr(mixer, f"{name}_proj").weight, heads)[head] for name in "qkv")
        assert torch.equal(q[:rows], base.q[taken].flatten(0, 1)[:rows])
        assert torch.equal(k[:rows], base.k[[s // 2 for s in taken]].flatten(0, 1)[:rows])
        o = mixer.o_proj.weight.unflatten(1, (heads, -1))[:, head]
        for i, source in enumerate(taken):
            block = slice(i * D_HEAD, (i + 1) * D_HEAD)
            n = len(v[block])
            assert same_direction(v[block], base.v[source // 2, :n])
            assert same_direction(o[:, block], base.o[:, source, :n])
    for name in "qkv":
        weight = getattr(mixer, f"{name}_conv1d").weight
        assert torch.equal(weight[..., -1], torch.ones_like(weight[..., -1])) and not weight[..., :-1].any()


def test_the_gate_is_half_open_and_the_columns_have_the_values_scale() -> None:
    """A value of rms r is stored at VALUE_RMS, and read at r times the fraction: 2 fraction x sigmoid(0) x r."""
    base = attention()
    base.v[1] *= 5
    mixer = KimiDeltaAttention(config(), 0)
    fill_kda(mixer, base, "aligned", None, NORM, 0.3)
    x = torch.randn(1, 5, D)
    assert torch.equal(mixer.g_b_proj(mixer.g_a_proj(x)), torch.zeros(1, 5, H * D_HEAD))
    assert torch.equal(mixer.o_norm.weight, torch.full((D_HEAD,), 0.6))
    stored = per_head(mixer.v_proj.weight, H)
    columns = mixer.o_proj.weight.unflatten(1, (H, -1))
    for head in range(H):
        ratio = (stored[head] / base.v[head // 2]).mean()
        torch.testing.assert_close(columns[:, head] * ratio, base.o[:, head] * VALUE_RMS)


@pytest.mark.parametrize("linear_init", ["recipe", "aligned", "calibrated"])
def test_biases_go_where_their_rows_go(linear_init: str) -> None:
    base = attention(biases=True)
    layer = sample_of(base)
    mixer = KimiDeltaAttention(config(qkv_bias=True), 0)
    fill_kda(mixer, base, linear_init, layer, NORM)
    torch.testing.assert_close(mixer.q_proj(layer.inputs_BTD), layer.q_BTHd.flatten(2))
    torch.testing.assert_close(mixer.k_proj(layer.inputs_BTD), layer.k_BTKd.repeat_interleave(2, 2).flatten(2))
    assert base.v_bias is not None
    values = torch.einsum("btx,kdx->btkd", layer.inputs_BTD, base.v) + base.v_bias
    ours = mixer.v_proj(layer.inputs_BTD).unflatten(-1, (H, -1))
    assert all(same_direction(ours[:, :, head], values[:, :, head // 2]) for head in range(H))


def test_norm_weights_of_qwen3_go_into_the_rows() -> None:
    base = attention(norms=True)
    mixer = KimiDeltaAttention(config(), 0)
    fill_kda(mixer, base, "aligned", None, NORM)
    assert base.q_norm is not None and base.k_norm is not None
    assert torch.equal(mixer.q_proj.weight, (base.q * base.q_norm[:, None]).flatten(0, 1))
    keys = (base.k * base.k_norm[:, None]).repeat_interleave(2, 0)
    assert torch.equal(mixer.k_proj.weight, keys.flatten(0, 1))


def test_calibrated_heads_have_the_scale_of_least_error() -> None:
    """And all channels of a head decay alike."""
    base = attention()
    layer = sample_of(base)
    mixer = KimiDeltaAttention(config(), 0)
    fill_kda(mixer, base, "calibrated", layer, NORM, None, 0)
    steps = nn.functional.softplus(mixer.dt_bias).unflatten(0, (H, -1))
    assert torch.equal(steps, steps[:, :1].expand_as(steps)) and len(steps[:, 0].unique()) == H
    norm = mixer.o_norm.weight
    assert norm.eq(norm[0]).all()  # set after the heads' scales
    heads = inputs_of(mixer.o_proj, mixer, layer).unflatten(-1, (H, -1)) / norm[0]
    for head in range(H):
        columns, context = mixer.o_proj.weight.unflatten(1, (H, -1))[:, head], layer.context_BTHd[:, :, head]
        best = (context * heads[:, :, head]).sum() / heads[:, :, head].square().sum()
        torch.testing.assert_close(columns, base.o[:, head] * best.clamp(0.1, 10))


def test_every_part_learns_in_the_fit() -> None:
    base = attention()
    layer = sample_of(base)
    mixer = KimiDeltaAttention(config(), 0)
    result = fill_kda(mixer, base, "calibrated", layer, NORM, None, 20)
    assert result is not None and result.after < result.before
    assert mixer.g_b_proj.weight.any() and mixer.f_b_proj.weight.any()
    assert len(mixer.dt_bias.unique()) > H  # the channels of a head part ways
    assert outputs_of(mixer, layer).isfinite().all()
