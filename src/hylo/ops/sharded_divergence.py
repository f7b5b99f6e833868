"""The losses from hidden states where every process holds a part of the head's rows, and its own tokens.

Neither logits nor heads move. By tiles, the hidden states of all processes' tokens are gathered, each process computes
their logits over its own part of the vocabulary, and what a softmax needs is put together from one number a token and
process, its log-sum-exp. The gradient of a tile's logits then goes into the process's own rows of the head, and the
gradients of hidden states, each a sum over the vocabulary, are added up where their tokens are. A tile has as many
elements as in hylo.ops.divergence: W times the tokens by 1/W of the vocabulary, with W the number of processes.

A process's loss is that of its own tokens. Gradients of heads are what FSDP makes of gradients: the average over the
processes of those of each one's loss. So all of them must call, with as many tokens, and scale the loss by the same.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from hylo.ops.checks import check_tensors
from hylo.ops.divergence import KINDS, REDUCTIONS, Kind, Reduction
from hylo.ops.head_products import add_head_gradient, scaled_gradients, times_head, trainable, write_logits
from hylo.ops.head_tiles import (
    check_choice,
    check_temperature,
    check_tokens,
    core_dtype,
    product_dtype,
    slices,
    tile_height,
    token_weights,
)

IGNORED = -100


def sharded_divergence(
    student_hidden: Tensor,
    student_head: DTensor,
    teacher_hidden: Tensor,
    teacher_head: DTensor,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`hidden_state_divergence` of this process's tokens, from heads of which each process holds rows.

    Shapes: student_hidden (N, D_s), student_head (V, D_s), teacher_hidden (N, D_t), teacher_head (V, D_t), mask (N,); N
    and V are the same in all processes and for both. Raises ValueError where arguments do not fit.
    """
    operation = "sharded_divergence"
    check_tensors(
        operation,
        student_hidden=(student_hidden, "N D_s"),
        student_head=(student_head, "V D_s"),
        teacher_hidden=(teacher_hidden, "N D_t"),
        teacher_head=(teacher_head, "V D_t"),
    )
    check_tokens(operation, "mask", mask, student_hidden)
    check_choice(operation, "kind", kind, KINDS)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    check_temperature(operation, temperature)
    processes = Processes(student_head)
    loss = _DivergenceRows(processes, teacher_hidden, teacher_head.to_local(), kind, temperature, beta)
    return _from_parts(student_hidden, student_head, processes, loss, temperature, mask, reduction)


