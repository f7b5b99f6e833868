"""What every method of selection is given, and what it returns of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from rich.console import Console
from transformers import PreTrainedModel

from hylo.data.training import TrainingData
from hylo.evaluate.forward import Teacher
from hylo.evaluate.subject import PRECISIONS
from hylo.layout import attention_positions, is_attention_like
from hylo.modeling.loading import load_model
from hylo.plan import Plan
from hylo.select.probe import Probe, probe_rows
from hylo.select.records import Records
from hylo.select.students import Students, load_students

Order = Literal["one-shot", "greedy", "removal"]  # of putting layers back, for method kl


@dataclass(frozen=True)
class LayerScore:
    """How much attention is worth at `layer`: the higher the `score`, the sooner it stays.

    `error` is the score's standard error, over rows (paired where two models read the same ones) or over repeats; None
    for a single one. `tokens` and `seconds` are what the score took.
    """

    layer: int
    score: float
    error: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Ranking:
    """`order`: all layers, the first to stay attention-like first. `scores`, by layer: each one's from the last round
    that it was in; `rounds` has all. `tokens` and `seconds` are what all of it took."""

    order: list[int]
    scores: list[LayerScore]
    rounds: list[list[LayerScore]]
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, scores: Sequence[LayerScore]) -> Self:
        """By a single round of scores."""
        scores = sorted(scores, key=lambda score: score.layer)
        cost = sum(score.tokens for score in scores), sum(score.seconds for score in scores)
        return cls(best_first(scores), scores, [scores], *cost)


def best_first(scores: Sequence[LayerScore]) -> list[int]:
    """Layers by score, the highest first; of equals the earlier layer."""
    return [score.layer for score in sorted(scores, key=lambda score: (-score.score, score.layer))]


@dataclass(frozen=True)
class SelectionContext:
    """`plan` is the budget's layout with its attention-like layers spread evenly; only their number and kind, and the
    geometry, count here.

    `all_attention` and `all_linear` are the directories of two students of `base` (converted or aligned), of which
    `students` puts layers together. The probe is `tokens` of held-out text in rows of `length`, of which a share of
    `facts` has facts planted in it. `records` keeps what has been scored.
    """

    base: Path
    plan: Plan
    all_attention: Path
    all_linear: Path
    data: TrainingData
    length: int
    tokens: int
    facts: float
    seed: int
    precision: str
    console: Console
    records: Records

    @property
    def layers(self) -> int:
        """How many the base has."""
        return len(self.plan.mixers)

    @property
    def count(self) -> int:
        """How many of them are to stay attention-like."""
        return sum(map(is_attention_like, self.plan.mixers))

    @property
    def uniform(self) -> list[int]:
        """The layers that stay where nothing is measured."""
        return attention_positions(self.count, self.layers)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def base_model(self) -> PreTrainedModel:
        """transformers' own, loaded once, in evaluation mode, no parameter of it trained."""
        return load_model(self.base, PRECISIONS[self.precision], self.device).requires_grad_(False)

    @cached_property
    def teacher(self) -> Teacher:
        """The base, whose hidden states of a row are computed once."""
        return Teacher(self.base_model)

    @cached_property
    def students(self) -> Students:
        """Both students in one model, loaded once."""
        return load_students(self.all_attention, self.all_linear, PRECISIONS[self.precision], self.device)

    def probe(self, facts: float | None = None, seed: int = 0) -> Probe:
        """Rows of the held-out text; `facts` in place of the context's share. Another `seed` gives other rows."""
        share = self.facts if facts is None else facts
        return probe_rows(self.data, self.length, self.tokens, share, (self.seed, seed))
