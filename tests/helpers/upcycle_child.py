"""`hylo upcycle` in a process of its own, on one thread, with what it prints in RUN.log."""

import os
from pathlib import Path

import torch

from hylo.cli import main


def upcycle(recipe: str, run: str) -> None:
    torch.set_num_threads(1)
    with Path(run).with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    main(["upcycle", recipe, "--out", run])
