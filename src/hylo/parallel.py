"""The processes that train one model together, as torchrun or `accelerate launch` started them; often there is one.

Every function may be called in a single process, where it costs nothing. With several, all of them must call `start`,
`barrier`, `any_process`, `first` and `from_main`, and in the same order.
"""

import atexit
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hylo.errors import HyloError

# What `accelerate launch` hands on of its own configuration, where the recipe and hylo.distill.sharding decide.
OVERRULED = ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION", "DYNAMO_BACKEND")
PATIENCE = timedelta(hours=12)  # how long a process waits for another, as while the first one converts a model


def start() -> None:
    """Joins the group of processes that the launcher's environment (RANK, WORLD_SIZE, ...) describes, if it does."""
    for name in OVERRULED:
        os.environ.pop(f"ACCELERATE_{name}", None)
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    atexit.register(end)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Tensors on the CPU (flags, objects) go over gloo, so that a barrier does not spin on the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def end() -> None:
    """Leaves the group; the others go on."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; the first, 0, is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Returns once all processes are here."""
    if dist.is_initialized():
        any_process(False)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any of the processes; the same answer in all of them."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(int(flag))
    with _together():
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def first(value: Any) -> Any:
    """The value of the first process whose own is not None, in all of them; anything that pickle knows."""
    if not dist.is_initialized():
        return value
    values: list[Any] = [None] * world_size()
    with _together():
        dist.all_gather_object(values, value)
    return next((value for value in values if value is not None), None)


def from_main(value: Any) -> Any:
    """What the first process gave, in all of them; anything that pickle knows."""
    if not dist.is_initialized():
        return value
    values = [value]
    with _together():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what is wrong is the other's to say
        raise HyloError(
            f"process {rank()} waits in vain for another, which has ended; see what that one said"
        ) from error
