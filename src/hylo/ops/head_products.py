"""Products of a tile with a head (V, D): to logits, and back to gradients of hidden states and head.

In float32 on an x86 CPU they go to oneDNN, which on AMD is more than twice as fast as the MKL behind `torch.mm` and
does not mind a low tile; elsewhere and in every other dtype they are plain `torch.mm`. Where products run in a narrower
dtype than the tile is kept in, the tile is narrowed a few columns at a time.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hylo.ops.head_tiles import core_dtype, slices

CPU_COLUMNS = 2**11  # of a tile at a time, so that they and their part of the head stay in cache
GPU_COLUMNS = 2**15
X86 = platform.machine() in ("x86_64", "AMD64")


def write_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float, out: Tensor) -> None:
    """out (n, V) = (hidden (n, D) head (V, D)^T + bias (V)) / temperature, multiplied in the dtype of hidden."""
    scale = 1.0 / temperature
    if _by_onednn(hidden, head, out):
        h, b = (hidden * scale).to_mkldnn(), None if bias is None else bias * scale
        for columns in _columns(out):
            out[:, columns] = linear(h, head[columns], None if b is None else b[columns]).to_dense()
    elif hidden.dtype == out.dtype:
        if bias is not None:
            out.copy_(bias)
        out.addmm_(hidden, head.T, beta=0.0 if bias is None else scale, alpha=scale)
    else:
        for columns in _columns(out):
            logits = (hidden @ head[columns].T).to(out.dtype)
            if bias is not None:
                logits += bias[columns]
            torch.mul(logits, scale, out=out[:, columns])


def times_head(tile: Tensor, head: Tensor, product: torch.dtype) -> Tensor:
    """tile (n, V) head (V, D), multiplied in `product` and summed in the tile's dtype: (n, D)."""
    if tile.dtype == head.dtype == product and not _by_onednn(tile, head):
        return tile @ head
    out = tile.new_zeros(len(tile), head.shape[1], dtype=torch.promote_types(tile.dtype, torch.float32))
    for columns in _columns(tile):
        t, W = tile[:, columns].to(product), head[columns].to(product)
        if _by_onednn(t, W):  # a linear layer's own backward product: W is not transposed
            out += torch.ops.aten.mkldnn_linear_backward_input(out.shape, t.to_mkldnn(), W).to_dense()
        else:
            out += t @ W
    return out


def add_head_gradient(tile: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out (V, D) += tile (n, V)^T hidden (n, D), multiplied in the dtype of hidden."""
    if _by_onednn(tile, hidden, out):
        h = hidden.T.contiguous()
        for columns in _columns(tile):
            out[columns] += linear(tile[:, columns].T.contiguous().to_mkldnn(), h).to_dense()
    elif tile.dtype == hidden.dtype == out.dtype:
        out.addmm_(tile.T, hidden)
    else:
        for columns in _columns(tile):
            out[columns] += tile[:, columns].to(hidden.dtype).T @ hidden


class Gradients:
    """The gradients of a scalar loss to hidden states (N, D), head (V, D) and bias (V,), tile by tile.

    Only those that are wanted are made; the head and the bias may have more rows than a tile has columns.
    """

    def __init__(self, ctx: Any, product: torch.dtype, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        self.product, self.core = product, core_dtype(product)
        self.dtypes = [None if x is None else x.dtype for x in (hidden, head, bias)]
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.head = torch.zeros_like(head, dtype=self.core) if wants_head else None
        self.bias = None if bias is None or not wants_bias else torch.zeros_like(bias, dtype=self.core)

    def add(self, rows: slice, tile: Tensor, weights: Tensor, hidden: Tensor, head: Tensor) -> None:
        """Adds a tile (n, V) of gradients to logits, each row times its weight (n,)."""
        weights_n1 = weights[:, None]  # applied on the D-wide side, which is the narrow one
        if self.hidden is not None:
            self.hidden[rows] = times_head(tile, head, self.product).to(self.core).mul_(weights_n1)
        if self.head is not None:
            add_head_gradient(tile, (hidden * weights_n1).to(self.product), self.head[: len(head)])
        if self.bias is not None:
            for columns in _columns(tile):
                self.bias[columns] += weights @ tile[:, columns].to(self.core)

    def save(self, ctx: Any) -> None:
        gradients = (self.hidden, self.head, self.bias)
        ctx.save_for_backward(*(g if g is None else g.to(d) for g, d in zip(gradients, self.dtypes, strict=True)))


def trainable(*arguments: Tensor | None) -> Sequence[Tensor | None]:
    """Under no_grad an autograd.Function still sees what trains, and would take gradients that nobody asks for."""
    return arguments if torch.is_grad_enabled() else [x if x is None else x.detach() for x in arguments]


def scaled_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that forward has taken and saved, times that of the loss.

    The head's is often a step's largest tensor. It is not copied: the first backward pass hands out what was saved,
    scaled in place (`.data`, so that the graph may be kept), and only later passes over a kept graph get copies.
    """
    scale, saved = grad_output.item(), ctx.saved_tensors
    if not hasattr(ctx, "scale"):
        ctx.scale = scale if scale != 0.0 and math.isfinite(scale) else 1.0
        if ctx.scale != 1.0:
            for gradient in saved:
                if gradient is not None:
                    gradient.data.mul_(ctx.scale)
    return tuple(g if g is None or scale == ctx.scale else g * (scale / ctx.scale) for g in saved)


def _columns(tile: Tensor) -> Iterator[slice]:
    return slices(tile.shape[1], CPU_COLUMNS if tile.device.type == "cpu" else GPU_COLUMNS)


def _by_onednn(*tensors: Tensor) -> bool:
    in_use = X86 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return in_use and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
