"""`gates`: both students' layers in place, mixed by one gate a layer, and only the gates learn (arXiv 2606.30562).

A layer computes a_i attention_i(x) + (1 - a_i) linear_i(x), a_i = sigmoid(logit_i), where attention_i and linear_i are
the two students' whole layers, as alignment trains whole layers. On rows of synthetic retrieval the logits minimise

    KL(base || mixture) + lambda sum_i a_i,   lambda = (KL(base || all linear) - KL(base || all attention)) / layers,

so that a gate stays open where attention is worth more than a layer's even share of what all of it is worth: no weight
is to be tuned for another base. The scores are the gates.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hylo.errors import HyloError
from hylo.ops.divergence import hidden_state_divergence
from hylo.select.context import LayerScore, SelectionContext
from hylo.select.probe import difference
from hylo.select.records import Records

REPEATS = 3  # each with rows of its own
STEPS, STEP_TOKENS = 20, 2048
LEARNING_RATE = 0.3  # of a logit, by Adam: some seven steps from half open to nine tenths
FIRST_SEED = 100  # of the rows: not those that the layouts are compared on


def score_gates(context: SelectionContext, layers: Sequence[int], record: Records) -> list[LayerScore]:
    """The gates of `layers`, 0 to 1, in the mean of REPEATS, with its standard error; goes on from `record`, repeat by
    repeat. All the layers' gates learn together, whichever are asked for.

    Raises HyloError where a loss is not finite.
    """
    found = []
    for repeat in range(REPEATS):
        found.append(record.timed(f"gates/repeat-{repeat}", lambda repeat=repeat: learn(context, repeat)))  # type: ignore[misc]
        shown = ", ".join(f"{gate:.2f}" for gate in found[-1]["gates"])
        context.console.print(f"gates, repeat {repeat + 1} of {REPEATS}: {shown}", highlight=False)
    tokens, seconds = (sum(repeat[key] for repeat in found) / context.layers for key in ("tokens", "seconds"))
    scores = []
    for layer in layers:
        mean = difference([repeat["gates"][layer] for repeat in found])
        scores.append(LayerScore(layer, mean.value, mean.error, round(tokens), seconds))
    return scores


def learn(context: SelectionContext, repeat: int) -> dict[str, Any]:
    """One repeat: {"gates": by layer, "penalty": lambda, "loss": the KL of every step, "tokens": those read}."""
    probe = context.probe(facts=1.0, seed=FIRST_SEED + repeat)
    rows = max(1, STEP_TOKENS // context.length)
    batches = probe.ids_RT.to(context.device).split(rows)
    mixture = GatedMixture(context)
    with torch.no_grad():
        ends = [sum(mixture.divergence(ids, torch.full_like(mixture.logits, end)) for ids in batches[:4])
                for end in (-math.inf, math.inf)]  # fmt: skip
    penalty = max(0.0, float(ends[0] - ends[1])) / len(batches[:4]) / context.layers
    optimizer = torch.optim.Adam([mixture.logits], LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        loss = mixture.divergence(batches[step % len(batches)], mixture.logits)
        (loss + penalty * mixture.logits.sigmoid().sum()).backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise HyloError("the students' probabilities are not finite; convert or align them again")
        optimizer.step()
        optimizer.zero_grad()
    read = STEPS * batches[0].numel() + 2 * sum(ids.numel() for ids in batches[:4])
    gates = mixture.logits.detach().sigmoid().tolist()
    return {"gates": gates, "penalty": penalty, "loss": losses, "tokens": read}


class GatedMixture:
    """The two students, layer by layer side by side; `logits` (L,) float32 are all that trains, half open at first."""

    def __init__(self, context: SelectionContext) -> None:
        self.students, self.teacher = context.students, context.teacher
        self.logits = nn.Parameter(torch.zeros(context.layers, device=context.device))

    def divergence(self, ids_BT: Tensor, logits_L: Tensor) -> Tensor:
        """KL(base || mixture) over all tokens, in nats a token."""
        hidden_BTD, head_VD = self.hidden(ids_BT, logits_L.sigmoid()), self.students.model.lm_head.weight
        theirs_BTD = self.teacher.remembered(ids_BT)
        return hidden_state_divergence(
            hidden_BTD.flatten(0, 1), head_VD, theirs_BTD.flatten(0, 1), self.teacher.head.to(theirs_BTD.dtype)
        )

    def hidden(self, ids_BT: Tensor, gates_L: Tensor) -> Tensor:
        """Final hidden states (B,T,D); each student's final norm goes with its last layer, as in `Students`."""
        students = self.students
        hidden_BTD = students.model.model.embed_tokens(ids_BT)
        sides = []
        for layers, attention_like in ((students.attention, range(len(students.attention))), (students.linear, ())):
            sides.append((layers, students.arrange(attention_like).model.layer_inputs(hidden_BTD)))
        for i, gate in enumerate(gates_L.to(hidden_BTD.dtype)):
            branches = [layers[i](hidden_BTD, **inputs) for layers, inputs in sides]
            if i == len(gates_L) - 1:
                branches = [norm(branch) for norm, branch in zip(students.norms, branches, strict=True)]
            hidden_BTD = gate * branches[0] + (1 - gate) * branches[1]
        return hidden_BTD
