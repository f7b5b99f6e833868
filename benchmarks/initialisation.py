"""What each way of initialising is worth before any training: KL to the teacher and needle accuracy of the conversion.

    python benchmarks/initialisation.py --json initialisation.json
    python benchmarks/initialisation.py --teacher qwen3-teacher --json qwen3.json

converts the demo's teacher to all MLA and to the demo's layout, by every option of `hylo convert`, at three KV budgets,
and prints a table a layout, the published recipe's row first. Rows that the JSON file has already are not run again.
A Qwen3 teacher (benchmarks/qwen3_teacher.py makes one) has no `pca` rows, and `folded` beside `exact` key norms.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hylo.checkpoint import read_tokenizer
from hylo.convert import Initialisation, convert, read_base, with_energy
from hylo.data.retrieval import FactFormat
from hylo.data.settings import Data
from hylo.data.sources import STANDARD_LIBRARY, whole_stream
from hylo.data.training import TrainingData
from hylo.demo import TEACHER
from hylo.errors import HyloError
from hylo.evaluate.evaluate import Workload, evaluate_model
from hylo.evaluate.forward import Teacher
from hylo.files import write_json
from hylo.modeling.loading import load_model
from hylo.plan import Plan, make_plan

LAYOUTS = {
    "all MLA": ("6MLA", None),
    "the demo's": ("2MLA4GDN", [0, 1]),
    "the demo's, Mamba-2": ("2MLA4M2", [0, 1]),
    "the demo's, KDA": ("2MLA4KDA", [0, 1]),
}
KV_RANKS = (48, 80, 112)  # with a rotated key of 16, 25, 37.5 and 50 % of a base layer's 256 values a token
GEOMETRY = {"q_lora_rank": 96, "qk_rope_head_dim": 16, "gdn_num_heads": 2, "gdn_head_dim": 64}
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 8192, 256
LENGTH = 256


@dataclass(frozen=True)
class Row:
    """One conversion. `energy`: ranks of every layer's own, whose mean is at most `kv_rank`."""

    layout: str
    kv_rank: int
    init: str = "pairs-fast"
    rope_key: str = "mean"
    calibrated: bool = False
    energy: bool = False
    k_norm: str = "exact"
    linear_init: str = "aligned"
    linear_fraction: float | None = None
    linear_steps: int = 0

    @property
    def name(self) -> str:
        parts = [self.init, self.rope_key] + ["calibrated"] * self.calibrated + ["energy"] * self.energy
        parts += ["folded"] * (self.k_norm == "folded")
        if self.layout != "all MLA":
            steps = f" {self.linear_steps} steps" if self.linear_init == "calibrated" else ""
            fraction = "" if self.linear_fraction is None else f" {self.linear_fraction:g}"
            parts.append(f"linear {self.linear_init}{fraction}{steps}")
        return ", ".join(parts)


def rows(qwen3: bool) -> Iterator[Row]:
    rope_keys = ("mean",) if qwen3 else ("mean", "pca")
    for layout in LAYOUTS:
        for kv_rank in KV_RANKS:
            yield Row(layout, kv_rank, "recipe", linear_init="recipe")
            of_layout = latent_rows if layout == "all MLA" else linear_rows
            for row in of_layout(layout, kv_rank, rope_keys):
                yield row
                if qwen3 and row.calibrated:
                    yield replace(row, k_norm="folded")


def latent_rows(layout: str, kv_rank: int, rope_keys: tuple[str, ...]) -> Iterator[Row]:
    for init in ("recipe", "pairs-stride", "pairs-fast", "pairs-best"):
        for calibrated in (False, True):
            for rope_key in rope_keys:
                if (init, calibrated, rope_key) != ("recipe", False, "mean"):
                    yield Row(layout, kv_rank, init, rope_key, calibrated)
    for calibrated in (False, True):
        yield Row(layout, kv_rank, "pairs-fast", rope_keys[-1], calibrated, energy=True)


def linear_rows(layout: str, kv_rank: int, rope_keys: tuple[str, ...]) -> Iterator[Row]:
    """Each with the default MLA, then with the calibrated one."""
    for linear_init, fraction, steps in (
        ("recipe", None, 0),
        ("aligned", 0.01, 0),
        ("aligned", 0.1, 0),
        ("aligned", 0.3, 0),
        ("aligned", 1.0, 0),
        ("calibrated", 0.01, 0),
        ("calibrated", None, 0),
        ("calibrated", 0.01, 300),
        ("calibrated", None, 300),
    ):
        for calibrated in (False, True):
            if calibrated or linear_init != "calibrated":
                how = {"linear_init": linear_init, "linear_fraction": fraction, "linear_steps": steps}
                yield Row(layout, kv_rank, "pairs-fast", rope_keys[-1], calibrated, **how)


