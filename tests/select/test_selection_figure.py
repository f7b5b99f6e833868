"""The figure of a selection, drawn from what selection.json says."""

from typing import Any

import matplotlib
import pytest

from hylo.report.drawing import STYLE
from hylo.report.names import MIXERS
from hylo.select.figure import _figure, draw_selection


def selection(**changes: Any) -> dict[str, Any]:
    scores = [
        {"layer": i, "score": score, "error": 0.01, "tokens": 100, "seconds": 1.0}
        for i, score in enumerate((0.5, 0.7, 0.02, -0.01, 0.0, 0.04))
    ]
    figures = {"kl": 0.4, "kl_se": 0.01, "needle": 0.9, "needle_se": 0.02}
    compared = {
        "chosen": {"layers": [0, 1], **figures},
        "uniform": {"layers": [1, 4], **figures, "needle": 0.0, "needle_se": None},
        "difference": figures,
    }
    return {
        "method": "kl",
        "order": "greedy",
        "layout": "2MLA4GDN",
        "layers": 6,
        "chosen": [0, 1],
        "uniform": [1, 4],
        "scores": scores,
        "comparison": compared,
    } | changes


def test_a_score_for_every_layer_and_the_choice_beside_the_even_spread() -> None:
    drawing = draw_selection(selection())
    assert drawing is not None and drawing.png.startswith(b"\x89PNG")
    for text in ("2MLA4GDN by kl, greedy", "stays MLA", "becomes GDN", "even", "0.400", "90.0", "KL to the base"):
        assert text in drawing.file, text
    assert "var(--figure" in drawing.svg and "var(--figure" not in drawing.file


def test_bars_stand_at_their_scores_in_the_colour_of_what_the_layer_becomes() -> None:
    with matplotlib.rc_context(STYLE):
        axes = _figure(selection()).axes[0]
    bars = [patch for patch in axes.patches]
    assert [bar.get_height() for bar in bars] == [0.5, 0.7, 0.02, -0.01, 0.0, 0.04]
    kinds = ["mla"] * 2 + ["gated_deltanet"] * 4
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars] == [
        MIXERS[kind].colour.lower() for kind in kinds
    ]


@pytest.mark.parametrize(("method", "label"), [("window", "damage by a window"), ("gates", "gate of attention")])
def test_other_methods(method: str, label: str) -> None:
    drawing = draw_selection(selection(method=method, order=None, layout="2A4KDA"))
    assert drawing is not None and label in drawing.file and f"by {method}<" in drawing.file
    assert "stays A" in drawing.file and "becomes KDA" in drawing.file


def test_without_scores_there_is_nothing_to_draw_and_without_a_comparison_the_scores_alone() -> None:
    assert draw_selection(selection(scores=[])) is None
    alone = selection()
    del alone["comparison"]
    drawing = draw_selection(alone)
    assert drawing is not None and "Needle" not in drawing.file


def test_a_single_repeat_has_no_error() -> None:
    scores = [score | {"error": None} for score in selection()["scores"]]
    assert draw_selection(selection(scores=scores)) is not None
