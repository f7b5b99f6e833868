"""Variable tracking (vt): a chain of assignments scattered through noise; which variables hold the value?"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from hylo.evaluate.ruler.niah import NOISE
from hylo.evaluate.ruler.task import Draft, Setting, Task, Text

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {query}, they are: "
)
EXAMPLE_TOKENS = 500  # of the solved example that comes first
SMALLEST = 5


@dataclass(frozen=True)
class VariableTracking(Task):
    """One chain of `hops` assignments after the first, with one solved example before it."""

    hops: int = 4

    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        names = [3 * letter for letter in string.ascii_uppercase]
        place = self.random(setting, "example").getrandbits(64)  # one arrangement for all samples

        def example(names: list[str], value: str, units: int) -> str:
            text = self._text(names, value, units, place)
            return text.body + text.prefix + " " + " ".join(text.outputs) + "\n"

        def tokens(units: int) -> int:
            text = self._text(names[: self.hops + 1], "12345", units, place)
            return setting.tokens(text.body + text.prefix)

        units = SMALLEST
        while tokens(units + 1) <= EXAMPLE_TOKENS:
            units += 1

        def draft(index: int) -> Draft:
            rng = self.random(setting, index)
            solved = example(self._names(rng, 3), _value(rng), units)
            names, value, own_place = self._names(rng, 5), _value(rng), rng.getrandbits(64)

            def build(noises: int) -> Text:
                text = self._text(names, value, noises, own_place)
                return Text(solved + "\n" + text.body, text.prefix, text.outputs)

            return Draft(SMALLEST, build)

        return draft

    def _text(self, names: list[str], value: str, units: int, place: int) -> Text:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
        lines = [NOISE] * units
        for i, at in enumerate(sorted(random.Random(place).sample(range(units), len(chain)))):
            lines.insert(at + i, chain[i])
        prefix = PREFIX.format(count=len(names), query=value)
        return Text(TEMPLATE.format(context="\n".join(lines), query=value), prefix, names)

    def _names(self, rng: random.Random, letters: int) -> list[str]:
        """Different variable names."""
        names: dict[str, None] = {}
        while len(names) <= self.hops:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        return list(names)


def _value(rng: random.Random) -> str:
    return str(rng.randrange(10000, 99999))