def measure(base: Path, row: Row, ids: Tensor, guide: Teacher, work: Workload) -> dict[str, Any]:
    how = Initialisation(
        row.init,
        row.linear_init,
        row.rope_key,
        ids if row.calibrated else None,
        row.linear_fraction,
        row.linear_steps,
    )
    layout, positions = LAYOUTS[row.layout]
    plan = make_plan(base, layout, positions, GEOMETRY | {"kv_lora_rank": row.kv_rank}, "float32", k_norm=row.k_norm)
    if row.energy:
        plan = most_energy(plan, how, row.kv_rank)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student"
        convert(base, out, plan, how)
        result = evaluate_model(load_model(out), guide, work)
    length = str(LENGTH)
    return {
        "kv_percent_of_base": plan.kv_percent_of_base,
        "kl": result["kl"][length],
        "needle": result["needle"][length],
        "perplexity": result["perplexity"][length],
    }


def most_energy(plan: Plan, how: Initialisation, kv_rank: int) -> Plan:
    """The plan of the largest energy whose layers' mean rank is at most `kv_rank`."""
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        middle = (low + high) / 2
        candidate, _ = with_energy(plan, how, middle)
        ranks = [candidate.kv_lora_ranks[i] for i, mixer in enumerate(plan.mixers) if mixer == "mla"]
        if sum(ranks) <= kv_rank * len(ranks):
            low, best = middle, candidate
        else:
            high = middle
    if best is None:
        raise HyloError(f"no energy gives a mean rank of at most {kv_rank}; give a larger budget")
    return best


def print_tables(measured: list[dict[str, Any]], console: Console) -> None:
    for layout in LAYOUTS:
        of_layout = [entry for entry in measured if entry["layout"] == layout]
        table = Table(title=f"{layout}: untrained, at {LENGTH} tokens", title_justify="left")
        table.add_column("initialisation", no_wrap=True)
        budgets = [
            next((f"{e['kv_percent_of_base']:.1f}" for e in of_layout if e["kv_rank"] == rank and not e["energy"]), "")
            for rank in KV_RANKS
        ]
        for budget in budgets:
            table.add_column(f"KL at {budget} % KV", justify="right")
        for budget in budgets:
            table.add_column(f"needle at {budget} %", justify="right")
        for name in dict.fromkeys(entry["name"] for entry in of_layout):
            by_rank = {entry["kv_rank"]: entry for entry in of_layout if entry["name"] == name}
            kls = [f"{by_rank[rank]['kl']:.4f}" if rank in by_rank else "" for rank in KV_RANKS]
            needles = [f"{by_rank[rank]['needle']:.3f}" if rank in by_rank else "" for rank in KV_RANKS]
            table.add_row(name, *kls, *needles)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a checkpoint of the demo's teacher's shape")
    parser.add_argument("--json", type=Path, help="file to keep the rows in, and to go on from")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    base = arguments.teacher
    tokenizer = read_tokenizer(base)
    stream = whole_stream(tokenizer, [STANDARD_LIBRARY])
    work = Workload([LENGTH], stream, FactFormat.of(tokenizer), 256, 16384)
    text = TrainingData(Data(text=[STANDARD_LIBRARY]), tokenizer)
    ids = text.calibration(CALIBRATION_TOKENS, CALIBRATION_LENGTH)
    guide = Teacher(load_model(base))
    known: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
        if kept["teacher"] != base.name:
            parser.error(f"{arguments.json} has rows of {kept['teacher']}; name another file")
        known = {json.dumps(e["row"], sort_keys=True): e for e in kept["rows"]}
    measured = []
    for row in rows(read_base(base).config.model_type == "qwen3"):
        key = json.dumps(asdict(row), sort_keys=True)
        entry = known.get(key) or {"row": asdict(row), **asdict(row), "name": row.name} | measure(
            base, row, ids, guide, work
        )
        measured.append(entry)
        console.print(
            f"{row.layout} rank {row.kv_rank}: {row.name}: KL {entry['kl']:.4f}, needle {entry['needle']:.3f}"
        )
        if arguments.json:
            write_json(arguments.json, {"length": LENGTH, "teacher": base.name, "rows": measured})
    print_tables(measured, console)


if __name__ == "__main__":
    main()
