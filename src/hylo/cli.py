"""The command line. Bad input ends with one line on standard error and exit status 2."""

import contextlib
import shlex
import sys

import typer
from transformers.utils import logging as transformers_logging

from hylo.commands import (
    benching,
    data,
    evaluation,
    laboratory,
    making,
    planning,
    runs,
    selecting,
    serving,
    shared,
    training,
)
from hylo.distill import signals
from hylo.errors import HyloError

app = typer.Typer(
    help="Turns a pretrained Transformer into a long-context hybrid.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(planning.plan)
app.command()(making.convert)
app.command("import")(making.import_)
app.command()(making.export)
app.command()(making.assemble)
app.command()(training.align)
app.command()(training.extend)
app.command("teacher-cache")(training.teacher_cache)
app.add_typer(data.app, name="data")
app.command()(selecting.select)
app.command()(runs.upcycle)
app.command()(laboratory.lab)
app.command()(runs.status)
app.command()(evaluation.evaluate)
app.command()(evaluation.report)
app.command()(serving.serve)
app.add_typer(benching.app, name="bench")
app.command()(runs.demo)
app.command()(runs.env)

GO_ON = (
    "align",
    "extend",
    "teacher-cache",
    "select",
    "upcycle",
    "evaluate",
    "lab",
    "demo",
)  # the commands that a second call goes on with


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns HyloError and wrong usage into one line and exit status 2; always ends with SystemExit.

    SIGTERM and SIGINT stop a command that can go on later in good order: training saves first, and the status is 0.
    """
    given = sys.argv[1:] if arguments is None else arguments
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with signals.watched() if given[:1] and given[0] in GO_ON else contextlib.nullcontext():
            status = app(given, standalone_mode=False)
    except signals.Stopped as stopped:
        command = f"hylo {shlex.join(given)}"
        shared.console.print(f"{stopped}; go on with: {command}", highlight=False, soft_wrap=True)
        status = 0
    except HyloError as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except RuntimeError as error:
        from hylo.ops.kernels import KernelsError

        if not isinstance(error, KernelsError):
            raise
        _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors
            raise
        _fail(f"{error.format_message()} See hylo --help.")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print(f"hylo: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
