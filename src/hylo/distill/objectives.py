"""What stage 2 minimises: divergences from a teacher's next-token distribution, cross-entropy of text, or a mixture.

With p_t and p_s the teacher's and the student's distribution at a position, at temperature 1,

    forward_kl     KL(p_t || p_s): cover all that the teacher would say; the published objective (arXiv 2604.24715)
    reverse_kl     KL(p_s || p_t): say nothing that the teacher would not
    jsd            beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s (GKD, arXiv 2306.13649)
    cross_entropy  -log p_s of the text's next token, where its document has one

each summed over tokens and divided by all B*T positions of the batch, whether they have a next token or not: so the
mean over micro-batches, or over processes, is the value of the whole batch. No logits are kept (hylo.ops).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hylo.distill.batch import model_inputs, next_tokens
from hylo.modeling import HyloForCausalLM
from hylo.ops.cross_entropy import hidden_state_cross_entropy
from hylo.ops.divergence import Kind, cached_divergence, hidden_state_divergence
from hylo.ops.sharded_divergence import sharded_cached_divergence, sharded_cross_entropy, sharded_divergence

JSD_BETA = 0.5  # the symmetric one


class TeacherStates(NamedTuple):
    """A teacher's final hidden states (B,T,E), after the norm, and its lm_head's weight (V,E)."""

    hidden: Tensor
    head: Tensor


class LongDistillation(nn.Module):
    """The student as stage 2 sees it: calling it gives the value of each of `objectives`, (K,), unweighted.

    `beta` is the teacher's weight in the mixture of jsd.
    """

    def __init__(
        self, student: HyloForCausalLM, objectives: Iterable[str] = ("forward_kl",), beta: float = JSD_BETA
    ) -> None:
        super().__init__()
        self.student, self.objectives, self.beta = student, tuple(objectives), beta

    def forward(self, batch: dict[str, Tensor], teacher: TeacherStates | None = None) -> Tensor:
        """`batch` as in hylo.distill.batch; only cross_entropy can do without a teacher."""
        hidden_ND = self.student.model(**model_inputs(batch), use_cache=False).last_hidden_state.flatten(0, 1)
        head_VD = self.student.lm_head.weight
        values = []
        for name in self.objectives:
            if name == "cross_entropy":
                values.append(cross_entropy(hidden_ND, head_VD, next_tokens(batch).flatten()))
            else:
                assert teacher is not None
                values.append(divergence(name, hidden_ND, head_VD, teacher, self.beta))  # type: ignore[arg-type]
        return torch.stack(values)


def divergence(kind: Kind, hidden_ND: Tensor, head_VD: Tensor, teacher: TeacherStates, beta: float) -> Tensor:
    """One divergence from a live teacher, averaged over N positions, in nats."""
    compute: Callable[..., Tensor] = sharded_divergence if isinstance(head_VD, DTensor) else hidden_state_divergence
    return compute(hidden_ND, head_VD, teacher.hidden.flatten(0, 1), teacher.head, kind=kind, beta=beta)


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The cross-entropy summed over the positions that have a target, over N, in nats."""
    compute: Callable[..., Tensor] = (
        sharded_cross_entropy if isinstance(head_VD, DTensor) else hidden_state_cross_entropy
    )
    return compute(hidden_ND, head_VD, targets_N, reduction="sum") / len(targets_N)


class CachedDistillation(nn.Module):
    """The same with a cache in the teacher's place: the batch brings vectors (B,T,D) and neg_entropy (B,T).

    The value (1,) is the forward KL.
    """

    def __init__(self, student: HyloForCausalLM) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden_ND = self.student.model(**model_inputs(batch), use_cache=False).last_hidden_state.flatten(0, 1)
        head_VD = self.student.lm_head.weight
        vectors_ND, neg_entropy_N = batch["vectors"].flatten(0, 1), batch["neg_entropy"].flatten()
        compute: Callable[..., Tensor] = (
            sharded_cached_divergence if isinstance(head_VD, DTensor) else cached_divergence
        )
        return compute(hidden_ND, head_VD, vectors_ND, neg_entropy_N)[None]
