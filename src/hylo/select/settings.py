"""What a selection can be told, what contradicts, and what fixes its scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hylo.checkpoint import model_hash, read_base_config
from hylo.data.settings import Data
from hylo.data.training import TrainingData
from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm
from hylo.select.budget import Budget
from hylo.select.context import Order

Method = Literal["uniform", "window", "kl", "gates"]
LENGTH = 2048  # tokens of a probe's row, where the base has as many


@dataclass(frozen=True)
class SelectionSettings:
    """`attention` is MLA or A and `linear` GDN, M2 or KDA. The probe is `tokens` tokens in rows of `length` tokens
    (None: 2048, or the base's context where that is shorter), `answers` are asked of the two layouts compared.

    `all_attention` and `all_linear` are students as `assemble` takes them; without, they are converted, calibrated on
    `calibration_tokens` of the data, and aligned for `align_tokens`. `window` (tokens; None: an eighth of the row) is
    for that method, `order` for kl.
    """

    budget: Budget
    method: Method = "kl"
    order: Order = "greedy"
    window: int | None = None
    attention: str = "MLA"
    linear: str = "GDN"
    geometry: Mapping[str, int] = field(default_factory=dict)
    k_norm: KNorm = "exact"
    data: Data | None = None
    tokens: int = 65536
    length: int | None = None
    answers: int = 256
    calibration_tokens: int = 8192
    align_tokens: int = 0
    learning_rate: float = 2e-4
    all_attention: Path | None = None
    all_linear: Path | None = None
    seed: int = 0
    precision: Literal["float32", "bf16"] = "float32"


def check_settings(base: Path, settings: SelectionSettings) -> None:
    """Raises HyloError, in one line, for settings that contradict each other or the base. Reads no weight."""
    given = settings.all_attention, settings.all_linear
    if settings.method != "uniform" and settings.data is None:
        raise HyloError(f"method {settings.method} scores layers on text; give --data")
    if (given[0] is None) != (given[1] is None):
        raise HyloError("students come in pairs: give both --all-mla and --all-linear, or neither")
    if given[0] and settings.align_tokens:
        raise HyloError("--align-tokens aligns students made here; leave it out beside --all-mla and --all-linear")
    context = read_base_config(base).max_position_embeddings
    if settings.length and settings.length > context:
        raise HyloError(f"--length {settings.length} exceeds the base's context, {context}; ask for shorter rows")
    if settings.window and settings.window >= (settings.length or min(LENGTH, context)):
        raise HyloError(f"--window {settings.window} hides nothing of the rows; give less than --length")


def identity(base: Path, settings: SelectionSettings, data: TrainingData) -> dict[str, Any]:
    """What fixes every score, as JSON values."""
    others = ("budget", "data", "all_attention", "all_linear", "geometry")
    given = (settings.all_attention, settings.all_linear)
    return {key: value for key, value in vars(settings).items() if key not in others} | {
        "budget": settings.budget.text,
        "base": model_hash(base),
        "students": None if given[0] is None else [model_hash(student) for student in given if student is not None],
        "geometry": dict(settings.geometry),
        "data": data.rows("select", settings.seed).identity,
    }
