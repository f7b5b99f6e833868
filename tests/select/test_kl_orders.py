"""The three orders of method kl, on a made-up model whose KL is known for every set of layers."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from hylo.select import kl
from hylo.select.records import Records

LAYERS = 5


def divergence(attention: Iterable[int]) -> float:
    """Layers 0 and 1 are a circuit: one is worth nothing without the other. Layer 3 is worth a little, alone."""
    kept = set(attention)
    return 2.0 - (1.0 if {0, 1} <= kept else 0.0) - 0.3 * (3 in kept) - 0.2 * (4 in kept) - 0.1 * (2 in kept)


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Any:
    calls: list[tuple[int, ...]] = []

    def measured(self: Any, picked: list[int]) -> dict[str, Any]:
        calls.append(tuple(picked))
        return {"kl": [divergence(picked), divergence(picked) + 0.5], "answers": [None] * 2, "tokens": 10}

    monkeypatch.setattr(kl._Arrangements, "_measure", measured)

    def run(order: str, count: int) -> Any:
        calls.clear()
        context: Any = SimpleNamespace(layers=LAYERS, count=count, records=Records(None), probe=lambda: None)
        ranking = kl.rank_kl(context, order)  # type: ignore[arg-type]
        assert len(calls) == len(set(calls)) and ranking.tokens == 10 * len(calls)
        assert sorted(ranking.order) == list(range(LAYERS))
        return ranking, len(calls)

    return run


def test_one_shot_takes_each_layer_alone(ranked: Any) -> None:
    ranking, calls = ranked("one-shot", 2)
    assert calls == 1 + LAYERS and ranking.order == [3, 4, 2, 0, 1]
    assert [score.score for score in ranking.scores] == pytest.approx([0, 0, 0.1, 0.3, 0.2])
    assert all(score.error == pytest.approx(0) for score in ranking.scores)  # paired: the rows differ alike


def test_greedy_scores_the_rest_again(ranked: Any) -> None:
    ranking, calls = ranked("greedy", 2)
    assert calls == 1 + 5 + 4 and ranking.order[:2] == [3, 4] and len(ranking.rounds) == 2


def test_removal_keeps_what_only_works_together(ranked: Any) -> None:
    ranking, calls = ranked("removal", 2)
    assert calls == 1 + 5 + 4 + 3 and ranking.order == [0, 1, 3, 4, 2]
    assert [len(scores) for scores in ranking.rounds] == [5, 4, 3]
    assert {score.layer: round(score.score, 6) for score in ranking.scores} == {0: 1, 1: 1, 2: 0.1, 3: 0.3, 4: 0.2}


def test_one_layer(ranked: Any) -> None:
    for order in ("one-shot", "greedy"):
        assert ranked(order, 1)[0].order[0] == 3
