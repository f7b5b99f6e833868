"""Runs a recipe: every stage reads model directories and writes one under RUN; what is there already is skipped.

RUN/recipe.yaml  plan.json  converted/  aligned/  extended-512/ ... extended-2048/  evaluations/*.json  report.html
RUN/control/ and RUN/no_alignment/ hold the controls' directories, RUN/data/ the tokenised text, RUN/caches/ what
teachers have said; a stage at work keeps its checkpoints in RUN/NAME.training/.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hylo import parallel
from hylo.checkpoint import model_hash, read_tokenizer
from hylo.convert import Initialisation, convert, print_fits, read_base, with_energy
from hylo.data.training import Part, TrainingData
from hylo.distill.settings import Stage
from hylo.distill.stretch import stretch
from hylo.distill.student import check_pair
from hylo.errors import HyloError
from hylo.evaluate.evaluate import Workload, evaluate_models, print_results
from hylo.files import complete_directory, link_files, read_json, waited_for, write_json
from hylo.modeling.loading import read_configuration
from hylo.plan import Plan
from hylo.recipe import Recipe
from hylo.report import write_report
from hylo.run_directory import check_recipe, claimed
from hylo.run_report import NAMES, build_report
from hylo.stages import Materials, check_data, run_stage


def upcycle(recipe: Recipe, run: Path, console: Console) -> dict[str, Any]:
    """Plans, converts, trains, evaluates and reports; returns the report, in all processes but the first an empty one.

    Raises HyloError on bad input, whatever can be known of it before any training.
    """

    def reported(done: "Trained") -> dict[str, Any]:
        results = evaluated(done.recipe, done.models, done.work, run, console)
        print_results(results, console)
        report = build_report(done.recipe, done.plan, run, results)
        write_report(run, report)
        console.print(f"report: {run / 'report.html'}")
        return report

    return train(recipe, run, console, reported)


@dataclass(frozen=True)
class Trained:
    """A run whose models are there, by the names of the report: to be evaluated on `work`."""

    recipe: Recipe
    plan: Plan
    models: dict[str, Path]
    work: Workload


@dataclass(frozen=True)
class Shared:
    """What runs side by side have in common: tokenised text, and the stages that several of them would train alike."""

    data: Path
    stages: Path


def train(
    recipe: Recipe,
    run: Path,
    console: Console,
    then: Callable[[Trained], dict[str, Any]],
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Plans, converts and trains; returns what `then` makes of it, while RUN still belongs to this process.

    All processes but the first return nothing, as an empty dictionary. Raises HyloError as `upcycle` does.
    """
    check_recipe(run, recipe)
    models = recipe.with_models()
    plan, energy = models.plan(), recipe.energy
    tokens = run / "data" if shared is None else shared.data
    data = TrainingData(recipe.data, read_tokenizer(models.base), tokens, console)
    materials = Materials(models.base, models.extension_teacher, data, recipe.yarn_original_length, console)
    if not parallel.is_main():
        parallel.barrier()  # until the first process has checked everything and tokenised the data
        Arms(models, plan, Initialisation(), materials, run).train()
        return {}
    check_teachers(models)
    read_base(models.base)
    with claimed(run, recipe):
        initialisation = _initialisation(recipe, data)
        initialisation.check(plan)
        if energy is not None:
            plan, _ = with_energy(plan, initialisation, energy)
        plan.print(console)
        arms = Arms(models, plan, initialisation, materials, run, shared)
        arms.check_data()
        work = workload(recipe, data)
        console.print(f"evaluation will read {work.tokens_read:,} tokens a model")
        write_json(run / "plan.json", plan.to_json())
        parallel.barrier()
        return then(Trained(models, plan, arms.train(), work))


def check_teachers(recipe: Recipe) -> None:
    """Raises HyloError for a teacher that does not go with the base; reads no weight."""
    for stage in recipe.stages:
        if stage.teacher_source != "none":
            teacher = recipe.base if stage.kind == "layers" else recipe.extension_teacher
            read_configuration(teacher)
            check_pair(recipe.base, teacher, stage.length)


def _initialisation(recipe: Recipe, data: TrainingData) -> Initialisation:
    calibration = None
    if recipe.calibration_tokens:
        part = recipe.parts()[0]  # what the first stage reads too
        calibration = data.calibration(recipe.calibration_tokens, recipe.calibration_length, part)
    return Initialisation(
        recipe.init, recipe.linear_init, recipe.rope_key, calibration, recipe.linear_fraction, recipe.linear_steps
    )


