"""How good are the layers that a selector keeps? Every layout of the demo's model is trained and measured, and ranked.

    python benchmarks/selection.py --work DIR --seeds 5 --count 2,3 --json selection.json

For each seed the demo's teacher is converted and aligned twice, all MLA and all Gated DeltaNet, as its short recipe
says. Then every choice of --count layers to stay MLA is assembled from the two, distilled a little on the same rows and
measured on the same held-out text: KL from the teacher, and needle accuracy. Each method of `hylo select` chooses from
the same two students, and its choice's rank among all layouts is looked up. Every layout and every choice is a file in
DIR as soon as it is known; the same command goes on from there.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from measure import machine, print_table, write_figures
from rich.console import Console
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from hylo.checkpoint import read_tokenizer
from hylo.convert import Initialisation, convert
from hylo.convert.assemble import assemble
from hylo.data.training import TrainingData
from hylo.demo import HERE, TEACHER
from hylo.distill.align import align
from hylo.distill.batch import model_inputs
from hylo.distill.objectives import LongDistillation, TeacherStates
from hylo.evaluate.evaluate import Workload
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.needle import recalled
from hylo.evaluate.perplexity import row_sums
from hylo.files import read_json, write_json
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model
from hylo.plan import make_plan
from hylo.recipe import Recipe, read_recipe
from hylo.select.context import SelectionContext
from hylo.select.records import Records
from hylo.select.select import rank_layers

LAYERS = 6
MEASURES = {"kl": True, "needle": False}  # whether lower is better
BEST = 0.1  # of the layouts: what counts as a hit
METHODS = ("uniform", "window", "kl:one-shot", "kl:greedy", "kl:removal", "gates")


@dataclass(frozen=True)
class Settings:
    """What fixes a layout's figures beside the seed. A distillation step is `rows` sequences of `length` tokens."""

    align_tokens: int = 120_000
    tokens: int = 61_440
    length: int = 512
    rows: int = 8
    learning_rate: float = 5e-4
    answers: int = 256
    text_tokens: int = 16_384


