"""Latent attention initialised from attention: which rows, which frequencies, and how much the ranks keep."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.convert import BaseAttention
from hylo.convert.calibration import LayerSample
from hylo.convert.mla import best_pairs, fill_mla, fold_key_norm, rope_theta, split_rows
from hylo.convert.svd import cholesky, energy_kept, low_rank, rank_for_energy, singular_values
from hylo.errors import HyloError
from hylo.modeling import HyloConfig
from hylo.modeling.mla import MultiHeadLatentAttention

H, K, D_HEAD, D = 4, 2, 16, 40
INITS = ["recipe", "pairs-stride", "pairs-fast"]


def attention(qk_norm: bool = False) -> BaseAttention:
    norms = (torch.rand(D_HEAD), torch.rand(D_HEAD)) if qk_norm else (None, None)
    shapes = ((H, D_HEAD, D), (K, D_HEAD, D), (K, D_HEAD, D), (D, H, D_HEAD))
    return BaseAttention(*(torch.randn(shape) for shape in shapes), *norms)


def filled(base: BaseAttention, init: str, rope: int, r_kv: int, r_q: int = D) -> MultiHeadLatentAttention:
    config = HyloConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D_HEAD,
        mixers=["mla"],
        q_lora_rank=r_q,
        kv_lora_rank=r_kv,
        qk_nope_head_dim=D_HEAD - rope,
        qk_rope_head_dim=rope,
        v_head_dim=D_HEAD,
        qk_norm=base.q_norm is not None,
    )
    mixer = MultiHeadLatentAttention(config, 0)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    fill_mla(mixer, base, init)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    return mixer


def products(mixer: MultiHeadLatentAttention) -> SimpleNamespace:
    """The factors multiplied out: q (H,d,D), nope (K,nope,D), value (K,v,D), rope key (rope,D)."""
    q = (mixer.q_b_proj.weight @ mixer.q_a_proj.weight).unflatten(0, (H, -1))
    down, key = mixer.kv_a_proj_with_mqa.weight.split([mixer.rank, mixer.rope])
    up = (mixer.kv_b_proj.weight @ down).unflatten(0, (K, -1))
    return SimpleNamespace(q=q, nope=up[:, : mixer.nope], value=up[:, mixer.nope :], key=key)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [4, 8, 16])
@pytest.mark.parametrize("init", INITS)
def test_full_rank_keeps_every_row(init: str, rope: int, qk_norm: bool) -> None:
    base = attention(qk_norm)
    rank = min(D, K * (2 * D_HEAD if init == "recipe" else 2 * D_HEAD - rope))
    mixer = filled(base, init, rope, rank)
    product = products(mixer)
    nope_rows, rope_rows = split_rows(D_HEAD, rope, init)
    rows = torch.cat((nope_rows, rope_rows))
    assert sorted(rows.tolist()) == list(range(D_HEAD))
    torch.testing.assert_close(product.q, base.q[:, rows], atol=1e-4, rtol=0)
    torch.testing.assert_close(product.nope, base.k[:, nope_rows], atol=1e-4, rtol=0)
    torch.testing.assert_close(product.value, base.v, atol=1e-4, rtol=0)
    torch.testing.assert_close(product.key, base.k[:, rope_rows].mean(0))
    torch.testing.assert_close(mixer.o_proj.weight, base.o.flatten(1))
    if base.q_norm is not None and base.k_norm is not None:
        torch.testing.assert_close(mixer.q_norm.weight, base.q_norm[rows])
        torch.testing.assert_close(mixer.k_norm.weight, base.k_norm[rows])


def rotation_of_base(x: Tensor, position: float, theta: float) -> Tensor:
    """The base's RoPE on (..., d): pairs (j, j + d/2)."""
    d = x.shape[-1]
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :])
    angles = position * theta ** (-2 * torch.arange(d // 2, dtype=x.dtype) / d)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("rope", [4, 8, 16])
@pytest.mark.parametrize("init", ["pairs-stride", "pairs-fast"])
def test_kept_pairs_turn_as_they_did_in_the_base(init: str, rope: int) -> None:
    theta, x = 10000.0, torch.randn(5, D_HEAD, dtype=torch.float64)
    _, rows = split_rows(D_HEAD, rope, init)
    student_theta = rope_theta(theta, D_HEAD, rope, init)
    expected = rotation_of_base(x, 37.0, theta)[:, rows]
    torch.testing.assert_close(rotation_of_base(x[:, rows], 37.0, student_theta), expected)


def test_recipe_turns_neighbours_of_the_last_rows() -> None:
    """The released semantics: the slice as it comes, pairs (2i, 2i+1), inv_freq_i = theta^(-2i/rope)."""
    theta, rope, position = 10000.0, 8, 21.0
    x = torch.randn(D_HEAD, dtype=torch.float64)
    tail = x[-rope:]
    released = torch.empty_like(tail)
    for i in range(rope // 2):
        angle = torch.tensor(position * theta ** (-2 * i / rope), dtype=torch.float64)
        released[2 * i] = tail[2 * i] * angle.cos() - tail[2 * i + 1] * angle.sin()
        released[2 * i + 1] = tail[2 * i] * angle.sin() + tail[2 * i + 1] * angle.cos()
    _, rows = split_rows(D_HEAD, rope, "recipe")
    ours = rotation_of_base(x[rows], position, rope_theta(theta, D_HEAD, rope, "recipe"))
    torch.testing.assert_close(ours, torch.cat((released[0::2], released[1::2])))


def test_recipe_factors_whole_keys_and_pairs_what_they_keep() -> None:
    base, rank, rope = attention(), 12, 8
    whole = torch.cat((base.k.flatten(0, 1), base.v.flatten(0, 1)))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    mixer = filled(base, "recipe", rope, rank)
    down = mixer.kv_a_proj_with_mqa.weight[:rank]
    torch.testing.assert_close(down.norm(dim=1), S[:rank])  # the singular values go down
    approximation = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    keys, values = approximation.unflatten(0, (2, K, D_HEAD))
    product = products(mixer)
    torch.testing.assert_close(product.nope, keys[:, : D_HEAD - rope], atol=1e-3, rtol=0)
    torch.testing.assert_close(product.value, values, atol=1e-3, rtol=0)

    nope_rows, _ = split_rows(D_HEAD, rope, "pairs-fast")
    kept = torch.cat((base.k[:, nope_rows].flatten(0, 1), base.v.flatten(0, 1)))
    S = torch.linalg.svdvals(kept)
    product = products(filled(base, "pairs-fast", rope, rank))
    error = (product.nope - base.k[:, nope_rows]).square().sum() + (product.value - base.v).square().sum()
    torch.testing.assert_close(error, S[rank:].square().sum())  # Eckart-Young: no rank-12 product is closer


def test_singular_values_go_down() -> None:
    matrix = torch.randn(20, 12)
    up, down, singular = low_rank(matrix, 5)
    torch.testing.assert_close(singular, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(up.T @ up, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(down.norm(dim=1), torch.linalg.svdvals(matrix)[:5])
    up, down, _ = low_rank(matrix, 12)
    torch.testing.assert_close(up @ down, matrix, atol=1e-5, rtol=0)


def test_stride_needs_a_divisor() -> None:
    with pytest.raises(HyloError, match="qk_rope_head_dim 6"):
        split_rows(16, 6, "pairs-stride")


def test_covariance_puts_the_error_where_inputs_are_small() -> None:
    """CARE: of that rank the least error of the outputs, the tail of the spectrum of W L; with C = I the recipe."""
    matrix, x = torch.randn(20, 12, dtype=torch.float64), torch.randn(12, 500, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, 12, dtype=torch.float64)[:, None]
    covariance = x @ x.T / 500
    L = cholesky(covariance)
    errors = []
    for given in (covariance, None):
        up, down, singular = low_rank(matrix, 5, given)
        errors.append(((matrix - up @ down) @ L).square().sum())
        if given is not None:
            torch.testing.assert_close(errors[0], singular[5:].square().sum())
            torch.testing.assert_close(singular, torch.linalg.svdvals(matrix @ L))
    assert errors[0] < 0.1 * errors[1]
    up, down, _ = low_rank(matrix, 12, covariance)
    torch.testing.assert_close(up @ down, matrix)
    white = [first @ second for first, second, _ in (low_rank(matrix, 5, torch.eye(12).double()), low_rank(matrix, 5))]
    torch.testing.assert_close(*white)


def test_damping_grows_until_the_covariance_has_a_root() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    damped = cholesky(x @ x.T)
    assert (damped @ damped.T - x @ x.T).diagonal().mean() == pytest.approx(0.01 * (x @ x.T).diagonal().mean().item())
    negative = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    L = cholesky(negative)
    assert ((L @ L.T) - negative).diagonal().mean() == pytest.approx(0.1 * 1.95 / 3)


def test_ranks_from_energy() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0] + [0.1] * 13)
    assert energy_kept(singular, 2) == pytest.approx(13 / (14 + 0.13))
    assert rank_for_energy(singular, 0.9) == 8 and rank_for_energy(singular, 1.0) == 16
    matrix = torch.randn(9, 20)
    assert rank_for_energy(singular_values(matrix), 1.0) == 9


def sample_of(base: BaseAttention, x: Tensor) -> LayerSample:
    q, k = (torch.einsum("btn,hdn->bthd", x, rows) for rows in (base.q, base.k))
    return LayerSample(x, x, q, q, k, 0.25)


def test_best_pairs_are_those_that_make_the_logits() -> None:
    base = attention()
    for rows in (base.q, base.k):
        rows[:, [2, 10, 5, 13]] *= 4  # pairs 2 and 5 of eight
    assert best_pairs(base, 4, None).tolist() == [2, 5]
    assert best_pairs(base, 4, sample_of(base, torch.randn(2, 30, D))).tolist() == [2, 5]
    # inputs that only the other pairs read
    x = torch.randn(2, 30, D)
    loud = base.k[:, [2, 10, 5, 13]].flatten(0, 1)
    x = x - torch.linalg.lstsq(loud.T, x.flatten(0, 1).T).solution.T.view(2, 30, -1) @ loud
    assert not {2, 5} & set(best_pairs(base, 4, sample_of(base, x)).tolist())
    _, rope = split_rows(16, 4, "pairs-best", torch.tensor([2, 5]))
    assert rope.tolist() == [2, 5, 10, 13]


def test_a_folded_key_norm_is_the_norm_where_keys_are_of_one_size() -> None:
    base = attention(qk_norm=True)
    x = torch.randn(3, 7, D)
    base = replace(base, k=base.k[:1], v=base.v[:1])
    k = torch.einsum("btn,kdn->btkd", x, base.k)
    x = x / k.square().mean((2, 3)).sqrt()[..., None]  # every key's rms is now 1
    folded = fold_key_norm(base, sample_of(base, x), 0.0)
    assert base.k_norm is not None and folded.k_norm is None
    keys = torch.einsum("btn,kdn->btkd", x, base.k)
    torch.testing.assert_close(torch.einsum("btn,kdn->btkd", x, folded.k), F.rms_norm(keys, (16,), base.k_norm))
    doubled = fold_key_norm(base, sample_of(base, 2 * x), 0.0)
    torch.testing.assert_close(doubled.k, folded.k / 2)
