"""Greedy answers to RULER's prompts: hylo's generation beside transformers' `generate`, same model, same prompts.

    python benchmarks/ruler_generation.py --json ruler_generation.json
    python benchmarks/ruler_generation.py --model RUN/extended-2048 --length 2048 --samples 8

Three ways take turns on the samples of one task. hylo: `hylo.evaluate.generation`, which computes what prompts share
once. single: a call of `generate` for every prompt. batched: one call for all of them, padded on the left. All three
stop at the same tokens. share: of the prompts' tokens, what hylo computes, padding included.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo.checkpoint import read_tokenizer
from hylo.errors import HyloError
from hylo.evaluate.generation import GreedyGenerator, Prompt
from hylo.evaluate.prefixes import make_tree
from hylo.evaluate.ruler import Sources, check_tasks, encode, ruler_samples
from hylo.modeling.loading import load_model

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue", "vt", "cwe", "fwe")
HAYSTACK = Path("python-stdlib")  # stands in for the essays: text that every machine has
PEERS = {"single": "transformers, one at a time", "batched": "transformers, batched"}
FASTER = 1.0  # than either of transformers' ways, the median over the tasks

Answers = list[list[int]]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], length: int, samples: int
) -> dict[str, list[Prompt]]:
    """Of every task that can be had at this length; tasks without a source are left out."""
    sources = Sources(haystack=HAYSTACK)
    tasks, _ = check_tasks(names, [length], tokenizer, sources)
    return {
        task.name: [
            Prompt(encode(tokenizer, sample.prompt), sample.tokens_to_generate)
            for sample in ruler_samples(task, length, samples, tokenizer, 0, sources)
        ]
        for task in tasks
    }


class Transformers:
    """`generate` of the model itself, with the ends of answers that hylo heeds."""

    def __init__(self, model: PreTrainedModel, ends: set[int]) -> None:
        self.model, self.ends = model, ends

    @torch.inference_mode()
    def batched(self, prompts: list[Prompt]) -> Answers:
        longest = max(len(prompt.ids) for prompt in prompts)
        pads = [longest - len(prompt.ids) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt.ids for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=prompts[0].new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends),
            pad_token_id=min(self.ends),
        )
        return [self._answer(row) for row in out[:, longest:].tolist()]

    def single(self, prompts: list[Prompt]) -> Answers:
        return [self.batched([prompt])[0] for prompt in prompts]

    def _answer(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:end]


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], repeats: int) -> dict:
    """Medians of seconds by way, how many answers of each are hylo's, and what of the prompts hylo computes."""
    hylo = GreedyGenerator(model, tokenizer)
    peer = Transformers(model, hylo.ends)
    ways: dict[str, Callable[[], Answers]] = {
        "hylo": lambda: hylo.answers(prompts),
        "single": lambda: peer.single(prompts),
        "batched": lambda: peer.batched(prompts),
    }
    answers = {name: way() for name, way in ways.items()}  # and the first, unmeasured run
    same = {name: sum(a == b for a, b in zip(given, answers["hylo"], strict=True)) for name, given in answers.items()}
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return {
        "samples": len(prompts),
        "prompt_tokens": tokens,
        "answer_tokens": sum(map(len, answers["hylo"])),
        "computed": make_tree([prompt.ids for prompt in prompts]).computed / tokens,
        "same_answers": same,
        "seconds": measure.medians(measure.seconds(ways, repeats, warmup=0)),
    }


def medians(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Over the tasks, how many times as long transformers takes as hylo."""
    return {
        way: statistics.median(row["seconds"][way] / row["seconds"]["hylo"] for row in rows.values()) for way in PEERS
    }


def report(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Prints the table; returns the lines below it."""
    table = []
    for task, row in rows.items():
        n, seconds = row["samples"], row["seconds"]
        cells = [task, f"{row['computed']:.2f}", f"{seconds['hylo'] / n:.2f}"]
        for way in PEERS:
            cells += [f"{seconds[way] / n:.2f}", f"{seconds[way] / seconds['hylo']:.2f}"]
        table.append([*cells, f"{min(row['same_answers'].values())}/{n}"])
    columns = ["s a sample", "share", "hylo", "single", "/ hylo", "batched", "/ hylo", "same"]
    measure.print_table(console, title, columns, table)
    lines = []
    for way, ratio in medians(rows).items():
        verdict = "reached" if ratio >= FASTER else "missed"
        lines.append(f"{verdict}: {title}: {ratio:.2f} times as fast as {PEERS[way]} (median; at least {FASTER:g})")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return lines


def main(arguments: list[str] | None = None, console: Console | None = None) -> None:
    demo = Path(__file__).parents[1] / "src/hylo/demo/teacher"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=[demo], help="checkpoints; the demo's teacher")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = console or Console()
    torch.set_num_threads(options.threads)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    figures, lines = {}, []
    for directory in options.model:
        try:
            tokenizer = read_tokenizer(directory)
            prompts = make_prompts(tokenizer, tuple(options.tasks), options.length, options.samples)
            model = load_model(directory, dtype, device).eval()
        except HyloError as error:
            parser.error(str(error))
        rows = {task: compare(model, tokenizer, asked, options.repeats) for task, asked in prompts.items()}
        lines += report(console, f"{directory.name} at {options.length}", rows)
        figures[str(directory)] = {"tasks": rows, "times_as_fast": medians(rows)}
    if options.json:
        case = {"length": options.length, "samples": options.samples, "repeats": options.repeats}
        machine = measure.machine(options.threads)
        measure.write_figures(options.json, {"machine": machine, "case": case, "models": figures, "targets": lines})


if __name__ == "__main__":
    main()