class Yard:
    """One seed: its two aligned students, the rows that every layout is distilled on, and what all are measured on."""

    def __init__(self, settings: Settings, seed: int, folder: Path, console: Console) -> None:
        self.settings, self.seed, self.folder, self.console = settings, seed, folder, console
        recipe = read_recipe(HERE / "short.yaml")
        first, second = (stage.model_copy(update={"seed": seed}) for stage in recipe.stages[:2])
        first = first.model_copy(update={"tokens": settings.align_tokens})
        self.recipe: Recipe = recipe.model_copy(update={"seed": seed, "stages": [first, second]})
        self.data = TrainingData(recipe.data, read_tokenizer(TEACHER))
        self.teacher = Teacher(load_model(TEACHER).requires_grad_(False))

    @cached_property
    def students(self) -> tuple[Path, Path]:
        """The aligned all-MLA and all-linear directories."""
        return self._aligned(f"{LAYERS}MLA", "all-mla"), self._aligned(f"{LAYERS}GDN", "all-linear")

    def _aligned(self, layout: str, name: str) -> Path:
        converted, aligned = self.folder / f"{name}-converted", self.folder / name
        recipe, (part, _) = self.recipe, self.recipe.parts()
        if not converted.exists():
            plan = make_plan(TEACHER, layout, None, recipe.geometry, recipe.dtype, k_norm=recipe.k_norm)
            sample = self.data.calibration(recipe.calibration_tokens, recipe.calibration_length, part)
            how = Initialisation(
                recipe.init,
                recipe.linear_init,
                recipe.rope_key,
                sample,
                recipe.linear_fraction,
                recipe.linear_steps,
            )
            convert(TEACHER, converted, plan, how, seed=self.seed)
        if not aligned.exists():
            rows = self.data.rows("aligned", self.seed, part)
            align(TEACHER, converted, aligned, rows, recipe.stages[0], self.console)
        return aligned

    @cached_property
    def batches(self) -> list[tuple[dict[str, Tensor], TeacherStates]]:
        """The distillation's steps, each with what the teacher says: the same for every layout."""
        settings = self.settings
        steps = settings.tokens // (settings.rows * settings.length)
        data = self.data.rows("extended", self.seed, self.recipe.parts()[1])(settings.length, steps * settings.rows)
        batches = []
        for step in range(steps):
            rows = [data[step * settings.rows + i] for i in range(settings.rows)]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            with torch.no_grad():
                hidden = self.teacher.model.model(**model_inputs(batch), use_cache=False).last_hidden_state
            batches.append((batch, TeacherStates(hidden, self.teacher.head)))
        return batches

    @cached_property
    def work(self) -> Workload:
        """Alike for every seed, as is the held-out text."""
        settings = self.settings
        return Workload([settings.length], self.data.held_out, self.data.facts, settings.answers, settings.text_tokens)

    def context(self, count: int) -> SelectionContext:
        """What a selector is given; it finds what it has scored already, whatever the count and the method."""
        recipe, settings, students = self.recipe, self.settings, self.students
        plan = make_plan(TEACHER, f"{count}MLA{LAYERS - count}GDN", None, recipe.geometry, recipe.dtype)
        return SelectionContext(
            TEACHER,
            plan,
            *students,
            data=self.data,
            length=settings.length,
            tokens=settings.text_tokens,
            facts=recipe.data.facts,
            seed=self.seed,
            precision="float32",
            console=self.console,
            records=Records(self.folder / "records", asdict(settings)),
        )

    def measure(self, layers: Sequence[int]) -> dict[str, Any]:
        """The layout with MLA in `layers`: its KL, before and after distillation, and needle accuracy, row by row."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            assemble(*self.students, Path(folder) / "hybrid", layers)
            model = load_model(Path(folder) / "hybrid")
        assert isinstance(model, HyloForCausalLM)
        model.config.extend_context(self.settings.length, self.recipe.yarn_original_length)
        before = self.divergence(model)
        loss = self.distil(model)
        kl, right = self.divergence(model), recalled(Scorer(model), self.work.needle_rows[self.settings.length])
        return {
            "layers": list(layers),
            "kl": statistics.mean(kl),
            "needle": float(right.mean()),
            "kl_undistilled": statistics.mean(before),
            "loss": loss,
            "kl_rows": kl,
            "needle_rows": right.mean(1).tolist(),
            "seconds": round(time.monotonic() - began, 1),
        }

    def distil(self, model: HyloForCausalLM) -> list[float]:
        """All weights, in bf16 on float32 weights as the recipe's stages do; returns the loss of every step."""
        settings, objective, losses = self.settings, LongDistillation(model.train()), []
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        steps = len(self.batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
        for batch, states in self.batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(batch, states)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 5))
        model.eval()
        return losses

    def divergence(self, model: HyloForCausalLM) -> list[float]:
        """KL(teacher || model) of every held-out row, in nats a token."""
        scorer, rows = Scorer(model.eval()), self.work.text_rows[self.settings.length]
        found = [record for batch in rows.split(16) for record in row_sums(scorer, batch, self.teacher)]
        return [sum(record["kl"]) / self.settings.length for record in found]


def layouts(count: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(LAYERS), count))


def name_of(layers: Sequence[int]) -> str:
    return "-".join(map(str, layers))


