"""What `hylo convert` costs at real size: seconds and peak memory, beside its reading, SVDs and writing done alone.

    python benchmarks/conversion.py [--case NAME ...] [--json FILE] [--threads 2] [--work DIR] [--keep]

Makes random bf16 checkpoints of real geometries, converts each in a process of its own and watches its anonymous memory
(RssAnon in /proc, so Linux only; mapped file pages are not in it). The peers run on the same files with the same
threads: every tensor copied out of safetensors, `torch.linalg.svd` of every matrix that the layout factors, as many
bytes written as the conversion writes, and transformers loading the whole base. Before each the page cache is emptied
of the files and the disk is idle. Disk needed: twice the base, of the largest case (13 GB), given back at the end.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hylo.plan import Plan, make_plan

GIB = 1 << 30
ALLOWANCE = 1.5 * GIB  # on top of the largest layer's working set
SHARD = GIB // 2  # of the checkpoints made here
SAMPLE_SECONDS = 0.02


def llama(hidden: int, layers: int, intermediate: int, heads: int, head_dim: int) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": rope | {"original_max_position_embeddings": 8192},
    }


def qwen3(hidden: int, layers: int, intermediate: int, heads: int) -> dict[str, Any]:
    return llama(hidden, layers, intermediate, heads, 128) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
    }


@dataclass(frozen=True)
class Case:
    """`config`: the base's config.json. Targets on two cores, where one is set."""

    name: str
    config: dict[str, Any]
    layout: str
    target_seconds: float | None = None
    target_gib: float | None = None


CASES = [
    Case("Qwen3-1.7B", qwen3(2048, 28, 6144, 16), "7MLA21GDN", 90, 4),
    Case("Llama-3.2-3B", llama(3072, 28, 8192, 24, 128), "14MLA14GDN", 240, 5),
    Case("Llama-3.2-1B", llama(2048, 16, 8192, 32, 64), "4MLA12GDN"),
    Case("Llama-3.2-1B, twice as deep", llama(2048, 32, 8192, 32, 64), "8MLA24GDN"),  # memory must not follow depth
]
SHALLOW, DEEP = CASES[2].name, CASES[3].name


# -- checkpoints ------------------------------------------------------------------------------------------------------


def base_directory(case: Case, work: Path) -> Path:
    return work / case.name.replace(",", "").replace(" ", "-")


