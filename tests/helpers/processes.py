"""Several processes that train together, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"]
# As a configuration for FSDP and bf16 would have it; what hylo does is the recipe's affair.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def torchrun(count: int, *arguments: object) -> list[str]:
    """The command that runs a script, or `-m module`, in so many processes."""
    address = ["--nproc-per-node", str(count), "--master-addr", "localhost", "--master-port", str(free_port())]
    return [*TORCHRUN, *address, *map(str, arguments)]


def accelerate(count: int, *arguments: object) -> list[str]:
    address = ["--num_processes", str(count), "--main_process_port", str(free_port())]
    return [*ACCELERATE, *address, *map(str, arguments)]


def run(command: list[str], timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """On one thread each, so that sums are taken in the same order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