def remembered(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` holds; made and written where it is not there."""
    if not file.exists():
        write_json(file, make())
    return read_json(file, "result")


def measure_all(yard: Yard, count: int, console: Console) -> list[dict[str, Any]]:
    results = []
    for layers in layouts(count):
        file = yard.folder / "layouts" / f"{name_of(layers)}.json"
        known = file.exists()
        results.append(remembered(file, partial(yard.measure, layers)))
        if not known:
            new = results[-1]
            figures = f"KL {new['kl']:.4f} (undistilled {new['kl_undistilled']:.4f}), needle {new['needle']:.3f}"
            console.print(f"seed {yard.seed}, MLA in {name_of(layers)}: {figures}, {new['seconds']:.0f} s")
    return results


def ranks(results: Sequence[Mapping[str, Any]], measure: str, lower_is_better: bool) -> dict[tuple[int, ...], int]:
    """1 for the best; equal figures share a rank, figures within each other's errors do not."""
    sign = 1 if lower_is_better else -1
    values = {tuple(result["layers"]): sign * result[measure] for result in results}
    return {layers: 1 + sum(other < value for other in values.values()) for layers, value in values.items()}


def judged(results: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> dict[str, Any]:
    """The rank of a choice by each measure, whether that is among the best, and its KL over the best layout's."""
    limit = max(1, math.floor(BEST * len(results)))
    found: dict[str, Any] = {"layers": list(layers)}
    for measure, lower in MEASURES.items():
        rank = ranks(results, measure, lower)[tuple(sorted(layers))]
        found |= {f"{measure}_rank": rank, f"{measure}_hit": rank <= limit}
    own = next(result for result in results if result["layers"] == sorted(layers))
    return found | {"kl": own["kl"], "needle": own["needle"], "kl_regret": own["kl"] - min(r["kl"] for r in results)}


def print_results(entries: Sequence[Mapping[str, Any]], counts: Sequence[int], console: Console) -> None:
    """For every number of MLA layers a line a method: over the seeds that are done."""
    for count in counts:
        of_count = [entry for entry in entries if entry["count"] == count]
        if not of_count:
            continue
        total, rows = math.comb(LAYERS, count), []
        for method in dict.fromkeys(entry["method"] for entry in of_count):
            found = [entry for entry in of_count if entry["method"] == method]
            hits = [f"{sum(entry[f'{measure}_hit'] for entry in found)}/{len(found)}" for measure in MEASURES]
            means = [statistics.mean(entry[f"{measure}_rank"] for entry in found) for measure in MEASURES]
            regret = statistics.mean(entry["kl_regret"] for entry in found)
            chosen = ", ".join(sorted({name_of(entry["layers"]) for entry in found}))
            minutes = statistics.mean(entry["seconds"] for entry in found) / 60
            rows.append([method, hits[0], f"{means[0]:.1f}", f"{regret:.4f}", hits[1], f"{means[1]:.1f}"])
            rows[-1] += [f"{minutes:.1f}", chosen]
        best = max(1, math.floor(BEST * total))
        rows.append(["chance", f"{best / total:.0%}", f"{(total + 1) / 2:.1f}", "", "", "", "", ""])
        columns = ["method", f"best {best} by KL", "mean rank", "KL over best's"]
        columns += [f"best {best} by needle", "mean rank", "minutes", "chosen"]
        print_table(console, f"{count} of {LAYERS} layers stay MLA, {total} layouts a seed", columns, rows)


def choices(yard: Yard, count: int, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What every method chooses from the seed's students, and what that took."""
    folder = yard.folder / "choices"
    files = {method: folder / f"{method.replace(':', '-')}-{count}.json" for method in methods}
    return {method: remembered(file, partial(choose, yard, count, method)) for method, file in files.items()}


def choose(yard: Yard, count: int, method: str) -> dict[str, Any]:
    """What `hylo select` would keep, given the yard's students and as much held-out text at the same length."""
    began = time.monotonic()
    kind, _, order = method.partition(":")
    ranking = rank_layers(yard.context(count), kind, order or "greedy")  # type: ignore[arg-type]
    return {
        "layers": sorted(ranking.order[:count]),
        "scores": [vars(score) for score in ranking.scores],
        "tokens": ranking.tokens,
        "seconds": ranking.seconds or round(time.monotonic() - began, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where every result is kept")
    parser.add_argument("--seeds", type=int, default=5, help="0 to this, without it")
    parser.add_argument("--count", default="2,3", metavar="N,N", help="layers that stay MLA, of 6")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,NAME")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="of a layout's distillation")
    parser.add_argument("--align-tokens", type=int, default=Settings.align_tokens, help="of a student's alignment")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=130)
    settings = Settings(align_tokens=arguments.align_tokens, tokens=arguments.tokens)
    counts, methods = [int(n) for n in arguments.count.split(",")], arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"method {unknown.pop()} is not known; choose of {', '.join(METHODS)}")
    if remembered(arguments.work / "settings.json", lambda: asdict(settings)) != asdict(settings):
        parser.error(f"{arguments.work} holds results of other settings; give those, or another --work")
    entries: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        yard = Yard(settings, seed, arguments.work / f"seed-{seed}", console)
        for count in counts:
            results = measure_all(yard, count, console)
            measured.append({"seed": seed, "count": count, "layouts": results})
            for method, choice in choices(yard, count, methods).items():
                own = {"seed": seed, "count": count, "method": method, "seconds": choice["seconds"]}
                entries.append(own | judged(results, choice["layers"]))
            print_results(entries, counts, console)
            if arguments.json:
                figures = {"machine": machine(arguments.threads), "settings": asdict(settings)}
                write_figures(arguments.json, figures | {"choices": entries, "measured": measured})


if __name__ == "__main__":
    main()
