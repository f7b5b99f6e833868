"""What a RULER task is: a family of prompts that can be made longer one unit of haystack at a time."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hylo.evaluate.ruler.sources import Sources


@dataclass(frozen=True)
class Text:
    """`body` is the question with its context, `prefix` begins the answer; `outputs` is what the answer must name."""

    body: str
    prefix: str
    outputs: list[str]


@dataclass(frozen=True)
class Draft:
    """One sample with everything drawn but its size: `build(units)` writes it with that many units, `smallest` or more.

    The text of more units begins with the same draws, so that its tokens grow with the units.
    """

    smallest: int
    build: Callable[[int], Text]


@dataclass(frozen=True)
class Setting:
    """What all samples of a task at one length share. `tokens` counts the tokens of a text, special ones left out."""

    length: int
    seed: int
    sources: Sources
    tokens: Callable[[str], int]


@dataclass(frozen=True)
class Task(ABC):
    """`source` is "essays", "squad", "hotpotqa" or None; `part`: one right output is the full score.

    Tokens to generate, templates and scoring are the benchmark's: RULER, Hsieh et al. 2024, arXiv 2404.06654.
    """

    name: str
    tokens_to_generate: int
    source: str | None = None
    part: bool = False

    @abstractmethod
    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        """A function from the number of a sample to its draft."""

    def random(self, setting: Setting, index: int | str) -> random.Random:
        """The source of all that is random in a sample: it depends on nothing but seed, task, length and number."""
        return random.Random(f"{setting.seed}/{self.name}/{setting.length}/{index}")


def shuffled(items: Iterable[str], seed: int) -> list[str]:
    """A copy in an order that `seed` fixes."""
    copy = list(items)
    random.Random(seed).shuffle(copy)
    return copy
