"""Linear blocks initialised from attention: what is copied where, what the sample decides, and what the fit changes."""

import dataclasses

import pytest
import torch
from linear_blocks import D_HEAD, NORM, D, H, K, attention, config, per_head, same_direction, sample_of, state
from torch import nn

from hylo.convert.kda import fill_kda
from hylo.convert.linear import fill_gated_deltanet, fill_mamba2
from hylo.convert.linear_fit import look_back, outputs_of, steady_direction, step_for
from hylo.convert.rows import share_heads, share_values
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention
from hylo.modeling.mamba2 import Mamba2

FILLS = {GatedDeltaNet: fill_gated_deltanet, Mamba2: fill_mamba2, KimiDeltaAttention: fill_kda}
BLOCKS = list(FILLS)


def test_recipe_copies_top_left_overlaps_into_gated_deltanet() -> None:
    base = attention()
    mixer = GatedDeltaNet(config(gdn_num_heads=1, gdn_head_dim=24), 0)  # keys 24 < 32 rows, values 48 > 32 rows
    before = state(mixer)
    fill_gated_deltanet(mixer, base, "recipe", None, NORM)
    after = state(mixer)
    keys, values = (t.repeat_interleave(H // K, 0).flatten(0, 1) for t in (base.k, base.v))
    assert torch.equal(after["q_proj.weight"], base.q.flatten(0, 1)[:24])
    assert torch.equal(after["k_proj.weight"], keys[:24])
    assert torch.equal(after["v_proj.weight"][:32], values)
    assert torch.equal(after["v_proj.weight"][32:], before["v_proj.weight"][32:])
    assert torch.equal(after["o_proj.weight"][:, :32], base.o.flatten(1))
    assert torch.equal(after["o_proj.weight"][:, 32:], before["o_proj.weight"][:, 32:])
    untouched = set(before) - {f"{name}_proj.weight" for name in "qkvo"}
    assert all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize(
    "gdn_heads, width, keys_of, values_of",
    [
        (2, 8, [[1], [3]], [[1, 0], [3, 2]]),
        (2, 16, [[0, 1], [2, 3]], [[0, 1], [2, 3]]),
        (1, 24, [[0, 2, 3]], [[0, 2, 3, 1]]),
        (4, 8, [[0], [1], [2], [3]], [[0], [1], [2], [3]]),
        (2, 6, [[1], [3]], [[1], [3]]),
    ],
)
def test_aligned_copies_whole_heads_into_gated_deltanet(
    gdn_heads: int, width: int, keys_of: list[list[int]], values_of: list[list[int]]
) -> None:
    base = attention()
    mixer = GatedDeltaNet(config(gdn_num_heads=gdn_heads, gdn_head_dim=width), 0)
    before = state(mixer)
    fill_gated_deltanet(mixer, base, "aligned", None, NORM)
    assert share_heads(H, D_HEAD, gdn_heads, width) == keys_of
    assert share_values(keys_of, H, 2 * width // D_HEAD) == values_of
    repeat = H // K
    for head, (key_heads, value_heads) in enumerate(zip(keys_of, values_of, strict=True)):
        rows = min(len(key_heads) * D_HEAD, width)
        q, k, v, g = (per_head(getattr(mixer, f"{name}_proj").weight, gdn_heads)[head] for name in "qkvg")
        o = mixer.o_proj.weight.unflatten(1, (gdn_heads, -1))[:, head]
        assert torch.equal(q[:rows], base.q[key_heads].flatten(0, 1)[:rows])
        assert torch.equal(k[:rows], base.k[[s // repeat for s in key_heads]].flatten(0, 1)[:rows])
        for i, source in enumerate(value_heads):
            block = slice(i * D_HEAD, (i + 1) * D_HEAD)
            n = len(v[block])
            assert same_direction(v[block], base.v[source // repeat, :n])
            assert torch.allclose(g[block], 0.2 * base.v[source // repeat, :n])
            assert torch.equal(o[:, block], base.o[:, source, :n])
        filled = len(value_heads) * D_HEAD
        fresh = per_head(before["v_proj.weight"], gdn_heads)[head]
        assert torch.equal(v[filled:], fresh[filled:]) and not o[:, filled:].any()
    for name in "qkv":
        weight = getattr(mixer, f"{name}_conv1d").weight
        assert torch.equal(weight[..., -1], torch.ones_like(weight[..., -1])) and not weight[..., :-1].any()


def test_more_student_heads_than_base_heads_leaves_some_fresh() -> None:
    shared = share_heads(3, 8, 5, 8)
    assert sorted(sum(shared, [])) == [0, 1, 2] and max(map(len, shared)) == 1
    assert share_values(shared, 3, 2) == shared


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_mamba2_takes_values_keys_queries_and_output(linear_init: str) -> None:
    base = attention()
    mixer = Mamba2(config(), 0)
    before = state(mixer)
    fill_mamba2(mixer, base, linear_init, None, NORM)
    after = state(mixer)
    z, x, B, C, dt = after["in_proj.weight"].split(mixer.widths)
    assert all(same_direction(ours, theirs) for ours, theirs in zip(per_head(x, K), base.v, strict=True))
    assert torch.equal(B, base.k.flatten(0, 1))
    assert torch.equal(C, base.q.flatten(0, 1))
    assert torch.equal(after["out_proj.weight"], base.o.flatten(1))
    fresh = before["in_proj.weight"].split(mixer.widths)
    assert torch.equal(dt, fresh[4])
    kept = {"dt_bias", "A_log", "D"}
    if linear_init == "recipe":
        assert torch.equal(x, base.v.flatten(0, 1)) and torch.equal(z, fresh[0])
        kept |= {"conv1d.weight", "conv1d.bias", "norm.weight"}
    else:
        assert torch.equal(z, base.v.repeat_interleave(2, 0).flatten(0, 1))
        assert after["conv1d.weight"].sum(-1).eq(1).all() and after["conv1d.weight"][..., -1].eq(1).all()
        assert not after["conv1d.bias"].any()
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_other_widths_take_what_overlaps(linear_init: str) -> None:
    base = attention()
    mixer = Mamba2(config(mamba_head_dim=4, mamba_d_state=12, mamba_num_heads=6, mamba_d_inner=24, mamba_d_xb=8), 0)
    fill_mamba2(mixer, base, linear_init, None, NORM)
    x, C = mixer.in_proj.weight.split(mixer.widths)[1], mixer.in_proj.weight.split(mixer.widths)[3]
    if linear_init == "aligned":
        assert all(same_direction(ours, theirs[:4]) for ours, theirs in zip(per_head(x, 2), base.v, strict=True))
        assert torch.equal(per_head(C, 6)[:4, :8], base.q)
    else:
        assert torch.equal(x, base.v.flatten(0, 1)[:8])
        assert torch.equal(C[:32], base.q.flatten(0, 1))


@pytest.mark.parametrize(
    "geometry",
    [
        {"gdn_head_dim": 6},
        {"gdn_num_heads": 5},
        {"gdn_num_heads": 1, "gdn_head_dim": 20},
        {"mamba_head_dim": 4, "mamba_d_state": 12, "mamba_num_heads": 6, "mamba_d_inner": 24, "mamba_d_xb": 8},
        {"mamba_d_state": 4, "mamba_num_heads": 2, "mamba_head_dim": 16},
        {"kda_num_heads": 2, "kda_head_dim": 16},
        {"kda_num_heads": 5, "kda_head_dim": 6},
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_any_geometry_is_calibrated_to_the_fraction(block: type[nn.Module], geometry: dict[str, int]) -> None:
    base = attention(biases=True)
    layer = sample_of(base)
    mixer = block(config(**geometry, qkv_bias=True), 0)
    FILLS[block](mixer, base, "calibrated", layer, NORM, 0.25, 1)
    mixer = block(config(**geometry, qkv_bias=True), 0)
    FILLS[block](mixer, base, "calibrated", layer, NORM, 0.25, 0)
    assert outputs_of(mixer, layer).norm() / layer.outputs_BTD.norm() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_norm_weights_of_qwen3_go_into_the_rows(linear_init: str) -> None:
    base = attention(norms=True)
    gdn, mamba = GatedDeltaNet(config(gdn_num_heads=4), 0), Mamba2(config(), 0)
    fill_gated_deltanet(gdn, base, linear_init, None, NORM)
    fill_mamba2(mamba, base, linear_init, None, NORM)
    assert base.q_norm is not None and base.k_norm is not None
    queries = base.q * base.q_norm[:, None]
    keys = base.k * base.k_norm[:, None]
    _, _, B, C, _ = mamba.in_proj.weight.split(mamba.widths)
    assert torch.equal(gdn.q_proj.weight, queries.flatten(0, 1))
    assert torch.equal(gdn.k_proj.weight, keys.repeat_interleave(2, 0).flatten(0, 1))
    assert torch.equal(C, queries.flatten(0, 1)) and torch.equal(B, keys.flatten(0, 1))


@pytest.mark.parametrize("linear_init", ["recipe", "aligned", "calibrated"])
def test_biases_go_where_their_rows_go(linear_init: str) -> None:
    base = attention(biases=True)
    layer = sample_of(base)
    gdn = GatedDeltaNet(config(gdn_num_heads=4, qkv_bias=True), 0)
    mamba = Mamba2(config(qkv_bias=True), 0)
    for projection in (gdn.q_proj, gdn.k_proj, gdn.v_proj, mamba.in_proj):
        nn.init.zeros_(projection.bias)
    fill_gated_deltanet(gdn, base, linear_init, layer, NORM)
    fill_mamba2(mamba, base, linear_init, layer, NORM)
    x, queries, keys = layer.inputs_BTD, layer.q_BTHd.flatten(2), layer.k_BTKd
    torch.testing.assert_close(gdn.q_proj(x), queries)
    torch.testing.assert_close(gdn.k_proj(x), keys.repeat_interleave(2, 2).flatten(2))
    z, _, B, C, dt = mamba.in_proj(x).split(mamba.widths, dim=-1)
    torch.testing.assert_close(B, keys.flatten(2))
    torch.testing.assert_close(C, queries)
    assert base.v_bias is not None
    values = torch.einsum("btx,kdx->btkd", x, base.v) + base.v_bias
    ours = mamba.in_proj(x).split(mamba.widths, dim=-1)[1].unflatten(-1, (K, -1))
    assert all(same_direction(ours[:, :, head], values[:, :, head]) for head in range(K))
    ours = gdn.v_proj(x)  # heads of width 16, whose first 8 are filled; the recipe knows no heads
    for head in range(H):
        start = head * (D_HEAD if linear_init == "recipe" else 2 * D_HEAD)
        assert same_direction(ours[..., start : start + D_HEAD], values[:, :, head // 2])
    biases = mamba.in_proj.bias.split(mamba.widths)
    assert not biases[0].any() and not biases[4].any()


@pytest.mark.parametrize("fraction", [0.01, 0.1])
@pytest.mark.parametrize("block", BLOCKS)
def test_aligned_output_is_about_the_fraction(block: type[nn.Module], fraction: float) -> None:
    base = attention()
    layer = sample_of(base)
    mixer = block(config(), 0)
    assert FILLS[block](mixer, base, "aligned", None, NORM, fraction) is None
    ratio = (outputs_of(mixer, layer).norm() / layer.outputs_BTD.norm()).item()
    assert fraction / 3 < ratio < fraction * 3


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_calibrated_output_is_the_fraction(block: type[nn.Module], fraction: float) -> None:
    base = attention()
    layer = sample_of(base)
    mixer = block(config(), 0)
    result = FILLS[block](mixer, base, "calibrated", layer, NORM, fraction, 0)
    output = outputs_of(mixer, layer)
    assert output.norm() / layer.outputs_BTD.norm() == pytest.approx(fraction, rel=1e-5)
    error = (output - layer.outputs_BTD).square().mean().item()
    assert result is not None and result.before == result.after == pytest.approx(error)


@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_fraction_the_error_is_least(block: type[nn.Module]) -> None:
    base = attention()
    layer = sample_of(base)

    def error(fraction: float | None) -> float:
        torch.manual_seed(1)
        return FILLS[block](block(config(), 0), base, "calibrated", layer, NORM, fraction, 0).before

    best = error(None)
    assert best < layer.outputs_BTD.square().mean() and all(best <= error(f) for f in (0.01, 0.3, 0.5, 0.7, 1.0))


def test_look_back_of_heads_that_see_one_token_or_all_alike() -> None:
    tokens = 12
    q = torch.zeros(2, tokens, 2, tokens)
    q[:, :, 1] = 1e3 * torch.eye(tokens).roll(-2, 0)  # head 1 looks two tokens ahead, ...
    k = torch.eye(tokens).roll(-4, 0)[None, :, None].repeat(2, 1, 1, 1)  # ... at keys that are four tokens ahead
    layer = dataclasses.replace(sample_of(attention()), q_BTHd=q, k_BTKd=k, scale=1.0)
    # Head 0 spreads evenly over t + 1 tokens: t/2 on average. Head 1 finds its token two back; the first two tokens,
    # and those whose key lies in the future, spread evenly.
    weights = (q[0, :, 1] @ k[0, :, 0].T).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    position = torch.arange(tokens)
    second = (weights * (position[:, None] - position)).sum(-1).mean()
    torch.testing.assert_close(look_back(layer), torch.stack((torch.tensor((tokens - 1) / 4), second)))
    diagonal = dataclasses.replace(layer, q_BTHd=1e3 * k.repeat(1, 1, 2, 1))
    assert look_back(diagonal).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("block", BLOCKS)
def test_half_life_is_the_look_back(block: type[nn.Module]) -> None:
    base = attention()
    layer = sample_of(base)
    mixer = block(config(gdn_num_heads=4), 0)
    FILLS[block](mixer, base, "calibrated", layer, NORM)
    decay = torch.exp(-mixer.A_log.exp()[:, None] * nn.functional.softplus(mixer.dt_bias).unflatten(0, (H, -1)))
    torch.testing.assert_close(decay ** look_back(layer)[:, None], torch.full(decay.shape, 0.5))
    part = {GatedDeltaNet: "a_proj", Mamba2: "in_proj", KimiDeltaAttention: "f_b_proj"}[block]
    assert not mixer.get_submodule(part).weight[-H:].any()
    assert step_for(torch.tensor([1e9, 0.01])).tolist() == pytest.approx([1e-3, 5])


def test_the_steady_direction_is_a_constant_where_inputs_have_one() -> None:
    x = torch.randn(4, 50, D)
    x[..., 3] = 2.0
    projected = x @ steady_direction(dataclasses.replace(sample_of(attention()), inputs_BTD=x))
    assert projected.mean().item() == pytest.approx(1, abs=1e-5) and projected.std() < 0.1


@pytest.mark.parametrize("block", BLOCKS)
def test_fit_lowers_the_error_and_follows_the_seed(block: type[nn.Module]) -> None:
    base = attention()
    layer = sample_of(base)
    fits = []
    for steps in (30, 30, 0):
        torch.manual_seed(3)
        mixer = block(config(), 0)
        result = FILLS[block](mixer, base, "calibrated", layer, NORM, 0.01, steps)
        assert all(parameter.grad is None for parameter in mixer.parameters())
        fits.append((result, state(mixer)))
    (first, trained), (second, again), (untrained, start) = fits
    assert first == second and first.before == untrained.after and first.after < 0.98 * first.before
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    frozen = "out_proj.weight" if block is Mamba2 else "o_proj.weight"
    for name in trained:
        moved = (trained[name] - start[name]).abs().max().item()
        assert (moved == 0) == (name == frozen), name
        if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            assert moved < 6e-3
    if block is Mamba2:
        moved = (trained["in_proj.weight"] - start["in_proj.weight"]).split(mixer.widths)
        assert max(part.abs().max() for part in moved[1:4]) < 6e-3
        assert min(moved[0].abs().max(), moved[4].abs().max()) > 6e-3
