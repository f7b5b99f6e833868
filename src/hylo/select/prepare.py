"""The two students that a selection puts layers together of: those given, or made from the base."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hylo.convert import Initialisation, convert
from hylo.data.training import TrainingData
from hylo.distill.align import align
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling.loading import read_hylo_config
from hylo.plan import Plan, make_plan
from hylo.select.records import Records
from hylo.select.settings import SelectionSettings
from hylo.select.students import check_students

CALIBRATION_LENGTH = 512
ALIGN_LENGTH, ALIGN_ROWS = 512, 16


@dataclass(frozen=True)
class Preparation:
    """Students are written to `folder`, each whole or not at all, and taken from there by a second call."""

    base: Path
    folder: Path
    plan: Plan
    settings: SelectionSettings
    data: TrainingData
    records: Records
    console: Console

    def students(self) -> tuple[Path, Path]:
        """The all-attention and the all-linear directory."""
        given, layers = self.settings, len(self.plan.mixers)
        if given.all_attention is not None and given.all_linear is not None:
            return given.all_attention, given.all_linear
        attention = self._student(f"{layers}{given.attention}", "all-attention")
        return attention, self._student(f"{layers}{given.linear}", "all-linear")

    @property
    def seconds(self) -> float:
        """What making them took; nothing for students that were given."""
        found = (self.records.get(f"students/{name}") for name in ("all-attention", "all-linear"))
        return sum(record["seconds"] for record in found if record is not None)

    def _student(self, layout: str, name: str) -> Path:
        converted, aligned = self.folder / name, self.folder / f"{name}-aligned"
        trains = (
            self.settings.align_tokens > 0 and layout != f"{len(self.plan.mixers)}A"
        )  # the base's own layers need none
        began = time.perf_counter()
        if not converted.exists():
            self.console.print(f"converting the {name} student, {layout}", highlight=False)
            tokens, context = self.settings.calibration_tokens, self.plan.base_config.max_position_embeddings
            ids = self.data.calibration(tokens, min(CALIBRATION_LENGTH, tokens, context))
            plan = make_plan(self.base, layout, None, self.plan.geometry, self.plan.dtype, k_norm=self.plan.k_norm)
            convert(self.base, converted, plan, Initialisation(calibration_BT=ids), self.settings.seed)
        if trains and not aligned.exists():
            self.console.print(f"aligning the {name} student", highlight=False)
            align(
                self.base,
                converted,
                aligned,
                self.data.rows("align", self.settings.seed),
                self._training(),
                self.console,
            )
        if self.records.get(f"students/{name}") is None:
            self.records.add(f"students/{name}", {"seconds": time.perf_counter() - began})
        return aligned if trains else converted

    def _training(self) -> Training:
        return Training.model_validate(
            {
                "objective": "layers",
                "tokens": self.settings.align_tokens,
                "length": min(ALIGN_LENGTH, self.plan.base_config.max_position_embeddings),
                "rows": ALIGN_ROWS,
                "learning_rate": self.settings.learning_rate,
                "warmup": 0.1,
                "precision": "bf16",
                "seed": self.settings.seed,
            }
        )


def check_given(base: Path, plan: Plan, settings: SelectionSettings) -> None:
    """Raises HyloError where students are given that are not of this base or have not this layout's kinds of layer."""
    if settings.all_attention is None or settings.all_linear is None:
        return
    config = check_students(settings.all_attention, settings.all_linear)
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if (ours := getattr(config, key)) != (theirs := getattr(plan.base_config, key)):
            raise HyloError(
                f"{settings.all_attention} was not converted from {base}: its {key} is {ours}, not {theirs}; give "
                "students of this base"
            )
    linear = read_hylo_config(settings.all_linear)
    for directory, mixers in ((settings.all_attention, config.mixers), (settings.all_linear, linear.mixers)):
        if unlike := sorted(set(mixers) - set(plan.mixers)):
            raise HyloError(
                f"{directory} has {unlike[0]} layers, which layout {plan.layout} has not; name its kind with "
                "--attention and --linear"
            )
