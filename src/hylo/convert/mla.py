"""Attention into latent attention: which part of a head stays rotated, and the SVDs of queries, keys and values.

The base rotates the pairs (j, j + d/2) of every head, pair j by theta^(-2j/d). MLA rotates only `rope` of the d values,
with the pairs (j, j + rope/2) of its own, so an initialisation says which rows of the base become those values:

- `recipe`: the last `rope` rows as they come (HyLo, arXiv 2604.24715). The released models turn neighbours (2i, 2i+1)
  of that slice; here the slice is reordered so that our pairs are those neighbours. None is a pair of the base's.
- `pairs-stride`: whole pairs at stride d/rope, whose frequencies are those of a RoPE of width `rope` with that theta.
- `pairs-fast`: the rope/2 fastest pairs, whose frequencies are those of a RoPE of width `rope` with theta^(rope/d).
- `pairs-best`: the pairs that matter most to a layer's attention (MHA2MLA, arXiv 2502.14837), each layer its own; their
  frequencies, the base's, stand in the configuration.

All heads share one rotated key: the mean over the kv heads, or, pair by pair, their first principal component.
"""

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hylo.convert.base import BaseAttention
from hylo.convert.calibration import LayerSample
from hylo.convert.svd import energy_kept, low_rank
from hylo.errors import HyloError
from hylo.modeling.attention import RMSNorm, inverse_rms
from hylo.modeling.mla import MultiHeadLatentAttention


class MlaFit(NamedTuple):
    """The base's pairs that stay rotated, (rope/2,), and the share of squared singular values that the ranks keep."""

    pairs: Tensor
    kv_energy: float
    q_energy: float


