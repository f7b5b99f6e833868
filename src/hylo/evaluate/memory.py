"""What a model's cache holds after reading a row, counted in its tensors: bytes a token, and state."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CHUNK = 4096  # tokens read at once, so that a long row needs no more room than its cache


@torch.no_grad()
def measure_memory(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Of one sequence of `length` tokens, at least 2: {"cache_bytes_per_token", "state_bytes", "total_bytes"}.

    What grows is found from the bytes after half of the tokens and after all; the rest is state. On CUDA also
    "peak_bytes", the most that was allocated while reading, weights included.
    """
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    half, cache = length // 2, None
    held = 0
    for part in (ids[:, :half], ids[:, half:]):
        before = held
        for chunk in part.split(CHUNK, dim=1):
            cache = model.base_model(input_ids=chunk, past_key_values=cache, use_cache=True).past_key_values
        held = cache_bytes(cache)
    grows = (held - before) / (length - half)
    found = {
        "cache_bytes_per_token": int(grows) if grows.is_integer() else grows,
        "state_bytes": round(held - grows * length),
        "total_bytes": held,
    }
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(model.device)} if cuda else {})


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache keeps alive, whatever they are called, and of what views look at."""
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
