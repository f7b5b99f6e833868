"""The command line. Bad input ends with one line on standard error and exit status 2."""

import sys

import typer
from transformers.utils import logging as transformers_logging

from hylo.commands import benching, evaluation, making, planning, runs, serving, training
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
app.command()(training.align)
app.command()(training.extend)
app.command("teacher-cache")(training.teacher_cache)
app.command()(runs.upcycle)
app.command()(evaluation.evaluate)
app.command()(serving.serve)
app.add_typer(benching.app, name="bench")
app.command()(runs.demo)
app.command()(runs.env)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns HyloError and wrong usage into one line and exit status 2; always ends with SystemExit."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        status = app(arguments, standalone_mode=False)
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
