"""From a model directory to the command line of `vllm serve`: what must fit is checked before anything is started."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import torch

from hylo.errors import HyloError
from hylo.report.names import in_bytes
from hylo.serve.directory import ServedModel
from hylo.serve.memory import ServePlan, plan_serving
from hylo.serve.pages import Platform

CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB; vLLM lets it overrule the flag
OWN_FLAGS = {  # of `vllm serve`, and the option of `hylo serve` that sets them
    "--model": "DIR",
    "--host": "--host",
    "--port": "--port",
    "--served-model-name": "--name",
    "--max-model-len": "--max-model-len",
    "--dtype": "--dtype",
    "--tensor-parallel-size": "--tensor-parallel",
    "--mamba-ssm-cache-dtype": "--state-dtype",
    "--block-size": "--block-size",
    "--kv-cache-memory-bytes": "--cache-memory",
}


@dataclass(frozen=True)
class ServeOptions:
    """What the user chose; None: as the model, the machine or vLLM has it. `cache_bytes` are of one device."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    dtype: str | None = None
    state_dtype: str = "float32"
    tensor_parallel: int = 1
    max_model_len: int | None = None
    block_size: int | None = None
    cache_bytes: int | None = None
    extra: Sequence[str] = ()

    def check(self) -> None:
        """Raises HyloError for flags after `--` that are no flags, or that hylo sets itself."""
        if self.extra and not self.extra[0].startswith("-"):
            raise HyloError(f"{self.extra[0]} is no flag of vllm serve; give one directory, and flags after --")
        for flag in self.extra:
            if own := OWN_FLAGS.get(flag.split("=")[0].replace("_", "-")):
                raise HyloError(f"{flag.split('=')[0]} is set by hylo serve; give {own} before the --")


def this_platform() -> Platform:
    return "cuda" if torch.cuda.is_available() else "cpu"


def plan_here(model: ServedModel, options: ServeOptions) -> ServePlan:
    """The plan for this machine. Raises HyloError for a length above the model's, and a cache too small for it."""
    longest = model.config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise HyloError(f"--max-model-len {options.max_model_len}: {model.name} supports {longest} tokens at most")
    platform, cache_bytes = this_platform(), options.cache_bytes
    memory = torch.cuda.get_device_properties(0).total_memory if platform == "cuda" else None
    if platform == "cpu" and cache_bytes is None:
        cache_bytes = spare_cache_bytes(model, options)

    plan = plan_serving(
        model.config,
        dtype=options.dtype or model.dtype,
        state_dtype=options.state_dtype,
        memory_bytes=memory,
        cache_bytes=cache_bytes,
        tensor_parallel=options.tensor_parallel,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        platform=platform,
        prefix_caching="--no-enable-prefix-caching" not in options.extra,  # vLLM's default
    )
    if cache_bytes is not None and plan.concurrent_requests == 0:  # otherwise an estimate, and vLLM's to judge
        fits = plan.largest_context or 0
        mend = f"give --max-model-len {fits}, or more --cache-memory" if fits else "give more --cache-memory"
        raise HyloError(
            f"a cache of {in_bytes(cache_bytes)} is too small for one sequence of {plan.max_model_len} tokens "
            f"of {model.name}, {fits} fit; {mend}"
        )
    return plan


def spare_cache_bytes(model: ServedModel, options: ServeOptions) -> int:
    """Half of what the machine's free memory leaves beside weights and workspace, for each device.

    vLLM itself would want 92 % of all memory, and give up where that is not free.
    """
    if given := os.environ.get(CPU_CACHE):
        if not given.isdigit():
            raise HyloError(f"{CPU_CACHE}={given} is no number of GiB; set it to a whole number, or unset it")
        return int(given) << 30
    plan = plan_serving(
        model.config,
        dtype=options.dtype or model.dtype,
        state_dtype=options.state_dtype,
        memory_bytes=free_memory() // options.tensor_parallel,
        tensor_parallel=options.tensor_parallel,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        platform="cpu",
        utilization=1.0,
    )
    assert plan.cache_bytes is not None
    return plan.cache_bytes // 2 >> 20 << 20


def free_memory() -> int:
    """Bytes that this machine could hand out without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def serve_command(model: ServedModel, plan: ServePlan, options: ServeOptions) -> list[str]:
    """The server's command line: what the model and the options say. Its program is this environment's."""
    command = [*_program(), str(model.directory)]
    command += ["--served-model-name", options.name or model.name]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--max-model-len", str(plan.max_model_len), "--dtype", plan.dtype]
    if model.has_states:
        command += ["--mamba-ssm-cache-dtype", plan.state_dtype]
    if options.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if options.block_size is not None:
        command += ["--block-size", str(options.block_size)]
    if options.cache_bytes is not None or plan.platform == "cpu":
        command += ["--kv-cache-memory-bytes", str(plan.cache_bytes)]
    if plan.max_num_seqs < plan.step_sequences and "--max-num-seqs" not in options.extra:
        command += ["--max-num-seqs", str(plan.max_num_seqs)]
    return [*command, *options.extra]


def _program() -> list[str]:
    """`vllm serve`; with the package vllm-cpu, whose `vllm` ends for want of one named vllm, what that would run."""
    if "vllm" in packages_distributions().get("vllm", ["vllm"]):
        return [str(Path(sys.executable).with_name("vllm")), "serve"]
    return [sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]


def server_environment(environment: Mapping[str, str], tensor_parallel: int = 1) -> dict[str, str]:
    """The server's: the command line says how large the cache is. What concerns threads only matters on CPUs.

    Threads that wait must soon sleep, as the server's processes share the cores: awake, they made a small model's
    answers 10 times slower on two cores. Several devices of one memory node cannot be bound to nodes of their own, as
    vLLM would have them.
    """
    threads = {"GOMP_SPINCOUNT": "2000"}
    if tensor_parallel > 1:
        each = max(1, len(os.sched_getaffinity(0)) // tensor_parallel)
        threads |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(each)}
    return threads | {key: value for key, value in environment.items() if key != CPU_CACHE}


def as_typed(command: Sequence[str]) -> str:
    """One line that a shell would take; the program by its name alone."""
    return shlex.join([Path(command[0]).name, *command[1:]])
