"""Rows of an attention's projections, and where they go: which heads a linear block's head takes, and copying them."""

import torch
from torch import Tensor, nn

from hylo.convert.base import BaseAttention
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention


def copy_heads(
    mixer: GatedDeltaNet | KimiDeltaAttention, q_HdX: Tensor, k_HdX: Tensor, v_HdX: Tensor, o_DHd: Tensor
) -> tuple[list[list[int]], list[list[int]]]:
    """Whole heads into the mixer's, rows with biases (last column); its convolutions become the identity.

    Value channels that no head fills stay random and are not read: training can take them up, nothing is heard.
    Returns the heads whose keys, and those whose values, each of the mixer's heads has.
    """
    for convolution in (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d):
        identity(convolution)
    heads, head_dim = q_HdX.shape[:2]
    key_width, width = (p.out_features // mixer.num_heads for p in (mixer.k_proj, mixer.v_proj))
    keys_of = share_heads(heads, head_dim, mixer.num_heads, key_width)
    values_of = share_values(keys_of, heads, width // head_dim)
    mixer.o_proj.weight.zero_()
    out = mixer.o_proj.weight.unflatten(1, (mixer.num_heads, -1))
    for head, (key_heads, value_heads) in enumerate(zip(keys_of, values_of, strict=True)):
        for projection, source in ((mixer.q_proj, q_HdX), (mixer.k_proj, k_HdX)):
            copy_rows(projection, source[key_heads].flatten(0, 1)[:key_width], head * key_width)
        copy_rows(mixer.v_proj, v_HdX[value_heads].flatten(0, 1)[:width], head * width)
        copy_overlap(out[:, head], o_DHd[:, value_heads].flatten(1))
    return keys_of, values_of


def share_heads(heads: int, head_dim: int, student_heads: int, student_width: int) -> list[list[int]]:
    """The base heads that each student head takes: as many whole ones as fit (one, cut short, where none does).

    Where not all of them fit, those taken are spread evenly, so that every kv group stays represented.
    """
    taken = min(heads, student_heads * max(1, student_width // head_dim))
    chosen = [(2 * i + 1) * heads // (2 * taken) for i in range(taken)]
    bounds = [i * taken // student_heads for i in range(student_heads + 1)]
    return [chosen[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def share_values(keys_of: list[list[int]], heads: int, room: int) -> list[list[int]]:
    """The base heads whose values and output columns each student head takes: those of its keys, then what is left.

    Values are wider than keys. Each base head whose keys found no room goes to the nearest head's student head (of the
    same kv group if it can), while that has `room` for it, so that its values are read by its neighbour's attention.
    """
    values_of = [list(taken) for taken in keys_of]
    for head in sorted(set(range(heads)) - {head for taken in keys_of for head in taken}):
        free = [i for i, taken in enumerate(keys_of) if taken and len(values_of[i]) < room]
        if free:
            values_of[min(free, key=lambda i: min(abs(head - other) for other in keys_of[i]))].append(head)
    return values_of


def projection_rows(base: BaseAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Rows and biases of queries, keys and values; Qwen3's norms are multiplied in."""
    q = base.q if base.q_norm is None else base.q * base.q_norm[:, None]
    k = base.k if base.k_norm is None else base.k * base.k_norm[:, None]
    return [(q, base.q_bias), (k, base.k_bias), (base.v, base.v_bias)]


def with_bias(rows_HdD: Tensor, bias_Hd: Tensor | None) -> Tensor:
    """(H,d,D+1): the bias as a last column, so that it goes wherever its row goes."""
    bias_Hd = rows_HdD.new_zeros(rows_HdD.shape[:2]) if bias_Hd is None else bias_Hd
    return torch.cat((rows_HdD, bias_Hd[..., None]), dim=-1)


def copy_rows(projection: nn.Linear, rows_ND: Tensor, start: int = 0) -> None:
    """Copies rows with their biases (the last column) to where `start` says, as many as there is room for."""
    copy_overlap(projection.weight[start:], rows_ND[:, :-1])
    if projection.bias is not None:
        copy_overlap(projection.bias[start:], rows_ND[:, -1])


def value_rms(v_KdD: Tensor, norm_D: Tensor) -> Tensor:
    """(K,): rms of every head's values, rows with bias, for inputs x = norm * (rms 1, as if uncorrelated)."""
    second_moment = torch.cat((norm_D.square(), norm_D.new_ones(1)))
    return (v_KdD.square() @ second_moment).mean(-1).sqrt()


def copy_overlap(target: Tensor, source: Tensor) -> None:
    """Copies the leading block that both tensors have, dimension by dimension."""
    block = tuple(slice(min(a, b)) for a, b in zip(target.shape, source.shape, strict=True))
    target[block] = source[block]


def identity(convolution: nn.Conv1d) -> None:
    """A causal convolution that passes its input through: only the current token's tap, no bias."""
    convolution.weight.zero_()
    convolution.weight[..., -1] = 1
    if convolution.bias is not None:
        convolution.bias.zero_()
