"""Facts in rows: where they stand, what is marked, and that a row depends on its seed alone."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hylo.data.retrieval import KEYS, VALUES, FactFormat, fact_row, needle_row, window

FACTS = FactFormat(
    prefix=[1, 2],
    keys=[[k] if k % 2 else [k, 3] for k in range(10, 40)],
    values=[[v] if v % 2 else [v, 4] for v in range(40, 60)],
    suffix=[5],
)
STREAM = np.arange(1000, 4000).astype(np.int32)  # every token tells its place


def find(ids: np.ndarray, part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)].tolist() == part]


def test_words_are_distinct() -> None:
    assert len(set(KEYS) | set(VALUES)) == len(KEYS) + len(VALUES)


def test_format_of_a_tokenizer() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    facts = FactFormat.of(letters)
    spelled = "".join(letters.convert_ids_to_tokens(facts.state(0, 1)))
    assert spelled == f"Ċ# remember {KEYS[0]} {VALUES[1]}Ċ".replace(" ", "Ġ")
    assert facts.longest == len("\n# remember\n") + max(map(len, KEYS)) + max(map(len, VALUES)) + 2


@pytest.mark.parametrize("first_bin", range(4))
def test_needle_row(first_bin: int) -> None:
    row = needle_row(np.random.default_rng(first_bin), STREAM, 300, FACTS, 4, first_bin)
    assert row.ids.shape == (300,) and len(row.spans) == len(row.depths) == 4
    text = row.ids[row.ids >= 1000]
    assert (np.diff(text) == 1).all()  # one window, cut but not shuffled
    haystack_end = min(start for start, _ in row.spans) - max(map(len, FACTS.keys)) - len(FACTS.prefix)
    for (start, end), depth in zip(row.spans, row.depths, strict=True):
        answer = row.ids[start:end].tolist()
        assert answer in FACTS.values
        key = next(k for k in FACTS.keys if row.ids[:start].tolist()[-len(k) - 2 :] == FACTS.prefix + k)
        planted, asked = find(row.ids, FACTS.prefix + key)
        assert asked + len(FACTS.prefix + key) == start and planted < haystack_end <= asked
        assert (
            row.ids[planted:][: len(key) + 2 + len(answer) + 1].tolist() == FACTS.prefix + key + answer + FACTS.suffix
        )
        assert depth == pytest.approx(planted / haystack_end, abs=0.05)
    assert row.spans[-1][1] == 300  # nothing follows the last answer


def test_needles_take_one_depth_bin_each() -> None:
    for seed in range(20):
        depths = needle_row(np.random.default_rng(seed), STREAM, 400, FACTS, 8, seed).depths
        assert [int(8 * depth + 0.1) for depth in sorted(depths)] == pytest.approx(range(8), abs=1)
        assert len(set(depths)) == 8


def test_fact_row() -> None:
    row = fact_row(np.random.default_rng(0), STREAM, 400, FACTS, 5, 4)
    assert row.ids.shape == row.first.shape == row.answer.shape == (400,)
    assert not (row.first & row.answer).any()
    starts = find(row.ids, FACTS.prefix)
    assert len(starts) == 20
    told: dict[tuple[int, ...], list[int]] = {}
    for start in starts:
        state = row.ids[start:].tolist()
        key = next(k for k in FACTS.keys if state[2 : 2 + len(k)] == k)
        value = next(v for v in FACTS.values if state[2 + len(key) :][: len(v)] == v)
        span = slice(start + 2 + len(key), start + 2 + len(key) + len(value))
        known = tuple(key) in told
        assert row.answer[span].all() == known and row.first[span].all() == (not known)
        assert told.setdefault(tuple(key), value) == value
    assert len(told) == 5 and row.answer.sum() == sum(3 * len(value) for value in told.values())


def test_fact_row_stays_half_text() -> None:
    row = fact_row(np.random.default_rng(0), STREAM, 100, FACTS, 50, 4)
    assert (row.ids >= 1000).sum() >= 50
    assert (fact_row(np.random.default_rng(0), STREAM, 20, FACTS, 5, 4).ids >= 1000).all()  # too short for a fact


def test_window_reaches_both_ends() -> None:
    starts = {int(window(np.random.default_rng(i), np.arange(5), 4)[0]) for i in range(20)}
    assert starts == {0, 1}
    assert window(np.random.default_rng(0), np.arange(5), 5).tolist() == [0, 1, 2, 3, 4]
