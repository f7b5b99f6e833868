"""Needles in a haystack: eight tasks that hide numbers or UUIDs in essays, in noise, or among other needles."""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from hylo.evaluate.ruler.sources import Essays
from hylo.evaluate.ruler.task import Draft, Setting, Task, Text
from hylo.evaluate.ruler.vocabulary import ADJECTIVES, NOUNS, word_list

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
ONE_TEMPLATE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"

DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences that stand before a needle in essays
SMALLEST = {"essays": 50, "noise": 5, "needles": 5}  # words or sentences


@dataclass(frozen=True)
class Niah(Task):
    """`haystack` is "essays", "noise" or "needles"; `key` and `value` are "words", "numbers" or "uuids".

    Hidden are `keys` keys with `values` values each; `queries` of the keys are asked for.
    """

    haystack: str = "essays"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        essays = setting.sources.essay_words() if self.haystack == "essays" else None
        return lambda index: self._draft(self.random(setting, index), essays)

    def _draft(self, rng: random.Random, essays: Essays | None) -> Draft:
        seen: set[str] = set()
        keys = [_fresh(rng, self.key, seen) for _ in range(self.keys)]
        values = [[_fresh(rng, self.value, seen) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(key, value) for key, held in zip(keys, values, strict=True) for value in held]
        rng.shuffle(needles)
        asked = rng.sample(range(self.keys), self.queries)
        query = _listed([keys[i] for i in asked])
        outputs = list(chain.from_iterable(values[i] for i in asked))
        place = rng.getrandbits(64)
        more: list[str] = []  # sentences of the haystack, drawn when they are first needed

        def context(units: int) -> str:
            if essays is not None:
                return in_essays(essays, units, needles, random.Random(place))
            while self.haystack == "needles" and len(more) < units:
                more.append(self._needle(_fresh(rng, self.key, seen), _fresh(rng, self.value, seen)))
            hay = more[:units] if self.haystack == "needles" else [NOISE] * units
            for at, needle in zip(_places(random.Random(place), units, len(needles)), needles, strict=True):
                hay.insert(at, needle)
            return "\n".join(hay)

        one = len(outputs) == 1
        kind = self.value.removesuffix("s") if one else self.value
        prefix = (ONE_PREFIX if one else PREFIX).format(kind=kind, query=query)

        def build(units: int) -> Text:
            body = (ONE_TEMPLATE if one else TEMPLATE).format(kind=kind, query=query, context=context(units))
            return Text(body, prefix, outputs)

        return Draft(SMALLEST[self.haystack], build)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def in_essays(essays: Essays, words: int, needles: Sequence[str], rng: random.Random) -> str:
    """The first `words` words of the essays, over and over if need be, with needles between sentences.

    Each needle stands at another of forty depths, spread evenly over the sentences.
    """
    text = essays.first(words)
    ends = essays.sentence_ends(words)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    cuts = [0, *(ends[len(ends) * depth // 100 - 1] if len(ends) * depth // 100 else 0 for depth in depths), words]
    parts: list[str] = []
    for i, needle in enumerate([*needles, ""]):
        parts += [" ".join(text[cuts[i] : cuts[i + 1]]), needle]
    return " ".join(part for part in parts if part)


def _places(rng: random.Random, units: int, needles: int) -> list[int]:
    """Different places to insert at, the last first, so that no insertion moves another's place."""
    return sorted(rng.sample(range(units), needles), reverse=True)


def _fresh(rng: random.Random, kind: str, seen: set[str]) -> str:
    """A word, number or UUID that the sample does not hold yet."""
    while (drawn := _draw(rng, kind)) in seen:
        pass
    seen.add(drawn)
    return drawn


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(word_list(ADJECTIVES))}-{rng.choice(word_list(NOUNS))}"


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]
