"""`kl`: layers of an all-linear student are put back to attention, and the KL to the base says which are worth it.

One-shot scoring is that of KL-guided selection (arXiv 2512.20569) and of Zebra-Llama's SMART (2505.17272), here without
training in between, as alignment makes every layer stand beside the base's own. Two orders see what layers do together:
`greedy` keeps the best and scores the rest again; `removal` starts from all attention and takes the cheapest away.
"""

from collections.abc import Iterable, Sequence

from hylo.evaluate.forward import Scorer
from hylo.evaluate.rows import Record
from hylo.select.context import LayerScore, Order, Ranking, SelectionContext, best_first
from hylo.select.probe import difference, measure

Round = list[LayerScore]


def rank_kl(context: SelectionContext, order: Order) -> Ranking:
    """The score is the KL, in nats a token, that attention at a layer takes away; its error is paired over the rows."""
    arrangements = _Arrangements(context)
    if order == "removal":
        ranked, rounds = _removal(arrangements, context.layers, context.count)
    else:
        ranked, rounds = _greedy(arrangements, context.layers, context.count if order == "greedy" else 1)
    last = {score.layer: score for scores in rounds for score in scores}
    scores = [last[layer] for layer in sorted(last)]
    return Ranking(ranked, scores, rounds, arrangements.tokens, arrangements.seconds)


def _greedy(arrangements: "_Arrangements", layers: int, count: int) -> tuple[list[int], list[Round]]:
    kept: list[int] = []
    rounds: list[Round] = []
    for _ in range(count):
        before = arrangements.measured(kept)
        having = {i: arrangements.measured([*kept, i]) for i in range(layers) if i not in kept}
        rounds.append([_score(i, before, after, after) for i, after in having.items()])
        kept.append(best_first(rounds[-1])[0])
    return kept + [i for i in best_first(rounds[-1]) if i not in kept], rounds


def _removal(arrangements: "_Arrangements", layers: int, count: int) -> tuple[list[int], list[Round]]:
    kept = list(range(layers))
    removed: list[int] = []
    rounds: list[Round] = []
    while len(kept) > count:
        after = arrangements.measured(kept)
        without = {i: arrangements.measured([j for j in kept if j != i]) for i in kept}
        rounds.append([_score(i, before, after, before) for i, before in without.items()])
        removed.append(best_first(rounds[-1])[-1])
        kept.remove(removed[-1])
    return [i for i in best_first(rounds[-1]) if i in kept] + removed[::-1], rounds


def _score(layer: int, before: Record, after: Record, new: Record) -> LayerScore:
    """Of what was measured `before` attention stood at a layer and `after`; the `new` one of them is the cost."""
    drop = difference(before["kl"], after["kl"])
    return LayerScore(layer, drop.value, drop.error, new["tokens"], new["seconds"])


class _Arrangements:
    """KL to the base of hybrids of the two students, each measured once, all on the same rows."""

    def __init__(self, context: SelectionContext) -> None:
        self.context, self.probe = context, context.probe()
        self.known: dict[str, Record] = {}

    def measured(self, attention_layers: Iterable[int]) -> Record:
        picked = sorted(attention_layers)
        key = "kl/" + ("-".join(map(str, picked)) or "none")
        if key not in self.known:
            self.known[key] = self.context.records.timed(key, lambda: self._measure(picked))
        return self.known[key]

    def _measure(self, picked: Sequence[int]) -> Record:
        model = self.context.students.arrange(picked)
        found = measure(Scorer(model), self.probe, self.context.teacher)
        layers = ", ".join(map(str, picked)) or "no layer"
        self.context.console.print(f"attention in {layers}: KL {difference(found['kl']).value:.4f}", highlight=False)
        return found | {"tokens": self.probe.tokens}

    @property
    def tokens(self) -> int:
        return sum(record["tokens"] for record in self.known.values())

    @property
    def seconds(self) -> float:
        return sum(record["seconds"] for record in self.known.values())
