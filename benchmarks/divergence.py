"""Divergence from hidden states: time and memory of a loss and its gradients, beside full logits and other packages.

    python benchmarks/divergence.py --json divergence.json
    python benchmarks/divergence.py --kind jsd --json jsd.json
    python benchmarks/divergence.py --only-memory hylo --tokens 65536

One step is the mean divergence of --tokens tokens and its gradients to the student's hidden states and head, in float32
on a CPU and in bf16 on a GPU. Times are medians of interleaved runs; memory is what a step needs above its inputs and
the gradients that it returns, measured in a process of its own. Peers that are not installed are named as such.
"""

import argparse
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from torch import Tensor

from hylo.ops import hidden_state_divergence, kernels

GIB = measure.GIB
KINDS = ("forward_kl", "reverse_kl", "jsd")
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as TRL and Liger number the kinds
MEMORY_TARGET, FULL_TARGET, TRL_TARGET = 0.7, 1.05, 0.6
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]


def hylo(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str) -> Tensor:
    return hidden_state_divergence(hidden, head, teacher_hidden, teacher_head, kind=kind)  # type: ignore[arg-type]


def hylo_torch(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str) -> Tensor:
    forced, kernels.FORCED = kernels.FORCED, "torch"
    try:
        return hylo(hidden, head, teacher_hidden, teacher_head, kind)
    finally:
        kernels.FORCED = forced


def full_logits(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str) -> Tensor:
    """What one writes without such an operation, with no more (N, V) tensors than autograd asks for."""
    with torch.no_grad():
        teacher = torch.log_softmax(teacher_hidden @ teacher_head.T, -1)
    student = torch.log_softmax(hidden @ head.T, -1)
    kl = torch.nn.functional.kl_div
    if kind == "forward_kl":
        return kl(student, teacher, reduction="batchmean", log_target=True)
    if kind == "reverse_kl":
        return kl(teacher, student, reduction="batchmean", log_target=True)
    mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
    one, other = (kl(mixture, x, reduction="batchmean", log_target=True) for x in (teacher, student))
    return (one + other) / 2


def trl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (hidden, head, None, teacher_hidden, teacher_head, None, BETAS[kind])
    return ChunkedDivergenceFunction.apply(*arguments)[0].mean()


def liger(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[kind], compiled=False)
    return loss(
        hidden, head, teacher_hidden, teacher_head, torch.zeros(len(hidden), dtype=torch.int64).to(hidden.device)
    )


ROWS: dict[str, tuple[str, Loss, str | None]] = {
    "hylo": ("hylo", hylo, None),
    "hylo-torch": ("hylo, torch form", hylo_torch, None),
    "full": ("full logits and autograd", full_logits, None),
    "trl": ("TRL ChunkedDivergenceFunction", trl, "trl"),
    "liger": ("Liger LigerFusedLinearJSDLoss", liger, "liger_kernel"),
}


@cache
def inputs(tokens: int, vocabulary: int, widths: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of student and teacher, the same for every row; the KL of such logits is near 1 nat."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    hidden, teacher_hidden = (torch.randn(tokens, width, device=device).to(dtype) for width in widths)
    head, teacher_head = (torch.randn(vocabulary, w, device=device).mul_(w**-0.5).to(dtype) for w in widths)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head


def make_step(name: str, tokens: int, vocabulary: int, widths: tuple[int, int], kind: str) -> Callable[[], Any]:
    """A function that runs a step and returns the loss and both gradients."""
    arguments, loss_of = inputs(tokens, vocabulary, widths), ROWS[name][1]

    def step() -> tuple[float, Tensor | None, Tensor | None]:
        arguments[0].grad = arguments[1].grad = None
        loss = loss_of(*arguments, kind)
        loss.backward()
        return loss.item(), arguments[0].grad, arguments[1].grad

    return step


def memory(arguments: tuple[Any, ...], threads: int) -> int:
    """Bytes above inputs and returned gradients."""
    _, tokens, vocabulary, (width, _), _ = arguments
    gradients = (tokens + vocabulary) * width
    if torch.cuda.is_available():
        step = make_step(*arguments)
        step()
        before = torch.cuda.memory_allocated() - 2 * gradients  # the gradients of this first step are still there
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before - 2 * gradients
    return measure.peak_bytes(make_step, *arguments, threads=threads) - 4 * gradients


def installed(name: str) -> bool:
    package = ROWS[name][2]
    return package is None or find_spec(package) is not None


def targets(figures: dict[str, dict[str, float]]) -> list[str]:
    """The lines below the table."""
    lines = []
    ours = figures["hylo"]
    if "memory" in ours:
        lines.append(_target("memory above inputs and gradients, GiB", ours["memory"] / GIB, MEMORY_TARGET))
    for peer, limit in (("full", FULL_TARGET), ("trl", TRL_TARGET)):
        if "seconds" in ours and "seconds" in figures.get(peer, {}):
            ratio = ours["seconds"] / figures[peer]["seconds"]
            lines.append(_target(f"time, as a multiple of {ROWS[peer][0]}", ratio, limit))
    return lines


def _target(what: str, value: float, limit: float) -> str:
    return f"{what}: {value:.2f}, target at most {limit:g}: {'reached' if value <= limit else 'missed'}"


def main(arguments: list[str] | None = None, console: Console | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--widths", type=int, nargs=2, default=(2048, 4096), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--kind", choices=KINDS, default="forward_kl")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="which rows to run; all that can run")
    parser.add_argument("--only-memory", nargs="+", choices=ROWS, metavar="ROW", help="no times, and only these rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = console or Console()
    torch.set_num_threads(options.threads)

    gpu = torch.cuda.is_available()
    # On a CPU the torch form is what hylo runs.
    asked = options.only_memory or options.rows or [name for name in ROWS if name != "hylo-torch" or gpu]
    names = [name for name in asked if installed(name)]
    case = (options.tokens, options.vocabulary, tuple(options.widths), options.kind)
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        figures[name]["memory"] = memory((name, *case), options.threads)
    if not options.only_memory:
        steps = {name: make_step(name, *case) for name in names}
        for name, step in steps.items():
            figures[name]["loss"] = step()[0]  # and the first, unmeasured run
        times = measure.seconds(steps, options.repeats, warmup=0)
        for name, seconds in measure.medians(times).items():
            figures[name]["seconds"] = seconds

    columns = ["", "time, s", "memory, GiB", "loss"]
    rows = []
    for name in asked:
        values = figures.get(name)
        if values is None:
            rows.append([ROWS[name][0], "not installed", "", ""])
            continue
        seconds, loss = values.get("seconds"), values.get("loss")
        rows.append(
            [
                ROWS[name][0],
                "" if seconds is None else f"{seconds:.3g}",
                f"{values['memory'] / GIB:.2f}",
                "" if loss is None else f"{loss:.5f}",
            ]
        )
    T, V, widths, kind = case
    measure.print_table(
        console, f"{kind}, {T} tokens, vocabulary {V}, widths {widths[0]} and {widths[1]}", columns, rows
    )
    lines = targets(figures) if "hylo" in figures else []
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if options.json:
        case_figures = {"tokens": T, "vocabulary": V, "widths": widths, "kind": kind}
        figures_of_all = {"machine": measure.machine(options.threads), "case": case_figures, "rows": figures}
        measure.write_figures(options.json, figures_of_all | {"targets": lines})


if __name__ == "__main__":
    main()
