"""The Hugging Face path, timed: one forward pass over the prompts, then a token a step from the cache."""

import time
from pathlib import Path
from typing import Any

import torch

from hylo.checkpoint import check_dtype
from hylo.modeling.loading import load_model
from hylo.serve.child import prompts, run
from hylo.serve.latency import Job, Point, measured


class GenerateSession:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(Path(job.directory), check_dtype(job.dtype), self.device)
        self.about: dict[str, Any] = {}

    @torch.inference_mode()
    def measure(self, length: int, concurrency: int) -> Point:
        repeats = []
        for repeat in range(-self.job.warmup, self.job.repeats):
            ids = prompts(self.job, length, concurrency, self.model.config.vocab_size, repeat)
            tokens, cache = torch.tensor(ids, device=self.device), None
            start, times = time.perf_counter(), []
            for _ in range(self.job.new_tokens):
                output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            if repeat >= 0:
                repeats.append([times])  # the rows go together
        return measured((length, concurrency), repeats, cache_bytes=_bytes_of(cache))


def _bytes_of(cache: Any) -> int:
    """Of every tensor that transformers' cache holds."""
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def main() -> None:
    run(GenerateSession)
