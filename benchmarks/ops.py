"""What the operations of hylo.ops cost beside transformers' torch paths: time a token, growth with length, memory.

    python benchmarks/ops.py [--only gated-delta kimi-delta step ssd latent] [--lengths 64,512,4096] [--json FILE]

Forward and backward in float32 on the CPU, runs interleaved, medians; memory is how far a fresh process's resident
memory rises over its inputs while one run of forward and backward is on, its gradients included (Linux only).
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import latent
import measure
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bamba import modeling_bamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from hylo.ops import gated_delta_rule, kimi_delta_rule, ssd

# With flash-linear-attention installed transformers would call that, on tensors of the CPU too.
torch_chunk_gated_delta_rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
torch_recurrent_gated_delta_rule = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
chunk_kimi_delta_attention = inspect.unwrap(modeling_kimi_linear.chunk_kimi_delta_attention)
recurrent_kimi_delta_attention = inspect.unwrap(modeling_kimi_linear.recurrent_kimi_delta_attention)
mamba2_chunk_scan = inspect.unwrap(modeling_bamba.mamba2_chunk_scan)
mamba2_selective_state_update = inspect.unwrap(modeling_bamba.mamba2_selective_state_update)

LENGTHS = (64, 128, 512, 4096, 16384)
SHORT, LONG = 512, 16384  # between which time a token may grow by 15 %
GROWTH = 1.15
FASTER_AT, FASTER = 4096, 4.0  # than transformers, for six heads of 256/512
STEP_FASTER, TOKENS = 1.5, 20


class GatedDelta(NamedTuple):
    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        return f"gated delta, {self.heads} x {self.key}/{self.value}"


class KimiDelta(NamedTuple):
    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        return f"Kimi delta, {self.heads} x {self.key}/{self.value}"


class StateSpace(NamedTuple):
    heads: int
    groups: int
    width: int
    state: int

    def __str__(self) -> str:
        return f"SSD, {self.heads} heads of {self.width}, {self.groups} groups, state {self.state}"


Case = GatedDelta | KimiDelta | StateSpace
GATED_DELTA = [GatedDelta(4, 64, 64), GatedDelta(16, 128, 128), GatedDelta(6, 256, 512)]
KIMI_DELTA = [KimiDelta(4, 64, 64), KimiDelta(16, 128, 128)]
STATE_SPACE = [StateSpace(32, 8, 64, 64), StateSpace(24, 8, 128, 128)]  # Llama-3.2-1B's and 3B's
PEERS_UP_TO = 1 << 24  # numbers in the output
KIMI_PEERS_UP_TO = 1 << 20  # theirs holds 64 decays for each, some times over
PEERS = {
    GatedDelta: ["transformers"],
    KimiDelta: ["transformers"],
    StateSpace: ["transformers", "transformers, chunks of 64"],
}


def run_of(which: str, case: Case, length: int) -> Callable[[], Any]:
    """Forward and backward, to all inputs."""
    torch.manual_seed(0)
    inputs = _ssd_inputs(case, length) if isinstance(case, StateSpace) else _delta_inputs(case, length)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    forward = FORWARD[type(case)]
    weights = torch.randn(1, length, case.heads, case.width if isinstance(case, StateSpace) else case.value)
    return lambda: torch.autograd.grad(forward(which, inputs), leaves, weights)


def step_of(which: str, case: Case, rows: int = 1) -> Callable[[], Any]:
    """One token, with a state."""
    torch.manual_seed(0)
    if not isinstance(case, StateSpace):
        t = _delta_inputs(case, 1, rows)
        state = torch.randn(rows, case.heads, case.key, case.value)
        gated = isinstance(case, GatedDelta)
        if which == "hylo":
            own = gated_delta_rule if gated else kimi_delta_rule
            return lambda: own(**t, initial_state=state, output_final_state=True, use_qk_l2norm=True)
        theirs = torch_recurrent_gated_delta_rule if gated else recurrent_kimi_delta_attention
        return lambda: theirs(
            *(t[name] for name in "qkv"),
            g=t["g"],
            beta=t["beta"],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    t = _ssd_inputs(case, 1, rows)
    state = torch.randn(rows, case.heads, case.width, case.state)
    if which == "hylo":
        return lambda: ssd(**t, initial_state=state, output_final_state=True)
    repeats = case.heads // case.groups

    def update() -> Tensor:
        x, B = (t[name][:, 0].repeat_interleave(repeats, 1) for name in ("x", "B"))
        heads = [t[name][..., None].expand(-1, case.width) for name in ("dt_bias", "D")]
        A = -t["A_log"].exp()[:, None, None].expand(-1, case.width, case.state)
        dt = t["dt"][:, 0, :, None].expand(-1, -1, case.width)
        return mamba2_selective_state_update(
            state, x, dt, A, B, t["C"][:, 0], heads[1], dt_bias=heads[0], dt_softplus=True
        )

    return update


def _delta_inputs(case: GatedDelta | KimiDelta, length: int, rows: int = 1) -> dict[str, Tensor]:
    q, k = (torch.randn(rows, length, case.heads, case.key) for _ in "qk")
    v = torch.randn(rows, length, case.heads, case.value)
    decays = (case.key,) if isinstance(case, KimiDelta) else ()
    g = -F.softplus(torch.randn(rows, length, case.heads, *decays) - 2)
    return {"q": q, "k": k, "v": v, "g": g, "beta": torch.rand(rows, length, case.heads)}


def _ssd_inputs(case: StateSpace, length: int, rows: int = 1) -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, length, case.groups, case.width),
        "dt": torch.randn(rows, length, case.heads) - 2,
        "A_log": torch.rand(case.heads),
        "B": torch.randn(rows, length, case.groups, case.state),
        "C": torch.randn(rows, length, case.heads, case.state),
        "D": torch.ones(case.heads),
        "dt_bias": torch.zeros(case.heads),
    }


def _gated_delta(which: str, t: dict[str, Tensor]) -> Tensor:
    if which == "hylo":
        return gated_delta_rule(**t, use_qk_l2norm=True)[0]
    q, k, v = (t[name] for name in "qkv")
    return torch_chunk_gated_delta_rule(q, k, v, g=t["g"], beta=t["beta"], use_qk_l2norm_in_kernel=True)[0]


def _kimi_delta(which: str, t: dict[str, Tensor]) -> Tensor:
    if which == "hylo":
        return kimi_delta_rule(**t, use_qk_l2norm=True)[0]
    q, k, v = (t[name] for name in "qkv")
    return chunk_kimi_delta_attention(q, k, v, g=t["g"], beta=t["beta"], use_qk_l2norm_in_kernel=True)[0]


def _ssd(which: str, t: dict[str, Tensor]) -> Tensor:
    if which == "hylo":
        return ssd(**t)[0]
    repeats = t["C"].shape[2] // t["x"].shape[2]
    x, B = (t[name].repeat_interleave(repeats, 2) for name in ("x", "B"))
    chunk = 64 if which.endswith("64") else 256  # Bamba's own
    A, options = -t["A_log"].exp(), {"D": t["D"], "dt_bias": t["dt_bias"], "dt_softplus": True}
    return mamba2_chunk_scan(x, t["dt"], A, B, t["C"], chunk, **options)


FORWARD: dict[type, Callable[[str, dict[str, Tensor]], Tensor]] = {
    GatedDelta: _gated_delta,
    KimiDelta: _kimi_delta,
    StateSpace: _ssd,
}


def train_rows(case: Case, lengths: list[int], threads: int, all_peers: bool = False) -> list[dict[str, Any]]:
    """Seconds and bytes of every implementation at every length, of peers where that is no matter of minutes."""
    rows = []
    for length in lengths:
        width = case.width if isinstance(case, StateSpace) else case.value
        most = KIMI_PEERS_UP_TO if isinstance(case, KimiDelta) else PEERS_UP_TO
        names = ["hylo", *(PEERS[type(case)] if all_peers or length * case.heads * width <= most else ())]
        functions = {name: run_of(name, case, length) for name in names}
        repeats = 15 if length <= 64 else 7 if length <= 1024 else 3 if length <= 4096 else 1  # minutes, for a peer
        seconds = measure.medians(measure.seconds(functions, repeats, warmup=1 if length <= 4096 else 0))
        del functions
        memory = {name: measure.peak_bytes(run_of, name, case, length, threads=threads) for name in names}
        rows.append({"case": str(case), "length": length, "seconds": seconds, "bytes": memory})
    return rows


def growth(case: Case, short: int, long: int, repeats: int = 3) -> dict[str, Any]:
    """Time a token at `long` over that at `short`, as many tokens of both in turn."""
    short_run, long_run, times = run_of("hylo", case, short), run_of("hylo", case, long), long // short
    functions = {"short": lambda: [short_run() for _ in range(times)], "long": long_run}
    seconds = measure.medians(measure.seconds(functions, repeats))
    ratio = (seconds["long"] / long) / (seconds["short"] / (times * short))
    return {"case": str(case), "short": short, "long": long, "ratio": ratio}


@torch.no_grad()
def step_row(case: Case, repeats: int = 50) -> dict[str, Any]:
    """Seconds a token, of some tokens after each other as decoding has them."""
    functions = {name: partial(_repeat, step_of(name, case)) for name in ("hylo", "transformers")}
    seconds = measure.medians(measure.seconds(functions, repeats, warmup=5))
    return {"case": str(case), "seconds": {name: value / TOKENS for name, value in seconds.items()}}


def _repeat(step: Callable[[], Any]) -> None:
    for _ in range(TOKENS):
        step()


def targets(training: list[dict[str, Any]], growths: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    """One line each, beginning with reached or missed."""
    lines = []

    def say(reached: bool, text: str) -> None:
        lines.append(f"{'reached' if reached else 'missed'}: {text}")

    for row in growths:
        text = f"{row['case']}: time a token at {row['long']} is {row['ratio']:.2f} of that at {row['short']}"
        say(row["ratio"] <= GROWTH, f"{text} (at most {GROWTH})")
    for row in training:
        peers = {name: value for name, value in row["seconds"].items() if name != "hylo"}
        if not peers:
            continue
        faster = min(peers.values()) / row["seconds"]["hylo"]
        least = FASTER if row["case"] == str(GATED_DELTA[2]) and row["length"] == FASTER_AT else 1.0
        say(faster >= least, f"{row['case']}, {row['length']} tokens: {faster:.2f} times as fast (at least {least:g})")
        memory = row["bytes"]["hylo"] / min(value for name, value in row["bytes"].items() if name != "hylo")
        say(memory <= 1.0, f"{row['case']}, {row['length']} tokens: {memory:.2f} of the memory (at most 1)")
    for row in steps:
        faster = row["seconds"]["transformers"] / row["seconds"]["hylo"]
        least = STEP_FASTER if row["case"] == str(GATED_DELTA[2]) else 1.0
        say(faster >= least, f"{row['case']}, one token: {faster:.2f} times as fast (at least {least:g})")
    return lines


def report(console: Console, training: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    for case in dict.fromkeys(row["case"] for row in training):
        own = [row for row in training if row["case"] == case]
        names = list(max(own, key=lambda row: len(row["seconds"]))["seconds"])
        table = []
        for row in own:
            cells = [str(row["length"])]
            for name in names:
                measured = name in row["seconds"]
                cells.append(f"{1e6 * row['seconds'][name] / row['length']:.1f}" if measured else "")
                cells.append(f"{row['bytes'][name] / 2**20:.0f}" if measured else "")
            table.append(cells)
        columns = ["tokens", *(column for name in names for column in (f"{name}, us/token", "MiB"))]
        measure.print_table(console, f"{case}: forward and backward", columns, table)
    if steps:
        table = [[row["case"], *(f"{1e6 * value:.0f}" for value in row["seconds"].values())] for row in steps]
        measure.print_table(console, "one token, with a state, us", ["", *steps[0]["seconds"]], table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["gated-delta", "kimi-delta", "step", "ssd", "latent"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--all-peers", action="store_true", help="at the longest lengths too: minutes for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, lengths = Console(), [int(length) for length in options.lengths.split(",")]

    cases: list[Case] = [*GATED_DELTA] if "gated-delta" in options.only else []
    cases += KIMI_DELTA if "kimi-delta" in options.only else []
    cases += STATE_SPACE if "ssd" in options.only else []
    training, growths, steps = [], [], []
    for case in cases:
        console.print(f"{case} ...")
        training += train_rows(case, lengths, options.threads, options.all_peers)
        if max(lengths) > min(lengths):
            growths.append(growth(case, *((SHORT, LONG) if LONG in lengths else (min(lengths), max(lengths)))))
    if "step" in options.only:
        steps = [step_row(case) for case in (*GATED_DELTA, *KIMI_DELTA, *STATE_SPACE)]
    figures = {"machine": measure.machine(options.threads), "training": training, "growth": growths, "step": steps}
    report(console, training, steps)
    for line in targets(training, growths, steps):
        console.print(line, highlight=False)
    if "latent" in options.only:
        figures["latent"] = latent.rows(threads=options.threads)
        latent.report(console, figures["latent"])
    if options.json:
        measure.write_figures(options.json, figures)


if __name__ == "__main__":
    sys.exit(main())
