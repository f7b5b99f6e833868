"""The command line's own entry point, called in the test's process."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest
from rich.console import Console

from hylo import cli
from hylo.commands import shared


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def hylo(*arguments: object) -> Done:
    """Runs `hylo` with these arguments, without the import of torch that a process of its own would cost."""
    out, err = io.StringIO(), io.StringIO()
    before = shared.console
    shared.console = Console(file=out, width=200)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    finally:
        shared.console = before
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())