def sharded_cross_entropy(
    hidden: Tensor, head: DTensor, labels: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """`hidden_state_cross_entropy` of this process's tokens, from a head of which each process holds rows.

    Shapes: hidden (N, D), head (V, D), labels (N,) int64, -100 for none, mask (N,).
    """
    operation = "sharded_cross_entropy"
    check_tensors(operation, hidden=(hidden, "N D"), head=(head, "V D"))
    check_tokens(operation, "labels", labels, hidden)
    check_tokens(operation, "mask", mask, hidden)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    labelled = labels != IGNORED
    processes = Processes(head)
    loss = _CrossEntropyRows(processes, labels, processes.rank * math.ceil(len(head) / processes.count))
    mask = labelled if mask is None else labelled * mask
    return _from_parts(hidden, head, processes, loss, 1.0, mask, reduction)


def sharded_cached_divergence(
    student_hidden: Tensor,
    student_head: DTensor,
    vectors: Tensor,
    neg_entropy: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`cached_divergence` of this process's tokens, from a frozen head of which each process holds rows.

    Shapes: student_hidden (N, D), student_head (V, D), vectors (N, D), neg_entropy (N,), mask (N,).
    """
    operation = "sharded_cached_divergence"
    check_tensors(
        operation,
        student_hidden=(student_hidden, "N D"),
        student_head=(student_head, "V D"),
        vectors=(vectors, "N D"),
        neg_entropy=(neg_entropy, "N"),
    )
    check_tokens(operation, "mask", mask, student_hidden)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    check_temperature(operation, temperature)
    processes = Processes(student_head)
    core = core_dtype(product_dtype(student_hidden))
    weights = token_weights(mask, student_hidden, reduction, core)
    known = neg_entropy.to(core) - torch.linalg.vecdot(student_hidden.to(core), vectors.to(core))
    log_sums = _LogSumRows(processes)
    return weights @ known + _from_parts(
        student_hidden, student_head, processes, log_sums, temperature, mask, reduction
    )


class Processes:
    """Those that share a head's rows, and the three things they tell each other about a tile."""

    def __init__(self, head: DTensor) -> None:
        self.group = head.device_mesh.get_group()
        self.count, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """(n, ...) of each -> (W n, ...), one process's after the other's."""
        out = own.new_empty(self.count * len(own), *own.shape[1:])
        dist.all_gather(list(out.chunk(self.count)), own.contiguous(), self.group)
        return out

    def add(self, partial: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(partial, group=self.group)
        return partial

    def add_own(self, partial: Tensor) -> Tensor:
        """(W n, ...) of each -> (n, ...), the sum over the processes of what belongs to this one's tokens."""
        out = partial.new_empty(len(partial) // self.count, *partial.shape[1:])
        dist.reduce_scatter(out, list(partial.chunk(self.count)), group=self.group)
        return out

    def own(self, gathered: Tensor) -> Tensor:
        return gathered.chunk(self.count)[self.rank]

    def to_log_softmax(self, *tiles: Tensor) -> Tensor:
        """Takes each row's log-sum-exp over the whole vocabulary off the logits (n, V/W); returns it, (tiles, n)."""
        own = torch.stack([tile.logsumexp(-1) for tile in tiles])
        log_sums = self.gather(own[None]).logsumexp(0)
        for tile, log_sum in zip(tiles, log_sums, strict=True):
            tile.sub_(log_sum[:, None])
        return log_sums


class _DivergenceRows:
    """A tile's divergences; its student's logits become their gradient (over the temperature's)."""

    def __init__(
        self,
        processes: Processes,
        teacher_hidden: Tensor,
        teacher_part: Tensor,
        kind: Kind,
        temperature: float,
        beta: float,
    ) -> None:
        self.processes, self.teacher_hidden, self.teacher_part = processes, teacher_hidden, teacher_part
        self.kind, self.temperature, self.beta = kind, temperature, beta
        self.scale = 1.0 - beta if kind == "jsd" else 1.0

    def __call__(self, rows: slice, product: torch.dtype, s: Tensor) -> Tensor:
        h = self.processes.gather(self.teacher_hidden[rows].to(product))
        t = torch.empty_like(s)
        write_logits(h, self.teacher_part.to(product), None, self.temperature, t)
        self.processes.to_log_softmax(s, t)
        p_s, p_t = s.exp(), t.exp()
        d = t.sub_(s)
        if self.kind == "forward_kl":
            torch.sub(p_s, p_t, out=s)
            return self.processes.add(torch.linalg.vecdot(p_t, d))
        if self.kind == "reverse_kl":
            values = self.processes.add(torch.linalg.vecdot(p_s, d).neg_())
            torch.add(d, values[:, None], out=s).mul_(p_s).neg_()
            return values
        r = torch.add(d, math.log(self.beta), out=s)
        torch.logaddexp(r, r.new_tensor(math.log1p(-self.beta)), out=r).neg_()
        kl_s, kl_t = self.processes.add(torch.stack([torch.linalg.vecdot(p_s, r), torch.linalg.vecdot(p_t, d.add_(r))]))
        r.sub_(kl_s[:, None]).mul_(p_s)
        return self.beta * kl_t + (1.0 - self.beta) * kl_s


class _LogSumRows:
    """A tile's log-sum-exps; its logits become the softmax."""

    scale = 1.0

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __call__(self, rows: slice, product: torch.dtype, s: Tensor) -> Tensor:
        (values,) = self.processes.to_log_softmax(s)
        s.exp_()
        return values


class _CrossEntropyRows:
    """A tile's cross-entropies, of labels (N,) that count from the first row of the whole head."""

    scale = 1.0

    def __init__(self, processes: Processes, labels: Tensor, first: int) -> None:
        self.processes, self.labels, self.first = processes, labels, first

    def __call__(self, rows: slice, product: torch.dtype, s: Tensor) -> Tensor:
        labels = self.processes.gather(self.labels[rows]) - self.first
        own = ((labels >= 0) & (labels < s.shape[1])).nonzero()[:, 0]
        self.processes.to_log_softmax(s)
        values = s.new_zeros(len(s))
        values[own] = -s[own, labels[own]]
        s.exp_()
        s[own, labels[own]] -= 1.0
        return self.processes.add(values)


RowLoss = _DivergenceRows | _LogSumRows | _CrossEntropyRows


def _from_parts(
    hidden: Tensor,
    head: DTensor,
    processes: Processes,
    loss: RowLoss,
    temperature: float,
    mask: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    arguments = (*trainable(hidden, head.to_local()), len(head), processes, loss, temperature, mask, reduction)
    value: Tensor = _FromParts.apply(*arguments)
    return value


class _FromParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        part_vD: Tensor,
        vocabulary: int,
        processes: Processes,
        loss: RowLoss,
        temperature: float,
        mask_N: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        product = product_dtype(hidden_ND)
        core = core_dtype(product)
        weights_N = token_weights(mask_N, hidden_ND, reduction, core)
        total = weights_N.new_zeros(())
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_part = torch.zeros_like(part_vD, dtype=core) if wants_head else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            W = part_vD.to(product)
            # Both models' logits and their softmax, in tiles of as many elements as one process alone would take.
            for rows in slices(len(hidden_ND), tile_height(len(hidden_ND), vocabulary, 4 * vocabulary * core.itemsize)):
                h, weights = processes.gather(hidden_ND[rows].to(product)), processes.gather(weights_N[rows])
                s = torch.empty(len(h), len(W), dtype=core, device=h.device)
                write_logits(h, W, None, temperature, s)
                total += weights_N[rows] @ processes.own(loss(rows, product, s))
                weights_n1 = (weights * (loss.scale / temperature))[:, None]
                if grad_hidden is not None:
                    partial = times_head(s, W, product).to(core).mul_(weights_n1)
                    grad_hidden[rows] = processes.add_own(partial)
                if grad_part is not None:
                    add_head_gradient(s, (h * (weights_n1 / processes.count)).to(product), grad_part)
        ctx.save_for_backward(grad_hidden, None if grad_part is None else grad_part.to(part_vD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_output), *[None] * 6
