"""Linear blocks initialised from attention: what is copied where, and what stays as it was."""

import pytest
import torch
from torch import Tensor, nn

from hylo.convert import BaseAttention
from hylo.convert.linear import fill_gated_deltanet, fill_mamba2, share_heads
from hylo.modeling import HyloConfig
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.mamba2 import Mamba2

H, K, D_HEAD, D = 4, 2, 8, 24


def attention(qk_norm: bool = False) -> BaseAttention:
    norms = (torch.rand(D_HEAD), torch.rand(D_HEAD)) if qk_norm else (None, None)
    shapes = ((H, D_HEAD, D), (K, D_HEAD, D), (K, D_HEAD, D), (D, H, D_HEAD))
    return BaseAttention(*(torch.randn(shape) for shape in shapes), *norms)


def config(**geometry: int) -> HyloConfig:
    mamba = {
        "mamba_d_state": D_HEAD,
        "mamba_head_dim": D_HEAD,
        "mamba_num_heads": H,
        "mamba_d_inner": H * D_HEAD,
        "mamba_d_xb": K * D_HEAD,
    }
    return HyloConfig(hidden_size=D, num_hidden_layers=1, mixers=["gated_deltanet"], **mamba | geometry)


def state(mixer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mixer.state_dict().items()}


def per_head(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def test_recipe_copies_top_left_overlaps_into_gated_deltanet() -> None:
    base = attention()
    mixer = GatedDeltaNet(config(gdn_num_heads=1, gdn_head_dim=24), 0)  # keys 24 < 32 rows, values 48 > 32 rows
    before = state(mixer)
    fill_gated_deltanet(mixer, base, "recipe")
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
    "gdn_heads, width, expected",
    [
        (2, 8, [[1], [3]]),
        (2, 16, [[0, 1], [2, 3]]),
        (1, 24, [[0, 2, 3]]),
        (4, 8, [[0], [1], [2], [3]]),
        (2, 6, [[1], [3]]),
    ],
)
def test_aligned_copies_whole_heads_into_gated_deltanet(gdn_heads: int, width: int, expected: list[list[int]]) -> None:
    base = attention()
    mixer = GatedDeltaNet(config(gdn_num_heads=gdn_heads, gdn_head_dim=width), 0)
    before = state(mixer)
    fill_gated_deltanet(mixer, base, "aligned")
    assert share_heads(H, D_HEAD, gdn_heads, width) == expected
    repeat = H // K
    for head, sources in enumerate(expected):
        rows = min(len(sources) * D_HEAD, width)
        q, k, v = (per_head(getattr(mixer, f"{name}_proj").weight, gdn_heads)[head] for name in "qkv")
        o = mixer.o_proj.weight.unflatten(1, (gdn_heads, -1))[:, head]
        assert torch.equal(q[:rows], base.q[sources].flatten(0, 1)[:rows])
        assert torch.equal(k[:rows], base.k[[s // repeat for s in sources]].flatten(0, 1)[:rows])
        values = min(len(sources) * D_HEAD, 2 * width)
        assert torch.equal(v[:values], base.v[[s // repeat for s in sources]].flatten(0, 1)[:values])
        assert torch.equal(o[:, :values], base.o[:, sources].flatten(1)[:, :values])
        fresh = per_head(before["v_proj.weight"], gdn_heads)[head]
        assert torch.equal(v[values:], fresh[values:])
    for name in "qkv":
        weight = getattr(mixer, f"{name}_conv1d").weight
        assert torch.equal(weight[..., -1], torch.ones_like(weight[..., -1])) and not weight[..., :-1].any()


def test_more_student_heads_than_base_heads_leaves_some_fresh() -> None:
    shared = share_heads(3, 8, 5, 8)
    assert sorted(sum(shared, [])) == [0, 1, 2] and max(map(len, shared)) == 1


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_mamba2_takes_values_keys_queries_and_output(linear_init: str) -> None:
    base = attention()
    mixer = Mamba2(config(), 0)
    before = state(mixer)
    fill_mamba2(mixer, base, linear_init)
    after = state(mixer)
    z, x, B, C, dt = after["in_proj.weight"].split(mixer.widths)
    assert torch.equal(x, base.v.flatten(0, 1))
    assert torch.equal(B, base.k.flatten(0, 1))
    assert torch.equal(C, base.q.flatten(0, 1))
    assert torch.equal(after["out_proj.weight"], base.o.flatten(1))
    fresh = before["in_proj.weight"].split(mixer.widths)
    assert torch.equal(z, fresh[0]) and torch.equal(dt, fresh[4])
    kept = {"dt_bias", "A_log", "D", "norm.weight"} | (
        {"conv1d.weight", "conv1d.bias"} if linear_init == "recipe" else set()
    )
    assert all(torch.equal(before[name], after[name]) for name in kept)
    if linear_init == "aligned":
        assert after["conv1d.weight"].sum(-1).eq(1).all() and after["conv1d.weight"][..., -1].eq(1).all()
        assert not after["conv1d.bias"].any()


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_other_widths_take_what_overlaps(linear_init: str) -> None:
    base = attention()
    mixer = Mamba2(config(mamba_head_dim=4, mamba_d_state=12, mamba_num_heads=6, mamba_d_inner=24, mamba_d_xb=8), 0)
    fill_mamba2(mixer, base, linear_init)
    x, C = mixer.in_proj.weight.split(mixer.widths)[1], mixer.in_proj.weight.split(mixer.widths)[3]
    if linear_init == "aligned":
        assert torch.equal(per_head(x, 2), base.v[:, :4])
        assert torch.equal(per_head(C, 6)[:4, :8], base.q)
    else:
        assert torch.equal(x, base.v.flatten(0, 1)[:8])
        assert torch.equal(C[:32], base.q.flatten(0, 1))


@pytest.mark.parametrize("linear_init", ["recipe", "aligned"])
def test_norm_weights_of_qwen3_go_into_the_rows(linear_init: str) -> None:
    base = attention(qk_norm=True)
    gdn, mamba = GatedDeltaNet(config(gdn_num_heads=4, gdn_head_dim=8), 0), Mamba2(config(), 0)
    fill_gated_deltanet(gdn, base, linear_init)
    fill_mamba2(mamba, base, linear_init)
    assert base.q_norm is not None and base.k_norm is not None
    queries = base.q * base.q_norm[:, None]
    keys = base.k * base.k_norm[:, None]
    _, _, B, C, _ = mamba.in_proj.weight.split(mamba.widths)
    assert torch.equal(gdn.q_proj.weight, queries.flatten(0, 1))
    assert torch.equal(gdn.k_proj.weight, keys.repeat_interleave(2, 0).flatten(0, 1))
    assert torch.equal(C, queries.flatten(0, 1)) and torch.equal(B, keys.flatten(0, 1))
