"""`window`: in the base, one layer at a time sees only a sliding window; what a row of facts loses by it is the score.

Nothing is trained and no student is needed. A layer stays attention where long rows are damaged most.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo.evaluate.forward import Scorer
from hylo.select.context import LayerScore, Ranking, SelectionContext
from hylo.select.probe import difference, measure

WINDOW_SHARE = 8  # of the probe's length, one part


def rank_window(context: SelectionContext, window: int | None = None) -> Ranking:
    """`window` in tokens, the token itself included (None: an eighth of the probe's length).

    The score, in nats a token, is the rise of the loss on the answers plus the KL to the base at all tokens, of rows
    that all have facts; the error is paired over the rows.
    """
    probe = context.probe(facts=1.0)
    length = probe.ids_RT.shape[1]
    window = window or max(1, length // WINDOW_SHARE)

    def read(scorer: Scorer) -> dict[str, Any]:
        return measure(scorer, probe, context.teacher) | {"tokens": probe.tokens}

    whole = context.records.timed("window/base", lambda: read(context.teacher))
    scores = []
    for layer in range(context.layers):
        scorer = Windowed(context.base_model, layer, window)
        found = context.records.timed(f"window/layer-{layer}", lambda scorer=scorer: read(scorer))  # type: ignore[misc]
        damage = [loss + kl for loss, kl in zip(found["answers"], found["kl"], strict=True)]
        rise = difference(damage, whole["answers"])
        scores.append(LayerScore(layer, rise.value, rise.error, found["tokens"], found["seconds"]))
        context.console.print(f"layer {layer} with a window of {window}: {rise.value:.4g}", highlight=False)
    ranking = Ranking.of(scores)
    return replace(ranking, tokens=ranking.tokens + whole["tokens"], seconds=ranking.seconds + whole["seconds"])


class Windowed(Scorer):
    """A base of which one layer sees a window; the teacher, which may be the same model, never sees through it."""

    def __init__(self, base: PreTrainedModel, layer: int, window: int) -> None:
        super().__init__(base)
        self.layer, self.window = layer, window

    def hidden(self, ids: Tensor) -> Tensor:
        with windowed(self.model, self.layer, self.window, ids.shape[1]):
            return super().hidden(ids)


@contextlib.contextmanager
def windowed(base: PreTrainedModel, layer: int, window: int, length: int) -> Iterator[None]:
    """While it lasts, a layer of transformers' Llama or Qwen sees the last `window` tokens of rows of `length`."""
    distance_TT = torch.arange(length)[:, None] - torch.arange(length)
    unseen_TT = ((distance_TT < 0) | (distance_TT >= window)).to(base.device)
    zeros = torch.zeros(unseen_TT.shape, dtype=base.dtype, device=base.device)
    mask: Tensor = zeros.masked_fill(unseen_TT, torch.finfo(base.dtype).min)[None, None]

    def narrow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": mask}

    hook = base.base_model.layers[layer].self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
