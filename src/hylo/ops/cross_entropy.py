"""Cross-entropy of labels from a language model's final hidden states, without a matrix of logits.

By the tiles of hylo.ops.divergence: with s = W h + b and p its softmax, the loss of a token with label y is
logsumexp(s) - s_y and its gradient to the logits p - onehot(y), taken while the tile is there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from hylo.ops.checks import check_tensors
from hylo.ops.divergence import REDUCTIONS, Reduction
from hylo.ops.head_products import Gradients, scaled_gradients, trainable, write_logits
from hylo.ops.head_tiles import (
    check_choice,
    check_tokens,
    core_dtype,
    product_dtype,
    row_kernels,
    slices,
    softmax_,
    tile_height,
    token_weights,
)

IGNORED = -100  # the label of a token without one, as in torch


def hidden_state_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
) -> Tensor:
    """The cross-entropy in nats, a scalar: summed over tokens, or averaged over those with a label and by the mask.

    Shapes: hidden (N, D), head (V, D), labels (N,) int64, mask (N,) of booleans or weights, bias (V,). A label of -100
    counts for nothing. The gradient goes to whatever of hidden, head and bias trains. Precision and the empty mask as
    in `hidden_state_divergence`, as is a head shared out over processes; raises ValueError where arguments do not fit.
    """
    if isinstance(head, DTensor):
        from hylo.ops.sharded_divergence import sharded_cross_entropy

        return sharded_cross_entropy(hidden, head, labels, mask, reduction)
    operation = "hidden_state_cross_entropy"
    sizes = check_tensors(operation, hidden=(hidden, "N D"), head=(head, "V D"), bias=(bias, "V"))
    check_tokens(operation, "labels", labels, hidden)
    check_tokens(operation, "mask", mask, hidden)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    if labels.dtype != torch.int64:
        raise ValueError(f"{operation}: labels is {labels.dtype}, expected torch.int64")
    known = (labels == IGNORED) | (labels >= 0) & (labels < sizes["V"])
    if not known.all():
        raise ValueError(
            f"{operation}: labels holds {labels[~known][0].item()}, expected {IGNORED} or 0 to {sizes['V'] - 1}"
        )
    loss: Tensor = _CrossEntropy.apply(*trainable(hidden, head, bias), labels, mask, reduction)
    return loss


def naive_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
) -> Tensor:
    """The same from full logits and autograd: the reference."""
    logits = torch.nn.functional.linear(hidden, head, bias)
    values = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    weights = (labels != IGNORED).to(values.dtype)
    if mask is not None:
        weights = weights * mask
    total = (values * weights).sum()
    return total / weights.sum() if reduction == "mean" else total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        mask_N: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        N, V = len(hidden_ND), len(head_VD)
        product = product_dtype(hidden_ND)
        core = core_dtype(product)
        kernels = row_kernels(hidden_ND)
        labelled_N = labels_N != IGNORED
        weights_N = token_weights(labelled_N if mask_N is None else labelled_N * mask_N, hidden_ND, reduction, core)
        labels_N = labels_N.clamp_min(0)  # of a token without a label any will do: it weighs nothing
        total = weights_N.new_zeros(())
        with torch.autocast(hidden_ND.device.type, enabled=False):
            W, b = head_VD.to(product), None if bias_V is None else bias_V.to(core)
            gradients = Gradients(ctx, product, hidden_ND, head_VD, bias_V)
            tile = product if kernels else core
            height = tile_height(N, V, V * tile.itemsize)
            buffer = torch.empty(height, V, dtype=tile, device=hidden_ND.device)
            for rows in slices(N, height):
                h, labels, weights = hidden_ND[rows].to(product), labels_N[rows], weights_N[rows]
                s = buffer[: len(h)]
                if kernels:
                    torch.mm(h, W.T, out=s)
                    values = kernels.cross_entropy_rows_(s, b, labels)
                else:
                    write_logits(h, W, b, 1.0, s)
                    of_labels = s.gather(1, labels[:, None])[:, 0]
                    values = softmax_(s)[0] - of_labels
                    s.scatter_add_(1, labels[:, None], s.new_full((len(h), 1), -1.0))
                total += weights @ values
                gradients.add(rows, s, weights, h, W)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_output), *[None] * 3
