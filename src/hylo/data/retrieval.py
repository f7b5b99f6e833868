"""Synthetic retrieval: facts planted in running text, and asked for again.

A fact is one line that pairs a key with a value, `# remember amber lagoon`. Two kinds of row mix facts with text:

- training rows (`fact_row`): a few facts, each restated several times at random places. Whatever follows a restated
  key can be predicted from the context alone, so the density of facts sets how much retrieval a row teaches.
- evaluation rows (`needle_row`): every fact stands once, at a known depth, and all keys are asked at the very end.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

KEYS = (
    "amber anchor apple arrow autumn badger bamboo banner barrel basket beacon berry bishop blanket bottle bridge "
    "bronze bucket butter button cabin cactus camel candle canyon carpet castle cedar cherry chimney circus clover "
    "cobalt coffee copper coral cotton coyote crater cricket crystal curtain daisy desert diamond dolphin dragon eagle "
    "ember engine falcon feather fiddle forest fossil fountain galaxy garden garlic ginger glacier granite guitar "
    "hammer"
).split()
VALUES = (
    "harbor hazel helmet heron honey hunter island ivory jacket jaguar jasmine jungle kettle kitten ladder lagoon "
    "lantern lemon leopard lily lobster magnet mango maple marble meadow melon mirror monkey mountain mustard napkin "
    "needle nickel oasis ocean olive onion orange orchid otter oyster paddle palace panther parrot peach pebble "
    "pepper piano pigeon pillow pirate planet plum pocket potato pumpkin puzzle rabbit raven ribbon river rocket"
).split()


class Stream(Protocol):
    """A run of tokens that windows can be taken of: an array (tokens,), or what stands for one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class FactFormat:
    """The token ids of the parts of a fact; each word is encoded alone, so a fact is the same wherever it stands."""

    prefix: list[int]
    keys: list[list[int]]
    values: list[list[int]]
    suffix: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "FactFormat":
        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        return cls(
            encode("\n# remember"), [encode(" " + w) for w in KEYS], [encode(" " + w) for w in VALUES], encode("\n")
        )

    def ask(self, key: int) -> list[int]:
        return self.prefix + self.keys[key]

    def state(self, key: int, value: int) -> list[int]:
        return self.ask(key) + self.values[value] + self.suffix

    @property
    def longest(self) -> int:
        """Tokens of the longest possible fact."""
        return len(self.prefix) + max(map(len, self.keys)) + max(map(len, self.values)) + len(self.suffix)


@dataclass(frozen=True)
class FactRow:
    """`ids` (T,); `first` (T,) marks tokens that nothing predicts (keys and values stated for the first time);
    `answer` (T,) marks the values of restated facts, which the context determines."""

    ids: np.ndarray
    first: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class NeedleRow:
    """`ids` (T,); per question the `spans` of its answer in `ids` and the `depths` (0 start .. 1 end) of its needle."""

    ids: np.ndarray
    spans: list[tuple[int, int]]
    depths: list[float]


def window(rng: np.random.Generator, stream: Stream, length: int) -> np.ndarray:
    """A random run of `length` tokens of a token stream."""
    start = int(rng.integers(0, len(stream) - length + 1))
    return stream[start : start + length]


def fact_row(rng: np.random.Generator, stream: Stream, length: int, facts: FactFormat, n: int, repeats: int) -> FactRow:
    """A training row of `length` tokens: text with `n` facts, each stated `repeats` times at random places."""
    n = min(n, length // (2 * repeats * facts.longest), len(facts.keys))  # at least half of the row stays text
    keys, values = rng.permutation(len(facts.keys))[:n], rng.integers(0, len(facts.values), n)
    order = rng.permutation(np.repeat(np.arange(n), repeats))
    pieces = [facts.state(keys[i], values[i]) for i in order]
    text = window(rng, stream, length - sum(map(len, pieces)))
    cuts = np.sort(rng.integers(0, len(text) + 1, len(pieces)))
    ids = np.empty(length, np.int64)
    first, answer = np.zeros(length, bool), np.zeros(length, bool)
    at = previous = 0
    seen: set[int] = set()
    for i, cut, piece in zip(order, cuts, pieces, strict=True):
        ids[at : at + cut - previous] = text[previous:cut]
        at += int(cut) - previous
        previous = int(cut)
        ids[at : at + len(piece)] = piece
        key_end = at + len(facts.ask(keys[i]))
        value_end = key_end + len(facts.values[values[i]])
        first[at + len(facts.prefix) : key_end] = True  # a key is drawn at random, so it never teaches anything
        (answer if i in seen else first)[key_end:value_end] = True
        seen.add(i)
        at += len(piece)
    ids[at:] = text[previous:]
    return FactRow(ids, first, answer)


def needle_row(
    rng: np.random.Generator, stream: Stream, length: int, facts: FactFormat, n: int, first_bin: int = 0
) -> NeedleRow:
    """An evaluation row: `n` needles, one in each n-th of the haystack, then all `n` questions in random order.

    `first_bin` rotates which key takes which depth; the place within a depth bin is random.
    """
    keys, values = rng.permutation(len(facts.keys))[:n], rng.integers(0, len(facts.values), n)
    needles = [facts.state(k, v) for k, v in zip(keys, values, strict=True)]
    order = rng.permutation(n)
    tail = sum(len(facts.ask(keys[i])) + len(facts.values[values[i]]) for i in order)
    text = window(rng, stream, length - tail - sum(map(len, needles)))
    bins = [(i + first_bin) % n for i in range(n)]
    cuts = {i: int((b + rng.random()) * len(text) / n) for i, b in enumerate(bins)}
    ids: list[int] = []
    depths = [0.0] * n
    previous = 0
    for i in sorted(cuts, key=lambda i: cuts[i]):
        ids.extend(text[previous : cuts[i]])
        previous = cuts[i]
        depths[i] = len(ids) / (length - tail)
        ids.extend(needles[i])
    ids.extend(text[previous:])
    spans = []
    for i in order:
        ids.extend(facts.ask(keys[i]))
        spans.append((len(ids), len(ids) + len(facts.values[values[i]])))
        ids.extend(facts.values[values[i]])
    return NeedleRow(np.array(ids, np.int64), spans, [depths[i] for i in order])
