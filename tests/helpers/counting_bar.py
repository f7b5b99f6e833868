"""A progress bar that counts what it is told."""

import io

from rich.console import Console

from hylo.evaluate.progress import Bar


class CountingBar(Bar):
    """Tokens that were announced and tokens that were read."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.announced = self.read = 0

    def begin(self, name: str, total: int) -> None:
        self.announced += total

    def advance(self, tokens: int) -> None:
        self.read += tokens
