"""Where a step's figures go beside metrics.jsonl: TensorBoard where installed, trackio or wandb where asked for."""

import contextlib
import importlib
import importlib.util
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from hylo.distill.settings import Training
from hylo.errors import HyloError

NAMES = ("trackio", "wandb")
PROJECT = "hylo"
IDENTITY = "tracking-id"  # in the stage's working directory: under which name a resumed stage goes on
NO_SCALARS = ("step", "seconds")

_asked: str | None = None  # by --track, for every stage of the command


class Tracker(Protocol):
    def log(self, figures: dict[str, Any]) -> None:
        """One step's figures, as in metrics.jsonl."""

    def close(self) -> None: ...


@contextlib.contextmanager
def tracked(name: str | None) -> Iterator[None]:
    """While it lasts, stages also report to `name`, trackio or wandb. Raises HyloError if that cannot be."""
    global _asked
    if name is not None:
        if name not in NAMES:
            raise HyloError(f"--track {name}: there is no such tracker; choose {' or '.join(NAMES)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise HyloError(f"--track {name}: {error}; pip install {name}") from None
    _asked = name
    try:
        yield
    finally:
        _asked = None


def open_trackers(out: Path, stage: str, training: Training, step: int) -> list[Tracker]:
    """Those that a stage reports to, which works in `out` and has finished `step` steps."""
    trackers: list[Tracker] = []
    if importlib.util.find_spec("tensorboard") is not None:
        trackers.append(TensorBoard(out / "logs", step))
    if _asked is not None:
        trackers.append(Hosted(_asked, out, stage, training))
    return trackers


class TensorBoard:
    """Event files in `logs`; what an earlier call wrote there of steps after `step` is hidden."""

    def __init__(self, logs: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(logs), purge_step=step + 1 if step else None)

    def log(self, figures: dict[str, Any]) -> None:
        for key, value in scalars(figures).items():
            self.events.add_scalar(key, value, figures["step"])

    def close(self) -> None:
        self.events.close()


class Hosted:
    """A run of trackio or wandb, whose functions have the same names; a resumed stage goes on with its run."""

    def __init__(self, name: str, out: Path, stage: str, training: Training) -> None:
        path = out / IDENTITY
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        identity = path.read_text(encoding="utf-8")
        label = f"{out.resolve().parent.name} {stage} {identity}"
        self.module = importlib.import_module(name)
        more = {"id": identity} if name == "wandb" else {}  # trackio knows a run by its name
        self.module.init(project=PROJECT, name=label, config=training.model_dump(mode="json"), resume="allow", **more)

    def log(self, figures: dict[str, Any]) -> None:
        self.module.log(scalars(figures), step=figures["step"])

    def close(self) -> None:
        self.module.finish()


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """One number a name: layer_loss/3, losses/forward_kl."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, list):
            flat |= {f"{key}/{index}": part for index, part in enumerate(value)}
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": part for name, part in value.items()}
        elif key not in NO_SCALARS:
            flat[key] = value
    return flat
