"""From a model directory's tensors to vLLM's fused and sharded ones."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

Loaded = tuple[str, Tensor, Any]  # the engine's name, the tensor, which part of a fused one it is


def part_loader(sizes: Sequence[int]) -> Callable[[Any, Tensor, int], None]:
    """For a parameter that stacks parts of these sizes (rows over all devices), each cut by device."""
    devices, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()

    def load(parameter: Any, part: Tensor, index: int) -> None:
        start, size = sum(sizes[:index]) // devices, sizes[index] // devices
        own = parameter.data[start : start + size]
        own.copy_(part[rank * size : (rank + 1) * size].view_as(own))

    return load