def make_base(case: Case, directory: Path, shard_bytes: int = SHARD) -> None:
    """Writes the case's random checkpoint, shard by shard; what an earlier run left whole is kept."""
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case.config, indent=1))
    # One block of noise serves all: each tensor starts elsewhere in it, and no matrix that is factored outgrows it.
    block = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    for shard, tensors in enumerate(_shards(base_shapes(case.config), shard_bytes)):
        name = f"model-{shard:05d}.safetensors"
        if not (directory / name).exists():
            values = {tensor: _random(tensor, shape, block) for tensor, shape in tensors.items()}
            save_file(values, directory / f"{name}.partial", metadata={"format": "pt"})
            (directory / f"{name}.partial").rename(directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def base_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a base's tensors, as transformers builds it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    tied = "lm_head.weight" if config["tie_word_embeddings"] else ""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != tied}


def _shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def _random(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=block.dtype)
    count = torch.Size(shape).numel()
    start = sum(name.encode()) * 7919 % len(block)
    first = block[start : start + count]
    whole, rest = divmod(count - len(first), len(block))
    return torch.cat((first, *[block] * whole, block[:rest])).view(shape)


# -- a process, watched -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Seconds by the wall clock and of the processors; the most anonymous memory of the process and its children."""

    seconds: float
    user_seconds: float
    system_seconds: float
    peak_bytes: int


def watch(command: list[str], threads: int) -> Run:
    """Runs a command and samples its memory every 20 ms. Raises RuntimeError with what it printed if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as printed:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        peak, ended = 0, threading.Event()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(SAMPLE_SECONDS):
                peak = max(peak, anonymous_bytes(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        sampler.join()
        if process.returncode:
            printed.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{printed.read().decode(errors='replace')[-4000:]}")
    return Run(seconds, usage.ru_utime, usage.ru_stime, peak)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its descendants; 0 once it has ended."""
    total = 0
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        total = sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(anonymous_bytes(int(child)) for child in children.read_text().split())
    return total


# -- peers ------------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_all(base: Path) -> None:
    """Every tensor of a directory, copied out of its file, one at a time."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                file.get_tensor(name).clone()


def write_all(path: Path, total: int) -> None:
    """As many bytes, 64 MiB at a time."""
    block = torch.empty(1 << 26, dtype=torch.uint8).random_().numpy().data
    with path.open("wb", buffering=0) as file:
        for start in range(0, total, len(block)):
            file.write(block[: total - start])


def svd_shapes(plan: Plan) -> list[tuple[int, int]]:
    """What one MLA layer factors: the queries, and the keys' unrotated rows stacked on the values."""
    config, geometry = plan.base_config, plan.geometry
    key_and_value = geometry["qk_nope_head_dim"] + geometry["v_head_dim"]
    queries = (config.num_attention_heads * config.head_dim, config.hidden_size)
    return [queries, (config.num_key_value_heads * key_and_value, config.hidden_size)]


def factor_all(plan: Plan) -> None:
    matrices = [torch.randn(shape) for shape in svd_shapes(plan)]
    for _ in range(plan.mixers.count("mla")):
        for matrix in matrices:
            torch.linalg.svd(matrix, full_matrices=False)


LOAD = """
import sys, torch, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
"""


# -- measuring --------------------------------------------------------------------------------------------------------


def working_set(plan: Plan) -> dict[str, int]:
    """Bytes that the costliest layer needs at once if nothing is held longer than it must be, by what needs them.

    A layer that is converted holds the base's attention and the new mixer, both in float32, and LAPACK's space for the
    larger factorisation of M x N, k = min(M, N): its copies of the matrix (2 M N), U and V (k (M + N)) and gesdd's
    work space (4 k k + 7 k). The embedding is one tensor that passes through whole, in the dtype written.
    """
    config = plan.base_config
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = {
        "base attention": 4 * heads * config.head_dim * config.hidden_size,
        "mixer": 4 * max(layer.mixer_parameters for layer in plan.layers),
        "svd": 4
        * max(2 * m * n + (m + n) * min(m, n) + 4 * min(m, n) ** 2 + 7 * min(m, n) for m, n in svd_shapes(plan)),
    }
    if "mla" not in plan.mixers:
        layer["svd"] = 0
    embedding = {"embedding": 2 * config.vocab_size * config.hidden_size}
    return max(layer, embedding, key=lambda parts: sum(parts.values()))


def measure(case: Case, work: Path, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes the case's base under `work` if it is not there, and measures the conversion and its peers."""
    base, out, scratch = base_directory(case, work), work / "converted", work / "scratch"
    say(f"{case.name}: making the checkpoint")
    make_base(case, base)
    plan = make_plan(base, case.layout)
    hylo = [sys.executable, "-m", "hylo", "convert", str(base), str(out), "--layout", case.layout]
    shutil.rmtree(out, ignore_errors=True)
    try:
        say(f"{case.name}: starting up (dry run)")
        start_up = watch([*hylo, "--dry-run"], threads)
        say(f"{case.name}: converting")
        _settle(base)
        conversion = watch(hylo, threads)
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        shutil.rmtree(out)
        say(f"{case.name}: reading")
        _settle(base)
        read = timed(lambda: read_all(base))
        say(f"{case.name}: factoring")
        svd = timed(lambda: factor_all(plan))
        say(f"{case.name}: writing")
        _settle(base)
        write = timed(lambda: write_all(scratch, written))
        scratch.unlink()
        say(f"{case.name}: loading with transformers")
        _settle(base)
        load = watch([sys.executable, "-c", LOAD, str(base)], threads)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        scratch.unlink(missing_ok=True)
    needed = working_set(plan)
    bound = ALLOWANCE + sum(needed.values())
    return {
        "case": case.name,
        "layout": case.layout,
        "conversion": asdict(conversion),
        "read_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "written_bytes": written,
        "start_up": asdict(start_up),
        "read_seconds": read,
        "svd_seconds": svd,
        "svd_shapes": svd_shapes(plan),
        "svd_layers": plan.mixers.count("mla"),
        "write_seconds": write,
        "ratio": conversion.seconds / (read + svd + write),
        "ratio_without_start_up": (conversion.seconds - start_up.seconds) / (read + svd + write),
        "transformers_load": asdict(load),
        "working_set_bytes": needed,
        "targets": [
            {"what": what, "limit": limit, "measured": measured, "unit": unit, "reached": measured <= limit}
            for what, limit, measured, unit in (
                ("time", case.target_seconds, conversion.seconds, "s"),
                ("peak memory", case.target_gib, conversion.peak_bytes / GIB, "GiB"),
                ("peak memory, 1.5 GiB + working set", bound / GIB, conversion.peak_bytes / GIB, "GiB"),
            )
            if limit is not None
        ],
    }


def _settle(base: Path) -> None:
    """Waits for writes under way and drops the base from the page cache, so that each run reads from the disk."""
    os.sync()
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# -- printing ---------------------------------------------------------------------------------------------------------


def depth_growth(results: list[dict[str, Any]]) -> float | None:
    """Peak memory of the twice as deep model over that of the model, if both were measured."""
    peaks = {result["case"]: result["conversion"]["peak_bytes"] for result in results}
    return peaks[DEEP] / peaks[SHALLOW] if SHALLOW in peaks and DEEP in peaks else None


def report(console: Console, results: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table()
    table.add_column("")
    for result in results:
        table.add_column(f"{result['case']}\n{result['layout']}", justify="right")

    def row(label: str, figure: Callable[[dict[str, Any]], str], end: bool = False) -> None:
        table.add_row(label, *map(figure, results), end_section=end)

    row("hylo convert, s", lambda r: f"{r['conversion']['seconds']:.1f}")
    row("  processor, s", lambda r: f"{r['conversion']['user_seconds'] + r['conversion']['system_seconds']:.1f}")
    row("  peak RssAnon, GiB", lambda r: f"{r['conversion']['peak_bytes'] / GIB:.2f}")
    row("  read, GiB", lambda r: f"{r['read_bytes'] / GIB:.2f}")
    row("  written, GiB", lambda r: f"{r['written_bytes'] / GIB:.2f}", end=True)
    row("alone: read, s", lambda r: f"{r['read_seconds']:.1f}")
    row("alone: SVDs, s", lambda r: f"{r['svd_seconds']:.1f}")
    row("alone: write, s", lambda r: f"{r['write_seconds']:.1f}")
    row("convert / (read + SVDs + write)", lambda r: f"{r['ratio']:.2f}")
    row("alone: start-up (dry run), s", lambda r: f"{r['start_up']['seconds']:.1f}")
    row("  ratio without it", lambda r: f"{r['ratio_without_start_up']:.2f}", end=True)
    row("transformers loads the base, s", lambda r: f"{r['transformers_load']['seconds']:.1f}")
    row("  peak RssAnon, GiB", lambda r: f"{r['transformers_load']['peak_bytes'] / GIB:.2f}")
    console.print(table)
    for result in results:
        parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in result["working_set_bytes"].items())
        console.print(f"{result['case']}: largest working set, GiB: {parts}")
        for target in result["targets"]:
            verdict = "[green]reached[/]" if target["reached"] else "[red]missed[/]"
            figures = f"{target['measured']:.2f} of {target['limit']:.2f} {target['unit']}"
            console.print(f"  {target['what']}: {figures}, {verdict}")
    if growth := depth_growth(results):
        console.print(f"twice the depth: peak memory x {growth:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine's facts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, metavar="DIR", help="for checkpoints (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in --work for the next run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, facts = Console(), machine(arguments.threads)
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conversion-")))
        status = stack.enter_context(console.status(""))
        for case in CASES:
            if arguments.case and case.name not in arguments.case:
                continue
            results.append(measure(case, work, arguments.threads, status.update))
            if not arguments.keep:
                shutil.rmtree(base_directory(case, work))
    report(console, results, facts)
    if arguments.json:
        figures = {"machine": facts, "cases": results, "peak_at_twice_the_depth": depth_growth(results)}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