@torch.no_grad()
def fill_mla(
    mixer: MultiHeadLatentAttention,
    base: BaseAttention,
    init: str,
    rope_key: str = "mean",
    sample: LayerSample | None = None,
) -> MlaFit:
    """Overwrites every parameter of `mixer` with what the base's attention gives (float32 arithmetic).

    `rope_key`: mean or pca. With a `sample`, ranks are cut where the layer's own inputs lose least, and a folded key
    norm (which needs one) takes its scale from it.
    """
    if base.k_norm is not None and not mixer.normalises_keys:
        assert sample is not None
        base = fold_key_norm(base, sample, cast(RMSNorm, mixer.q_norm).eps)
    pairs = best_pairs(base, mixer.rope, sample) if init == "pairs-best" else None
    nope, rope = split_rows(base.q.shape[1], mixer.rope, init, pairs)
    rows = torch.cat((nope, rope))
    covariance = None if sample is None else sample.covariance()
    key, key_bias, query_factor_HP = shared_key(base, rope, rope_key, sample)

    q_rank = mixer.q_a_proj.out_features
    up, down, q_singular = low_rank(queries(base, nope, rope, query_factor_HP), q_rank, covariance)
    mixer.q_a_proj.weight.copy_(down)
    mixer.q_b_proj.weight.copy_(up)

    seen = rows_factored(base.q.shape[1], nope, init)
    up, down, kv_singular = low_rank(keys_and_values(base, seen), mixer.rank, covariance)
    up_keys, up_values = up.unflatten(0, (len(base.k), -1)).split([len(seen), base.v.shape[1]], dim=1)
    mixer.kv_b_proj.weight.copy_(torch.cat((up_keys[:, : len(nope)], up_values), dim=1).flatten(0, 1))
    mixer.kv_a_proj_with_mqa.weight.copy_(torch.cat((down, key)))

    mixer.o_proj.weight.copy_(base.o.flatten(1))
    if mixer.gated:  # half open, whatever the input, and what it halves is doubled
        mixer.g_proj.weight.zero_()
        mixer.o_proj.weight.mul_(2)
    if base.q_norm is not None:
        mixer.q_norm.get_parameter("weight").copy_(base.q_norm[rows])
    if base.k_norm is not None:
        mixer.k_norm.weight.copy_(base.k_norm[rows])
    if base.q_bias is not None and base.k_bias is not None and base.v_bias is not None:
        q_bias = torch.cat((base.q_bias[:, nope], base.q_bias[:, rope] * query_factor_HP), dim=1)
        mixer.q_b_proj.bias.copy_(q_bias.flatten())
        mixer.kv_b_proj.bias.copy_(torch.cat((base.k_bias[:, nope], base.v_bias), dim=1).flatten())
        mixer.kv_a_proj_with_mqa.bias.copy_(torch.cat((torch.zeros(mixer.rank), key_bias)))
    return MlaFit(rope[: mixer.rope // 2], energy_kept(kv_singular, mixer.rank), energy_kept(q_singular, q_rank))


def split_rows(head_dim: int, rope: int, init: str, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of a base head that stay unrotated and rows that are rotated, both in the student's order.

    `pairs`: those that `pairs-best` has chosen. Raises HyloError if `pairs-stride` finds no whole stride.
    """
    if init == "recipe":
        tail = torch.arange(head_dim - rope, head_dim)
        return torch.arange(head_dim - rope), torch.cat((tail[0::2], tail[1::2]))
    if init == "pairs-stride" and head_dim % rope:
        raise HyloError(f"qk_rope_head_dim {rope} does not divide head_dim {head_dim}, as init pairs-stride needs")
    if pairs is None:
        pairs = torch.arange(rope // 2) * (head_dim // rope if init == "pairs-stride" else 1)
    rotated = torch.cat((pairs, pairs + head_dim // 2))
    return torch.tensor([row for row in range(head_dim) if row not in set(rotated.tolist())], dtype=torch.long), rotated


def rope_theta(theta: float, head_dim: int, rope: int, init: str) -> float:
    """The theta under which a RoPE of width `rope` has the frequencies of the pairs that `init` keeps."""
    return theta ** (rope / head_dim) if init in ("pairs-fast", "random") else theta


def rows_factored(head_dim: int, nope: Tensor, init: str) -> Tensor:
    """Key rows in the joint SVD: all for the recipe, which drops the rotated ones afterwards; else what is kept."""
    return torch.arange(head_dim) if init == "recipe" else nope


def keys_and_values(base: BaseAttention, rows: Tensor) -> Tensor:
    """The matrix that the joint SVD factors: by kv head, the key's `rows` and the whole value."""
    return torch.cat((base.k[:, rows], base.v), dim=1).flatten(0, 1)


def queries(base: BaseAttention, nope: Tensor, rope: Tensor, query_factor_HP: Tensor) -> Tensor:
    """The matrix that the queries' SVD factors: by head, unrotated rows, then rotated ones times `shared_key`'s."""
    return torch.cat((base.q[:, nope], base.q[:, rope] * query_factor_HP[..., None]), dim=1).flatten(0, 1)


def best_pairs(base: BaseAttention, rope: int, sample: LayerSample | None) -> Tensor:
    """The rope/2 pairs with the largest sum over heads of mean ||q_pair|| mean ||k_pair||, ascending (MHA2MLA).

    Without a sample the norms of the weights stand for those of the activations.
    """
    heads, head_dim, _ = base.q.shape
    if sample is not None:
        q_HPN, k_KPN = (pair_norms(t.flatten(0, 1).movedim(0, -1)) for t in (sample.q_BTHd, sample.k_BTKd))
        q_HP, k_KP = q_HPN.mean(-1), k_KPN.mean(-1)
    else:
        q, k = (_normed(rows, weight) for rows, weight in ((base.q, base.q_norm), (base.k, base.k_norm)))
        q_HP, k_KP = (pair_norms(t.norm(dim=-1, keepdim=True)).squeeze(-1) for t in (q, k))
    score = (q_HP * k_KP.repeat_interleave(heads // len(k_KP), 0)).sum(0)
    return score.topk(rope // 2).indices.sort().values


def pair_norms(x_HdN: Tensor) -> Tensor:
    """||(x_j, x_(j+d/2))|| of every pair: (H, d/2, N)."""
    first, second = x_HdN.chunk(2, dim=1)
    return (first.square() + second.square()).sqrt()


def shared_key(
    base: BaseAttention, rope: Tensor, rope_key: str, sample: LayerSample | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One rotated key for all heads: its rows (P,D), its bias (P,), and what query rows are multiplied by (H,P).

    `pca` (RoRoPE of TransMLA, arXiv 2502.07864): a rotation across kv heads that is the same on both members of a pair
    commutes with RoPE; u, its first axis, maximises what one key keeps of all: key = sum_h u_h k_h, q_h -> u_h q_h.
    """
    heads, kv_heads, P = len(base.q), len(base.k), len(rope)
    k_KPD = base.k[:, rope]
    bias_KP = torch.zeros(kv_heads, P) if base.k_bias is None else base.k_bias[:, rope]
    if rope_key == "mean":
        return k_KPD.mean(0), bias_KP.mean(0), torch.ones(heads, P)
    seen_KPN = torch.cat((k_KPD, bias_KP[..., None]), dim=-1)  # without a sample, inputs count as white
    if sample is not None:
        seen_KPN = k_KPD @ sample.inputs_BTD.flatten(0, 1).T + bias_KP[..., None]
    by_pair = seen_KPN.unflatten(1, (2, P // 2)).permute(2, 0, 1, 3).flatten(2)  # (pairs, K, members x N)
    u_PK = torch.linalg.eigh(by_pair @ by_pair.transpose(1, 2)).eigenvectors[..., -1]
    u_KP = torch.cat((u_PK, u_PK)).T
    return (
        (u_KP[..., None] * k_KPD).sum(0),
        (u_KP * bias_KP).sum(0),
        u_KP.repeat_interleave(heads // kv_heads, 0),
    )


def fold_key_norm(base: BaseAttention, sample: LayerSample, eps: float) -> BaseAttention:
    """The base with Qwen3's key norm as part of its key rows: weight times the mean of 1/rms, head by head."""
    assert base.k_norm is not None
    k_BTKd = torch.einsum("btn,kdn->btkd", sample.inputs_BTD, base.k)
    scale_K = inverse_rms(k_BTKd, eps).mean((0, 1)).squeeze(-1)
    return replace(base, k=base.k * (scale_K[:, None] * base.k_norm)[..., None], k_norm=None)


def _normed(rows_HdD: Tensor, weight: Tensor | None) -> Tensor:
    """Rows as if every head's input had unit variance and, on Qwen3, went through its norm."""
    if weight is None:
        return rows_HdD
    rms = rows_HdD.square().sum((1, 2), keepdim=True).div(rows_HdD.shape[1]).sqrt()
    return rows_HdD / rms * weight[:, None]
