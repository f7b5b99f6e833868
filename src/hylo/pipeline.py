"""Runs a recipe: every stage reads model directories and writes one under RUN; what is there already is skipped.

RUN/recipe.yaml  plan.json  converted/  aligned/  extended-512/ ... extended-2048/  evaluations/*.json  report.html
RUN/control/ and RUN/no_alignment/ hold the controls' directories
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hylo.convert import Initialisation, convert, print_fits, read_base, with_energy
from hylo.convert.calibration import calibration_rows
from hylo.data.retrieval import FactFormat
from hylo.data.rows import RowDataset
from hylo.data.sources import held_out_stream, training_stream, whole_stream
from hylo.distill.align import align
from hylo.distill.extend import extend
from hylo.distill.settings import Training
from hylo.distill.student import check_pair
from hylo.errors import HyloError
from hylo.evaluate.evaluate import Workload, evaluate_models, print_results
from hylo.files import read_json, write_json, write_text
from hylo.modeling.loading import read_configuration
from hylo.plan import Plan, make_plan
from hylo.recipe import Data, Recipe, dump_recipe, parse_rank
from hylo.report import read_metrics, write_report


def upcycle(recipe: Recipe, run: Path, console: Console) -> dict[str, Any]:
    """Plans, converts, aligns, extends, evaluates and reports; returns the report.

    Raises HyloError on bad input, whatever can be known of it before any training.
    """
    rank, energy = parse_rank(recipe.rank)
    figures = recipe.geometry | ({} if rank is None else {"kv_lora_rank": rank})
    plan = make_plan(recipe.base, recipe.layout, recipe.mla_layers, figures, recipe.dtype, k_norm=recipe.k_norm)
    data = TrainingData(recipe.data, read_tokenizer(recipe.base))
    initialisation = Initialisation(
        recipe.init,
        recipe.linear_init,
        recipe.rope_key,
        data.calibration(recipe.calibration_tokens, recipe.calibration_length) if recipe.calibration_tokens else None,
        recipe.linear_fraction,
        recipe.linear_steps,
    )
    initialisation.check(plan)
    read_base(recipe.base)
    if energy is not None:
        plan, _ = with_energy(plan, initialisation, energy)
    plan.print(console)
    read_configuration(recipe.extension_teacher)
    check_pair(recipe.base, recipe.base, recipe.align.length)
    check_pair(recipe.base, recipe.extension_teacher, recipe.extend[-1].length)
    work = workload(recipe, data)
    console.print(f"evaluation will read {work.tokens_read:,} tokens a model")
    _claim(run, recipe)
    write_json(run / "plan.json", plan.to_json())
    stages = _train(recipe, plan, initialisation, data, run, console)
    results = _evaluate(recipe, stages, work, run, console)
    print_results(results, console)
    report = build_report(recipe, plan, run, results)
    write_report(run, report)
    console.print(f"report: {run / 'report.html'}")
    return report


class TrainingData:
    """The rows that training reads and the text that evaluation reads, tokenised once."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data, self.tokenizer = data, tokenizer

    @cached_property
    def stream(self) -> np.ndarray:
        read = whole_stream if self.data.held_out else training_stream  # separate held-out text leaves `text` whole
        return read(self.tokenizer, self.data.text)

    @cached_property
    def held_out(self) -> np.ndarray:
        if self.data.held_out:
            return whole_stream(self.tokenizer, self.data.held_out)
        return held_out_stream(self.tokenizer, self.data.text)

    @cached_property
    def facts(self) -> FactFormat:
        return FactFormat.of(self.tokenizer)

    def calibration(self, tokens: int, length: int) -> Tensor:
        """Rows of training text for conversion, (rows, length)."""
        return calibration_rows(self.stream, tokens, length)

    def rows(self, stage: str, seed: int) -> Callable[[int, int], RowDataset]:
        """A stage's rows by length and count; another stage draws other rows."""
        facts = self.facts if self.data.facts else None
        seed = zlib.crc32(f"{seed} {stage}".encode())
        return lambda length, count: RowDataset(self.stream, length, count, seed, facts, self.data.facts)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not directory.is_dir():
        raise HyloError(f"model directory {directory} does not exist; check the path")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise HyloError(f"{directory} has no usable tokenizer ({reason}); add the base's tokenizer files") from error


def read_calibration(base: Path, text: list[str], tokens: int, length: int) -> Tensor:
    """Rows (rows, length) of text to run a base on at conversion; never of what an evaluation would read."""
    return TrainingData(Data(text=text, facts=0), read_tokenizer(base)).calibration(tokens, length)


def _claim(run: Path, recipe: Recipe) -> None:
    """A run directory belongs to one recipe; what another one left there is not mixed with it."""
    path, text = run / "recipe.yaml", dump_recipe(recipe)
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise HyloError(
                f"{path} is another recipe's; choose another --out, or go on with the recipe it was made from"
            )
        return
    if run.exists() and any(run.iterdir()):
        raise HyloError(f"{run} exists and holds no run; choose another --out")
    write_text(path, text)


