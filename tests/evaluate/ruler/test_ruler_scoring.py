"""Scores by strings, as the benchmark's two metrics have them."""

import pytest

from hylo.evaluate.ruler import score


@pytest.mark.parametrize(
    ("task", "prediction", "outputs", "wanted"),
    [
        ("niah_single_1", " 1234567.", ["1234567"], 100),
        ("niah_single_1", " 123456.", ["1234567"], 0),
        ("niah_multivalue", "1111111, 3333333", ["1111111", "2222222", "3333333", "4444444"], 50),
        ("vt", "abcde ABC", ["ABCDE", "FGHIJ"], 50),
        ("cwe", "1. tree 2. House", ["House", "river", "tree"], 200 / 3),
        ("fwe", "", ["abcdef", "ghijkl", "mnopqr"], 0),
        ("qa_1", "It was in the year 1066.", ["1066", "in 1066 or so"], 100),
        ("qa_2", "nobody knows", ["yes", "no"], 100),
        ("qa_2", "maybe", ["yes", "no"], 0),
        ("qa_1", "New\x07York", ["new\nyork"], 100),
        ("qa_1", "\x00 York\x1f", ["york"], 100),
    ],
)
def test_scores(task: str, prediction: str, outputs: list[str], wanted: float) -> None:
    assert score(task, prediction, outputs) == pytest.approx(wanted)


def test_shares_are_lm_evals() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    for prediction, outputs in [("One, two", ["one", "two", "three"]), ("", ["x"]), ("\tThree\x01", ["three", "four"])]:
        said = theirs.postprocess_pred([prediction])
        assert score("cwe", prediction, outputs) == pytest.approx(100 * theirs.string_match_all(said, [outputs]))
