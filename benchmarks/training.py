"""Training: tokens/s and peak memory of both stages, beside plain transformers distillation with full logits.

    python benchmarks/training.py --json training.json
    python benchmarks/training.py --lengths 512 --steps 2

A random Llama is base and teacher, a hybrid of it the student: the same two models for every row, in float32 on a CPU
and in bf16 on a GPU. The peer is transformers' Trainer whose loss is the KL between both models' logits, all positions
at once, in either stage's place. Every row runs in a process of its own; its memory is what the whole run, from loading
the models to saving the student, takes above the imported process (on a GPU: what the allocator reached). Times are
medians of the steps after the first; of what our loop adds, saving checkpoints is left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hylo.convert import Initialisation, convert
from hylo.data.retrieval import window
from hylo.distill.align import AlignTrainer, align
from hylo.distill.extend import ExtendTrainer, extend
from hylo.distill.metrics import StepMetrics
from hylo.distill.resumable import Resumable
from hylo.distill.settings import Training
from hylo.modeling import HyloForCausalLM
from hylo.plan import make_plan

GIB = measure.GIB
ROWS = {"align": "hylo, stage 1", "extend": "hylo, stage 2", "peer": "transformers, full logits"}
SPEED, MEMORY, OVERHEAD = 1.3, 0.5, 0.03
LEARNING_RATE = 1e-4


class Clock(TrainerCallback):
    """When every step ended, and how long parts of a step took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.spans: dict[str, list[tuple[float, float]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **others: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **others)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spans.setdefault(part, []).append((start, time.perf_counter()))
            return result

        return call

    def figures(self) -> dict[str, Any]:
        """Seconds of every step after the first, and of each part in all of these together."""
        first, last = self.ends[0], self.ends[-1]
        parts = {
            part: sum(end - start for start, end in spans if start >= first and end <= last)
            for part, spans in self.spans.items()
        }
        return {"steps": np.diff(self.ends).tolist(), "parts": parts}


def make_models(folder: Path, vocabulary: int, width: int, layers: int, longest: int, layout: str) -> None:
    """base/, a random Llama whose heads are 64 wide, two queries to a key; and student/, its hybrid."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    plan = make_plan(folder / "base", layout)
    convert(folder / "base", folder / "student", plan, Initialisation(init="random"))


def make_run(row: str, folder: Path, length: int, vocabulary: int, steps: int) -> Callable[[], None]:
    """A function that trains `steps` steps of one sequence and writes folder/ROW.json: Clock.figures, first loss."""
    clock = Clock()
    stream = np.random.default_rng(0).integers(0, vocabulary, 4 * length).astype(np.int32)

    def rows(length: int, count: int) -> list[dict[str, torch.Tensor]]:
        rng = np.random.default_rng(0)
        return [{"input_ids": torch.from_numpy(window(rng, stream, length)).long()} for _ in range(count)]

    logging.disable_progress_bar()
    run = peer(folder, length, rows, steps, clock) if row == "peer" else ours(row, folder, length, rows, steps, clock)

    def timed_run() -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        loss = run()
        figures = clock.figures() | {"loss": loss}
        if torch.cuda.is_available():
            figures["memory"] = torch.cuda.max_memory_allocated()
        (folder / f"{row}.json").write_text(json.dumps(figures))

    return timed_run


def ours(row: str, folder: Path, length: int, rows: Any, steps: int, clock: Clock) -> Callable[[], float]:
    training = Training(
        tokens=steps * length,
        length=length,
        rows=1,
        learning_rate=LEARNING_RATE,
        objective="layers" if row == "align" else "forward_kl",
        precision="bf16" if torch.cuda.is_available() else "float32",
        save_every=steps + 1,
    )
    base, student, out = folder / "base", folder / "student", folder / f"out-{row}"
    trainer: Any = AlignTrainer if row == "align" else ExtendTrainer
    trainer.forward_and_backward = clock.timed("forward and backward", trainer.forward_and_backward)
    Resumable.clip_gradients = clock.timed("clipping", Resumable.clip_gradients)  # type: ignore[method-assign]
    torch.optim.AdamW.step = clock.timed("optimiser", torch.optim.AdamW.step)  # type: ignore[method-assign]
    told = StepMetrics.on_step_end

    def end(*arguments: Any, **others: Any) -> None:
        told(*arguments, **others)
        clock.on_step_end(*arguments[1:], **others)

    StepMetrics.on_step_end = end  # type: ignore[method-assign]
    quiet = Console(quiet=True)

    def run() -> float:
        if row == "align":
            align(base, student, out, rows, training, quiet)
        else:
            extend(student, base, out, rows, training, length, quiet)
        return float(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    return run


def peer(folder: Path, length: int, rows: Any, steps: int, clock: Clock) -> Callable[[], float]:
    """What one writes with transformers alone."""
    losses: list[float] = []

    class Distiller(Trainer):
        def __init__(self, teacher: LlamaForCausalLM, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.teacher = teacher.to(self.args.device)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            with torch.no_grad():
                teacher = torch.log_softmax(self.teacher(**inputs, use_cache=False).logits.float(), -1)
            student = torch.log_softmax(model(**inputs, use_cache=False).logits.float(), -1)
            kl = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
            loss = kl / inputs["input_ids"].numel()
            losses.append(loss.item())
            return loss

    def run() -> float:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        teacher = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype).requires_grad_(False).eval()
        model = HyloForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
        arguments = TrainingArguments(
            output_dir=str(folder / "peer"),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = rows(length, steps)
        trainer = Distiller(teacher=teacher, model=model, args=arguments, train_dataset=dataset, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.save_pretrained(folder / "out-peer")
        return losses[0]

    return run


def measured(row: str, models: Path, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own: `steps` and `parts` in seconds, `memory` in bytes, `loss` of the first step."""
    with tempfile.TemporaryDirectory(dir=models) as temporary:
        folder = Path(temporary)
        for name in ("base", "student"):
            (folder / name).symlink_to(models / name)
        arguments = (row, folder, length, options.vocabulary, options.steps + 1)
        memory = measure.peak_bytes(make_run, *arguments, threads=options.threads)
        return {"memory": memory} | json.loads((folder / f"{row}.json").read_text())


def summary(runs: list[dict[str, Any]], length: int) -> dict[str, float]:
    """tokens a second, bytes, and for our own rows what the loop adds, as a share of the time, with clipping apart."""
    steps = [step for run in runs for step in run["steps"]]
    figures = {
        "tokens_per_second": length / statistics.median(steps),
        "memory": statistics.median(run["memory"] for run in runs),
        "loss": runs[0]["loss"],
    }
    parts = [run["parts"] for run in runs]
    if parts[0]:
        figures["overhead"] = 1 - sum(sum(part.values()) for part in parts) / sum(steps)
        figures["clipping"] = sum(part["clipping"] for part in parts) / sum(steps)
    return figures


def targets(figures: dict[str, dict[str, float]], length: int) -> list[str]:
    """The lines below the table, for one length."""
    lines, theirs = [], figures.get("peer")
    for row in ("align", "extend"):
        if row not in figures:
            continue
        ours = figures[row]
        if theirs is not None:
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            memory = ours["memory"] / theirs["memory"]
            reached = speed >= SPEED or memory <= MEMORY
            lines.append(
                f"{ROWS[row]}, {length} tokens: {speed:.2f} times the tokens/s, {memory:.2f} times the memory; target "
                f"{SPEED} times the tokens/s or {MEMORY} times the memory: {_judged(reached)}"
            )
        lines.append(
            f"{ROWS[row]}, {length} tokens: the loop adds {100 * ours['overhead']:.2f} % (and clipping "
            f"{100 * ours['clipping']:.2f} %), target less than {100 * OVERHEAD:g} %: "
            f"{_judged(ours['overhead'] + ours['clipping'] < OVERHEAD)}"
        )
    return lines


def _judged(reached: bool) -> str:
    return "reached" if reached else "missed"


def main(arguments: list[str] | None = None, console: Console | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(512, 1024, 2048, 4096))
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--layout", default="1MLA3GDN")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=3, help="that count, in each run; one more goes before")
    parser.add_argument("--repeats", type=int, default=1, help="runs of every row, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = console or Console()
    logging.disable_progress_bar()

    figures: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary)
        shape = (options.vocabulary, options.width, options.layers, max(options.lengths), options.layout)
        make_models(models, *shape)
        for length in options.lengths:
            runs: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
            for _ in range(options.repeats):
                for row in options.rows:
                    runs[row].append(measured(row, models, length, options))
            figures[length] = {row: summary(of_row, length) for row, of_row in runs.items()}

    table = []
    for length, by_row in figures.items():
        for row, values in by_row.items():
            overhead = f"{100 * values['overhead']:.2f}" if "overhead" in values else ""
            speed, memory = f"{values['tokens_per_second']:,.0f}", f"{values['memory'] / GIB:.2f}"
            table.append([f"{length} tokens, {ROWS[row]}", speed, memory, overhead])
    title = f"{options.layers} layers of {options.width}, {options.layout}, vocabulary {options.vocabulary}"
    measure.print_table(console, title, ["", "tokens/s", "memory, GiB", "loop, %"], table)
    lines = [line for length, by_row in figures.items() for line in targets(by_row, length)]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if options.json:
        case = {key: getattr(options, key) for key in ("vocabulary", "width", "layers", "layout", "steps", "repeats")}
        found = {"machine": measure.machine(options.threads), "case": case, "lengths": figures, "targets": lines}
        measure.write_figures(options.json, found)


if __name__ == "__main__":
    main()
