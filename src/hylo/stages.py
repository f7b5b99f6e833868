"""One training stage, whatever its objective: a model directory in, a model directory out."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hylo.data.training import Part, TrainingData
from hylo.distill.settings import Training
from hylo.errors import HyloError


@dataclass(frozen=True)
class Materials:
    """What stages draw on: the base (the teacher of layers), the teacher of all others, the data, and the console.

    `yarn_original` is the context in tokens above which YaRN stretches positions; None: the base's.
    """

    base: Path | None
    teacher: Path | None
    data: TrainingData
    yarn_original: int | None
    console: Console


def run_stage(
    stage: Training,
    student: Path,
    out: Path,
    materials: Materials,
    name: str,
    part: Part = (0.0, 1.0),
    cache: Path | None = None,
) -> None:
    """Trains the model in `student` as `stage` says and writes `out`; a call that was cut off is gone on with.

    `name` and stage.seed decide which rows of its `part` of the data are read; `cache` is where a teacher's cache is,
    or will be. Raises HyloError on bad input, `hylo.distill.signals.Stopped` after a signal.
    """
    data, console = materials.data, materials.console
    rows = data.rows(name, stage.seed, part)
    if stage.kind == "layers":
        from hylo.distill.align import align

        assert materials.base is not None
        align(materials.base, student, out, rows, stage, console)
    elif stage.kind == "distill":
        from hylo.distill.extend import extend

        extend(student, materials.teacher, out, rows, stage, materials.yarn_original, console, cache)
    elif stage.kind == "on_policy":
        with needs_trl():
            from hylo.distill.on_policy import distil_on_policy
        if materials.teacher is None:
            raise HyloError("objective on_policy needs a teacher; give one")
        prompts = prompts_of(stage, data, name, part)
        distil_on_policy(student, materials.teacher, out, prompts, stage, console)
    else:
        with needs_trl():
            from hylo.distill.preference import optimise_preferences
        optimise_preferences(student, out, data.preferences(name, stage.seed), stage, console)


def prompts_of(stage: Training, data: TrainingData, name: str, part: Part) -> list[dict[str, str]]:
    """As many prompts as an on_policy stage needs, or as there are."""
    return data.prompts(name, stage.seed, part, max(1, stage.length - stage.new_tokens), stage.steps * stage.rows)


@contextlib.contextmanager
def needs_trl() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise HyloError('objectives on_policy and dpo need TRL; install it: pip install "hylo[dpo]"') from None


def check_data(stage: Training, data: TrainingData, name: str, part: Part = (0.0, 1.0)) -> None:
    """Raises HyloError for sources that cannot be read, and where they have less than the stage will read."""
    if stage.kind == "dpo":
        with needs_trl():
            from hylo.distill.preference import choose_pairs
        choose_pairs(data.preferences(name, stage.seed), stage, data.tokenizer)
    elif stage.kind == "on_policy":
        with needs_trl():
            from hylo.distill.on_policy import choose_prompts
        choose_prompts(prompts_of(stage, data, name, part), stage, data.tokenizer)
    else:
        data.rows(name, stage.seed, part)(stage.length, stage.steps * stage.rows)
