"""How exact a teacher cache is: KL and gradients from cached vectors beside the live teacher's.

    python benchmarks/teacher_cache.py TEACHER STUDENT ... [--tokens 16384] [--length 512] [--text SOURCE] [--json FILE]

For each student a cache in float32 and one in bfloat16 are written and read back. A token's KL is held against the KL
from full logits in float64, a row's gradient, over all of the student's weights, against that of the live loss.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from torch import Tensor

from hylo.checkpoint import read_tokenizer
from hylo.data.settings import Data
from hylo.data.training import TrainingData
from hylo.distill.batch import model_inputs
from hylo.distill.cache import TeacherCache
from hylo.distill.cache_writer import CacheSettings, write_teacher_cache
from hylo.distill.objectives import CachedDistillation, LongDistillation, TeacherStates
from hylo.distill.student import freeze_head, load_student, read_head
from hylo.modeling.loading import load_model

VECTORS = ("float32", "bfloat16")


def errors(teacher: Path, student: Path, cache: TeacherCache) -> dict[str, Any]:
    """Nats a token and what they are off by, and the share of its norm that a row's gradient is off by."""
    model, live = load_student(student), load_model(teacher)
    freeze_head(model, read_head(student))
    W_s, W_t = model.lm_head.weight, live.lm_head.weight
    cached, distillation = CachedDistillation(model), LongDistillation(model)

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, off, gradients = [], [], []
    for row in cache.dataset(cache.recipe.length, cache.recipe.count):
        batch = {name: values[None] for name, values in row.items()}
        inputs, c, neg_entropy = model_inputs(batch), batch["vectors"], batch["neg_entropy"]
        with torch.no_grad():
            h_s, h_t = (m.model(**inputs, use_cache=False).last_hidden_state for m in (model, live))
            log_s = torch.log_softmax(h_s[0].double() @ W_s.double().T, -1)
            log_t = torch.log_softmax(h_t[0].double() @ W_t.double().T, -1)
            exact.append((log_t.exp() * (log_t - log_s)).sum(-1))
            kl = torch.logsumexp(h_s[0] @ W_s.T, -1) - (h_s * c)[0].sum(-1) + neg_entropy[0]
            off.append(kl - exact[-1])
        reference = gradient(distillation(batch, TeacherStates(h_t, W_t)))
        difference = gradient(cached(batch)) - reference
        gradients.append((difference.norm() / reference.norm()).item())
    off_N = torch.cat(off)
    return {
        "kl": torch.cat(exact).mean().item(),
        "kl_off": off_N.mean().item(),
        "token_off_most": off_N.abs().max().item(),
        "token_off_mean": off_N.abs().mean().item(),
        "gradient_off_most": max(gradients),
        "gradient_off_mean": sum(gradients) / len(gradients),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", default="python-stdlib")
    parser.add_argument("--facts", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, rows = Console(), []
    for student in options.students:
        data = TrainingData(Data(text=[options.text], facts=options.facts), read_tokenizer(student))
        for dtype in VECTORS:
            settings = CacheSettings(
                data=[options.text],
                facts=options.facts,
                length=options.length,
                rows=1,
                tokens=options.tokens,
                dtype=dtype,
            )
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "cache"
                write_teacher_cache(
                    options.teacher, student, out, data.rows("extend", 0), settings, Console(quiet=True)
                )
                found = errors(options.teacher, student, TeacherCache(out))
            rows.append({"student": student.name, "vectors": dtype} | found)
    names = [name for name in rows[0] if name not in ("student", "vectors")]
    table = [[row["student"], row["vectors"], *(f"{row[name]:.1e}" for name in names)] for row in rows]
    measure.print_table(
        console, "nats a token; gradients as a share of their norm", ["student", "vectors", *names], table
    )
    if options.json:
        measure.write_figures(options.json, {"machine": measure.machine(options.threads), "rows": rows})


if __name__ == "__main__":
    main()
