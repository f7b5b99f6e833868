"""Attention into latent attention: which part of a head stays rotated, and the SVDs of queries, keys and values.

The base rotates the pairs (j, j + d/2) of every head, pair j by theta^(-2j/d). MLA rotates only `rope` of the d values,
with the pairs (j, j + rope/2) of its own, so an initialisation says which rows of the base become those values:

- `recipe`: the last `rope` rows as they come (HyLo, arXiv 2604.24715). The released models turn neighbours (2i, 2i+1)
  of that slice; here the slice is reordered so that our pairs are those neighbours. None is a pair of the base's.
- `pairs-stride`: whole pairs at stride d/rope, whose frequencies are those of a RoPE of width `rope` with that theta.
- `pairs-fast`: the rope/2 fastest pairs, whose frequencies are those of a RoPE of width `rope` with theta^(rope/d).
"""

import torch
from torch import Tensor

from hylo.convert.base import BaseAttention
from hylo.convert.svd import low_rank
from hylo.errors import HyloError
from hylo.modeling.mla import MultiHeadLatentAttention


def split_rows(head_dim: int, rope: int, init: str) -> tuple[Tensor, Tensor]:
    """Rows of a base head that stay unrotated and rows that are rotated, both in the student's order.

    Raises HyloError if `pairs-stride` finds no whole stride.
    """
    half = rope // 2
    if init == "recipe":
        tail = torch.arange(head_dim - rope, head_dim)
        return torch.arange(head_dim - rope), torch.cat((tail[0::2], tail[1::2]))
    if init == "pairs-stride" and head_dim % rope:
        raise HyloError(f"qk_rope_head_dim {rope} does not divide head_dim {head_dim}, as init pairs-stride needs")
    first = torch.arange(half) * (head_dim // rope if init == "pairs-stride" else 1)
    rotated = torch.cat((first, first + head_dim // 2))
    return torch.tensor([row for row in range(head_dim) if row not in set(rotated.tolist())], dtype=torch.long), rotated


def rope_theta(theta: float, head_dim: int, rope: int, init: str) -> float:
    """The theta under which a RoPE of width `rope` has the frequencies of the pairs that `init` keeps."""
    return theta if init in ("recipe", "pairs-stride") else theta ** (rope / head_dim)


@torch.no_grad()
def fill_mla(mixer: MultiHeadLatentAttention, base: BaseAttention, init: str) -> None:
    """Overwrites every parameter of `mixer` with what the base's attention gives (float32 arithmetic)."""
    heads, head_dim, hidden = base.q.shape
    kv_heads = len(base.k)
    nope, rope = split_rows(head_dim, mixer.rope, init)
    rows = torch.cat((nope, rope))

    up, down = low_rank(base.q[:, rows].reshape(-1, hidden), mixer.q_a_proj.out_features)
    mixer.q_a_proj.weight.copy_(down)
    mixer.q_b_proj.weight.copy_(up)

    # The recipe's joint SVD sees whole keys, of which the rotated rows are then dropped; the others see what they keep.
    seen = torch.arange(head_dim) if init == "recipe" else nope
    keys_and_values = torch.cat((base.k[:, seen], base.v), dim=1)
    up, down = low_rank(keys_and_values.reshape(-1, hidden), mixer.rank)
    up_keys, up_values = up.unflatten(0, (kv_heads, -1)).split([len(seen), head_dim], dim=1)
    mixer.kv_b_proj.weight.copy_(torch.cat((up_keys[:, : len(nope)], up_values), dim=1).flatten(0, 1))
    shared_key = base.k[:, rope].mean(dim=0)
    mixer.kv_a_proj_with_mqa.weight.copy_(torch.cat((down, shared_key)))

    mixer.o_proj.weight.copy_(base.o.flatten(1))
    if base.q_norm is not None and base.k_norm is not None:
        mixer.q_norm.get_parameter("weight").copy_(base.q_norm[rows])
        mixer.k_norm.weight.copy_(base.k_norm[rows])