def workload(recipe: Recipe, data: TrainingData) -> Workload:
    """What every stage is evaluated on; lengths that the text cannot fill are named now, not after the training."""
    settings = recipe.evaluate
    return Workload(
        settings.lengths,
        data.held_out,
        data.facts,
        settings.answers,
        settings.tokens,
        answers_per_bin=settings.answers_per_bin,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class Arms:
    """The run itself and, with `controls`, the two beside it: what is trained, on which part of the data."""

    recipe: Recipe
    plan: Plan
    initialisation: Initialisation
    materials: Materials
    run: Path
    shared: Shared | None = None

    def check_data(self) -> None:
        """Raises HyloError where a stage is longer than its part of the data."""
        for i, (stage, part) in enumerate(zip(self.recipe.stages, self.recipe.parts(), strict=True)):
            try:
                check_data(stage, self.materials.data, stage.directory, part)
            except HyloError as error:
                share = f"stages.{i} ({stage.directory}, {part[0]:.1%} to {part[1]:.1%} of the data)"
                raise HyloError(f"{share}: {error}") from None

    def train(self) -> dict[str, Path]:
        """Writes the model directories that are missing; returns those to evaluate, by the names of the report."""
        recipe, stages = self.recipe, list(zip(self.recipe.stages, self.recipe.parts(), strict=True))
        models = {"teacher": recipe.extension_teacher}
        if recipe.extension_teacher != recipe.base:
            models["base"] = recipe.base
        models["converted"] = start = self._converted(self.run, self.initialisation)
        for stage, directory in zip(recipe.stages, self._trained(start, self.run, stages), strict=True):
            models[NAMES.get(stage.kind, stage.directory)] = last = directory
        if (length := recipe.stretch) is not None:
            out, original = self.run / "stretched", recipe.yarn_original_length
            models["stretched"] = self._once("stretch", out, lambda out: stretch(last, out, length, original))
        others = [(stage, part) for stage, part in stages if stage.kind != "layers"]
        if recipe.controls and others:
            random = self._converted(self.run / "control", replace(self.initialisation, init="random"))
            models["control"] = self._trained(random, self.run / "control", others)[-1]
            # Alignment's tokens are spent on extension, and read from alignment's part of the data.
            (first, part), *rest = others
            spent = [(stage, part) for stage, part in stages if stage.kind == "layers"]
            longer = first.model_copy(update={"tokens": first.tokens + sum(stage.tokens for stage, _ in spent)})
            begin = min((part[0] for _, part in spent), default=part[0])
            models["no_alignment"] = self._trained(
                start, self.run / "no_alignment", [(longer, (begin, part[1])), *rest]
            )[-1]
        return models

    def _converted(self, folder: Path, how: Initialisation) -> Path:
        recipe, out = self.recipe, folder / "converted"

        def make(out: Path) -> None:
            if parallel.is_main():
                fits = convert(recipe.base, out, self.plan, how, seed=recipe.seed, dtype=recipe.dtype)
                print_fits(fits, self.materials.console)
            parallel.barrier()

        return self._once("convert", out, make, self._conversion(how))

    def _trained(self, student: Path, folder: Path, stages: Sequence[tuple[Stage, Part]]) -> list[Path]:
        """The directory of each stage, one after the other from `student`."""
        arm, made = "" if folder == self.run else f" ({folder.name})", []
        for stage, part in stages:
            cache = folder / "caches" / stage.directory
            make = partial(self._run_stage, stage, student, part, cache)
            origin = self._origin(stage, student, part)
            student = self._once(f"{stage.directory}{arm}", folder / stage.directory, make, origin)
            made.append(student)
        return made

    def _run_stage(self, stage: Stage, student: Path, part: Part, cache: Path, out: Path) -> None:
        run_stage(stage, student, out, self.materials, stage.directory, part, cache)

    def _once(
        self, name: str, directory: Path, make: Callable[[Path], None], origin: dict[str, Any] | None = None
    ) -> Path:
        """`directory`, made by `make(directory)` unless it is there.

        Runs that share stages make what has the same `origin`, all that decides its weights, once for all of them.
        """
        console = self.materials.console
        if parallel.from_main(directory.exists()):
            console.print(f"{name}: {directory} is there, skipped")
        else:
            console.print(f"{name}: {directory}")
            began = time.monotonic()
            if self.shared is None or origin is None:
                make(directory)
            else:
                key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
                common = self.shared.stages / f"{directory.name}-{key}"
                with waited_for(self.shared.stages / f".{common.name}.lock"):
                    if not common.exists():
                        make(common)
                    with complete_directory(directory) as partial:
                        link_files(common, partial)
            console.print(f"{name}: done in {time.monotonic() - began:.0f} s")
        return directory

    def _conversion(self, how: Initialisation) -> dict[str, Any] | None:
        """All that decides a conversion's weights."""
        if self.shared is None:
            return None
        recipe = self.recipe
        rest = {"stages", "stretch", "evaluate", "controls", "teacher", "yarn_original_length"}
        settings = recipe.model_dump(mode="json", exclude=rest) | {"init": how.init, "base": model_hash(recipe.base)}
        return settings | {"part": recipe.parts()[0] if recipe.calibration_tokens else None}

    def _origin(self, stage: Stage, student: Path, part: Part) -> dict[str, Any] | None:
        """All that decides a stage's weights."""
        if self.shared is None:
            return None
        settings: dict[str, Any] = {"student": model_hash(student), "stage": stage.model_dump(mode="json")}
        settings |= {"part": part, "data": self.recipe.data.model_dump(mode="json")}
        if stage.teacher_source != "none":
            theirs = self.recipe.base if stage.kind == "layers" else self.recipe.extension_teacher
            settings["teacher"] = model_hash(theirs)
        if stage.kind == "distill":
            settings["yarn_original_length"] = self.recipe.yarn_original_length
        return settings


def evaluated(
    recipe: Recipe, models: dict[str, Path], work: Workload, run: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Evaluates the models that have no result yet; each model's result is a file of its own."""
    files = {name: run / "evaluations" / f"{name}.json" for name in models}
    missing = {name: models[name] for name, file in files.items() if not file.exists()}
    if missing:
        console.print(f"evaluate: {', '.join(missing)}")
        precision = recipe.evaluate.precision
        for name, result in evaluate_models(missing, recipe.extension_teacher, work, precision):
            write_json(files[name], result)
    return {name: read_json(file, "evaluation") for name, file in files.items()}
