"""Attention into linear blocks: the base's q, k, v and output projections, copied where the student has room for them.

- `recipe`: as published (HyLo, arXiv 2604.24715; Mamba-in-Llama, arXiv 2408.15237): overlapping top-left submatrices,
  kv heads repeated for Gated DeltaNet; convolutions and everything else keep their random values.
- `aligned`: whole heads. A student head takes queries, keys, values and output columns of the same base heads, none of
  them split across student heads, and convolutions start as the identity.

Linear blocks have no place for Qwen3's per-head norms, so the norms' weights are multiplied into the rows they scale.
"""

import torch
from torch import Tensor, nn

from hylo.convert.base import BaseAttention
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.mamba2 import Mamba2


@torch.no_grad()
def fill_gated_deltanet(mixer: GatedDeltaNet, base: BaseAttention, linear_init: str) -> None:
    """Overwrites what `linear_init` copies; the rest of the freshly initialised `mixer` stays."""
    heads = len(base.q)
    q, k = _with_norms(base)
    k, v = (t.repeat_interleave(heads // len(t), dim=0) for t in (k, base.v))
    o = base.o.movedim(0, -1)  # (H, d, D), as the others
    if linear_init == "recipe":
        for projection, source in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, v)):
            _copy_overlap(projection.weight, source.flatten(0, 1))
        _copy_overlap(mixer.o_proj.weight, base.o.flatten(1))
        return
    targets = (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight, mixer.o_proj.weight.T)
    for target, source in zip(targets, (q, k, v, o), strict=True):
        by_head = target.unflatten(0, (mixer.num_heads, -1))
        for student_head, base_heads in enumerate(
            share_heads(heads, q.shape[1], mixer.num_heads, by_head_width(mixer))
        ):
            _copy_overlap(by_head[student_head], source[base_heads].flatten(0, 1))
    for convolution in (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d):
        _identity(convolution)


@torch.no_grad()
def fill_mamba2(mixer: Mamba2, base: BaseAttention, linear_init: str) -> None:
    """x <- v, B <- k, C <- q, out_proj <- o; the rest of the freshly initialised `mixer` stays."""
    q, k = _with_norms(base)
    _, x, B, C, _ = mixer.in_proj.weight.split(mixer.widths)
    _, head_dim, hidden = q.shape
    for target, width, source in ((x, mixer.head_dim, base.v), (B, mixer.d_state, k), (C, mixer.d_state, q)):
        if linear_init == "recipe":
            _copy_overlap(target, source.flatten(0, 1))
        else:
            _copy_overlap(target.view(-1, width, hidden), source)
    out, o = mixer.out_proj.weight, base.o
    if linear_init == "recipe":
        _copy_overlap(out, o.flatten(1))
    else:
        _copy_overlap(out.view(hidden, -1, mixer.head_dim), o)
        _identity(mixer.conv1d)


def share_heads(heads: int, head_dim: int, student_heads: int, student_width: int) -> list[list[int]]:
    """The base heads that each student head takes: as many whole ones as fit (one, cut short, where none does).

    Where not all of them fit, those taken are spread evenly, so that every kv group stays represented.
    """
    taken = min(heads, student_heads * max(1, student_width // head_dim))
    chosen = [(2 * i + 1) * heads // (2 * taken) for i in range(taken)]
    bounds = [i * taken // student_heads for i in range(student_heads + 1)]
    return [chosen[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def by_head_width(mixer: GatedDeltaNet) -> int:
    return mixer.key_dim // mixer.num_heads


def _with_norms(base: BaseAttention) -> tuple[Tensor, Tensor]:
    """Query and key rows, times the norm weights that Qwen3 applies to every head."""
    if base.q_norm is None or base.k_norm is None:
        return base.q, base.k
    return base.q * base.q_norm[:, None], base.k * base.k_norm[:, None]


def _copy_overlap(target: Tensor, source: Tensor) -> None:
    """Copies the leading block that both tensors have, dimension by dimension."""
    block = tuple(slice(min(a, b)) for a, b in zip(target.shape, source.shape, strict=True))
    target[block] = source[block]


def _identity(convolution: nn.Conv1d) -> None:
    """A causal convolution that passes its input through: only the current token's tap, no bias."""
    convolution.weight.zero_()
    convolution.weight[..., -1] = 1
    if convolution.bias is not None:
        convolution.bias.zero_()
