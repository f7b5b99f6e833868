"""What several commands share: the terminal, options, and how their values are read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm, Positions

console = Console()  # looked up where it is used, so that a test can put its own here

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["float32", "bf16"]

BaseArgument = Annotated[Path, typer.Argument(help="Llama, Qwen2.5 or Qwen3 checkpoint directory")]
OutArgument = Annotated[Path, typer.Argument(help="directory to write; must not exist")]
LayoutOption = Annotated[str, typer.Option(help="e.g. 4MLA12GDN, 8MLA8M2, 8A8M2")]
PositionsOption = Annotated[str | None, typer.Option(help="indices of the MLA (or attention) layers, e.g. 1,5,10,14")]
GeometryOption = Annotated[list[str] | None, typer.Option("--set", help="a figure of the mixers, e.g. gdn_num_heads=4")]
KNormOption = Annotated[KNorm, typer.Option(help="Qwen3's key norm in MLA: kept, or its mean folded into the weights")]
TurnedOption = Annotated[
    Positions, typer.Option(help="none: attention rotates nothing; hype: linear blocks do instead")
]
GateOption = Annotated[bool, typer.Option("--attention-gate", help="MLA's output through a sigmoid gate")]
AsPublishedOption = Annotated[
    bool, typer.Option("--as-published", help="rows without document boundaries, as the paper packed them")
]
TrackOption = Annotated[str | None, typer.Option(help="trackio or wandb, beside JSONL and TensorBoard")]

TensorParallelOption = Annotated[int, typer.Option(help="devices that the model is cut into", min=1)]
MaxModelLenOption = Annotated[
    str | None, typer.Option(metavar="TOKENS", help="of a request, e.g. 64k or 65536; the model's length if left out")
]
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def launch() -> None:
    """Joins the processes that torchrun or accelerate launch started, if they did; only the first one prints."""
    global console
    from hylo import parallel

    parallel.start()
    if not parallel.is_main():
        console = Console(quiet=True)


def absent(out: Path) -> None:
    """Said before any work, not after it."""
    if out.exists():
        raise HyloError(f"{out} exists already; choose another output directory or remove it")


def shown(bar: Progress, name: str) -> Callable[[int, int], None]:
    """A callback (done, total) that moves a line of its own in the progress display."""
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def indices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise HyloError(f"{text!r} is no list of whole numbers; write e.g. 1,5,10,14") from None


def lengths_of(text: str, option: str) -> list[int]:
    """Tokens: 1k,64k,2m count in 1024s, plain numbers as they are. Sorted, each once."""
    lengths = set()
    for part in text.lower().split(","):
        found = re.fullmatch(r"\s*(\d+)([km]?)\s*", part)
        if not found or not int(found[1]):
            raise HyloError(f"{option} {text}: {part.strip()!r} is no number of tokens; write e.g. 1k,4k,16384")
        lengths.add(int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]])
    return sorted(lengths)


def tokens_of(text: str | None, option: str) -> int | None:
    """One length, as `lengths_of` reads them."""
    if text is None:
        return None
    lengths = lengths_of(text, option)
    if len(lengths) > 1:
        raise HyloError(f"{option} {text}: give one length")
    return lengths[0]


def numbers_of(text: str, option: str) -> list[int]:
    """Whole numbers above 0, sorted, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise HyloError(f"{option} {text}: write whole numbers above 0 such as 1,4")
    return sorted({int(part) for part in parts})


def bytes_of(text: str, option: str) -> int:
    """80GiB, 512MiB, 80GB or a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in UNITS or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise HyloError(f"{option} {text}: write a size such as 80GiB, 512MiB or 80GB")
    return size


def geometry_of(settings: list[str] | None) -> dict[str, int]:
    geometry = {}
    for setting in settings or []:
        name, _, value = setting.partition("=")
        try:
            geometry[name] = int(value)
        except ValueError:
            raise HyloError(f"--set {setting}: write KEY=NUMBER, e.g. kv_lora_rank=64") from None
    return geometry
