"""The word lists: common English nouns, adjectives and verbs, one a line, in files beside this one."""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

NOUNS, ADJECTIVES, VERBS = "nouns.txt", "adjectives.txt", "verbs.txt"


@cache
def word_list(name: str) -> list[str]:
    """The words of one file, in its order."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8").split()


@cache
def all_words() -> list[str]:
    """Every word of the three lists once, sorted."""
    return sorted({word for name in (NOUNS, ADJECTIVES, VERBS) for word in word_list(name)})


def compounds(rng: random.Random) -> Iterator[str]:
    """Different adjective-noun compounds without end in sight, for lists longer than all the words."""
    seen: set[str] = set()
    while True:
        compound = f"{rng.choice(word_list(ADJECTIVES))}-{rng.choice(word_list(NOUNS))}"
        if compound not in seen:
            seen.add(compound)
            yield compound


@cache
def words_fingerprint() -> str:
    """Of the lists, which samples depend on."""
    return hashlib.sha256(
        "\n".join(word for name in (NOUNS, ADJECTIVES, VERBS) for word in word_list(name)).encode()
    ).hexdigest()[:16]
