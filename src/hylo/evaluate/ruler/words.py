"""Aggregation: common words of a numbered list (cwe) and the frequent words of a coded text (fwe)."""

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice, repeat

from hylo.evaluate.ruler.task import Draft, Setting, Task, Text, shuffled
from hylo.evaluate.ruler.vocabulary import all_words, compounds

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

COMMON = 10  # words that are asked for
SHORT = 4096  # tokens below which a list is of the short form
LETTERS = 6  # of a coded word
CLEAR = 53  # the first size from which the fourth word stands more often than the fifth, whatever the size


@dataclass(frozen=True)
class CommonWords(Task):
    """Ten words stand `common` times in the list, all others `uncommon` times; below 4,096 tokens 6 times and once."""

    common: int = 30
    uncommon: int = 3

    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        short = setting.length < SHORT
        times = (6, 1) if short else (self.common, self.uncommon)
        example_words, example_times = (20, (3, 1)) if short else (40, (10, 3))

        def draft(index: int) -> Draft:
            rng = self.random(setting, index)
            solved = _numbered(rng.sample(all_words(), example_words), example_times, rng.getrandbits(64))
            answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(solved.outputs))
            example = solved.body + solved.prefix + " " + answer + "\n"
            words, order = shuffled(all_words(), rng.getrandbits(64)), rng.getrandbits(64)
            wider = rng.getrandbits(64)

            def build(units: int) -> Text:
                many = units > len(words)
                list_ = list(islice(compounds(random.Random(wider)), units)) if many else words[:units]
                text = _numbered(list_, times, order)
                return Text(example + text.body, text.prefix, text.outputs)

            return Draft(2 * COMMON, build)

        return draft


def _numbered(words: list[str], times: tuple[int, int], order: int) -> Text:
    entries = shuffled(words[:COMMON] * times[0] + words[COMMON:] * times[1], order)
    context = " ".join(f"{i + 1}. {word}" for i, word in enumerate(entries))
    return Text(COMMON_TEMPLATE.format(context=context), COMMON_PREFIX, words[:COMMON])


@dataclass(frozen=True)
class FrequentWords(Task):
    """Words by Zipf's law: the k-th stands units * k^-alpha / zeta(alpha) times; the first is "...", to be ignored."""

    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        size = max(5, (setting.length - self.tokens_to_generate) // 50)

        def draft(index: int) -> Draft:
            rng = self.random(setting, index)
            coded: dict[str, None] = {"...": None}
            while len(coded) < size:
                coded["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
            words, order = list(coded), rng.getrandbits(64)

            def build(units: int) -> Text:
                counts = (int(units / k**2 / (math.pi**2 / 6)) for k in range(1, size + 1))  # alpha 2: zeta is pi^2/6
                text = shuffled(chain.from_iterable(map(repeat, words, counts)), order)
                return Text(FREQUENT_TEMPLATE.format(context=" ".join(text)), FREQUENT_PREFIX, words[1:4])

            return Draft(CLEAR, build)

        return draft