def workload(recipe: Recipe, data: TrainingData) -> Workload:
    """What every stage is evaluated on; lengths that the text cannot fill are named now, not after the training."""
    settings = recipe.evaluate
    work = Workload(
        settings.lengths,
        data.held_out,
        data.facts,
        settings.answers,
        settings.tokens,
        answers_per_bin=settings.answers_per_bin,
        seed=recipe.seed,
    )
    for stage in (recipe.align, *recipe.extend):  # the same for training text
        data.rows("", stage.seed)(stage.length, 1)
    return work


def _train(
    recipe: Recipe, plan: Plan, initialisation: Initialisation, data: TrainingData, run: Path, console: Console
) -> dict[str, Path]:
    """Writes the model directories that are missing; returns the directory of every stage to evaluate."""

    def once(name: str, directory: Path, make: Callable[[], None]) -> Path:
        if directory.exists():
            console.print(f"{name}: {directory} is there, skipped")
        else:
            console.print(f"{name}: {directory}")
            began = time.monotonic()
            make()
            console.print(f"{name}: done in {time.monotonic() - began:.0f} s")
        return directory

    def converted(directory: Path, how: Initialisation) -> Path:
        def make() -> None:
            print_fits(convert(recipe.base, directory, plan, how, seed=recipe.seed, dtype=recipe.dtype), console)

        return once("convert", directory, make)

    def extended(student: Path, folder: Path, stages: list[Training]) -> Path:
        arm = "" if folder == run else f" ({folder.name})"
        for i, stage in enumerate(stages):
            out = folder / f"extended-{stage.length}"
            rows = data.rows(f"extend {i}", stage.seed)
            make = partial(
                extend, student, recipe.extension_teacher, out, rows, stage, recipe.yarn_original_length, console
            )
            student = once(f"extend to {stage.length}{arm}", out, make)
        return student

    start = converted(run / "converted", initialisation)
    aligned = once(
        "align",
        run / "aligned",
        lambda: align(
            recipe.base, start, run / "aligned", data.rows("align", recipe.align.seed), recipe.align, console
        ),
    )
    stages = {"teacher": recipe.extension_teacher}
    if recipe.extension_teacher != recipe.base:
        stages["base"] = recipe.base
    stages |= {"converted": start, "aligned": aligned, "extended": extended(aligned, run, recipe.extend)}
    if recipe.controls:
        first, *rest = recipe.extend
        longer = [first.model_copy(update={"tokens": first.tokens + recipe.align.tokens}), *rest]
        random = converted(run / "control" / "converted", replace(initialisation, init="random"))
        stages["control"] = extended(random, run / "control", recipe.extend)
        stages["no_alignment"] = extended(start, run / "no_alignment", longer)
    return stages


def _evaluate(
    recipe: Recipe, stages: dict[str, Path], work: Workload, run: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Evaluates the stages that have no result yet; each stage's result is a file of its own."""
    files = {name: run / "evaluations" / f"{name}.json" for name in stages}
    missing = {name: stages[name] for name, file in files.items() if not file.exists()}
    if missing:
        console.print(f"evaluate: {', '.join(missing)}")
        precision = recipe.evaluate.precision
        for name, result in evaluate_models(missing, recipe.extension_teacher, work, precision):
            write_json(files[name], result)
    return {name: read_json(file, "evaluation") for name, file in files.items()}


def build_report(recipe: Recipe, plan: Plan, run: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report's content: see hylo.report.write_report."""
    trained = {"aligned": {"align": run / "aligned"}}
    trained["extended"] = {f"extend {stage.length}": run / f"extended-{stage.length}" for stage in recipe.extend}
    for name in ("control", "no_alignment") if recipe.controls else ():
        trained[name] = {f"{name} {stage.length}": run / name / f"extended-{stage.length}" for stage in recipe.extend}
    training = {
        name: {part: read_metrics(folder / "metrics.jsonl") for part, folder in parts.items()}
        for name, parts in trained.items()
    }

    def cost(name: str, figure: str) -> float:
        return sum(steps[-1][figure] for steps in training.get(name, {}).values())

    figures = plan.to_json()
    return {
        "title": f"{recipe.base.name} to {plan.layout}",
        "base": recipe.base.name,
        "layout": plan.layout,
        "plan": figures,
        "kv_percent_of_base": figures["kv_percent_of_base"],
        "lengths": recipe.evaluate.lengths,
        "l_short": recipe.align.length,
        "l_long": recipe.extend[-1].length,
        "stages": [
            {
                "name": name,
                "metrics": {"kl": {}} | result,
                "tokens": cost(name, "tokens"),
                "seconds": cost(name, "seconds"),
            }
            for name, result in results.items()
        ],
        "training": {part: steps for parts in training.values() for part, steps in parts.items()},
        "checks": [],
        "meta": results["extended"]["meta"],
    }
