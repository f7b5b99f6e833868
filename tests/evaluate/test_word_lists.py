"""The word lists that RULER's samples draw from: common words, each once, in all three files together."""

from collections import Counter
from importlib.resources import files

import pytest

LISTS = {"nouns": 1800, "adjectives": 700, "verbs": 700}  # file: the fewest words it may hold


def words(name: str) -> list[str]:
    return (files("hylo.evaluate.ruler") / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", LISTS)
def test_lines_are_sorted_lower_case_words(name: str) -> None:
    found = words(name)
    assert [word for word in found if not (word.isascii() and word.isalpha() and word.islower())] == []
    assert found == sorted(found)
    assert len(found) >= LISTS[name]


def test_no_word_is_there_twice() -> None:
    counts = Counter(word for name in LISTS for word in words(name))
    assert [word for word, count in counts.items() if count > 1] == []


def test_words_are_of_their_kind() -> None:
    assert {"river", "teacher", "window"} <= set(words("nouns"))
    assert {"happy", "green", "quick"} <= set(words("adjectives"))
    assert {"follow", "sing", "write"} <= set(words("verbs"))


def test_compounds_of_an_adjective_and_a_noun_are_over_a_million() -> None:
    assert len(words("adjectives")) * len(words("nouns")) > 1_000_000
