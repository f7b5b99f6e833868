"""One forward pass of many rows, stopped at the final hidden states: logits are made only where they are needed."""

import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hylo.evaluate.subject import PRECISIONS, Subject

TILE_LOGITS = 2**22  # logits in memory at once (16 MiB in float32)
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
KEPT_SHARE = 0.25  # of main memory, for what a teacher has said


class Scorer:
    """A causal language model seen as final hidden states and an output head; a `Subject` is loaded when first used.

    `hidden` gives what the head reads (after the final norm), in the model's precision; `head` is float32.
    """

    def __init__(self, source: PreTrainedModel | Subject) -> None:
        self.source = source

    @property
    def config(self) -> PreTrainedConfig:
        return self.source.config

    @cached_property
    def model(self) -> PreTrainedModel:
        return (self.source.model if isinstance(self.source, Subject) else self.source).eval()

    @cached_property
    def head(self) -> Tensor:
        """(V, D)"""
        return self.model.get_output_embeddings().weight.detach().float()

    @cached_property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.source.device)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.source.precision] if isinstance(self.source, Subject) else self.source.dtype

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states of rows without padding: (B, T) -> (B, T, D)."""
        return self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) in float32."""
        return hidden.float() @ self.head.T


class Teacher(Scorer):
    """A scorer that computes the hidden states of a row once, whatever number of students is held against them.

    They are kept in main memory while they fit in `room` bytes, a quarter of the machine's; others are computed anew.
    """

    def __init__(self, source: PreTrainedModel | Subject, room: int | None = None) -> None:
        super().__init__(source)
        self.room = int(KEPT_SHARE * _main_memory()) if room is None else room
        self._known: dict[bytes, Tensor] = {}

    @property
    def hash(self) -> str | None:
        return self.source.hash if isinstance(self.source, Subject) else None

    def remembered(self, ids: Tensor) -> Tensor:
        """As `hidden`."""
        keys = [row.tobytes() for row in ids.cpu().numpy()]
        if all(key in self._known for key in keys):
            return torch.stack([self._known[key] for key in keys]).to(self.device)
        hidden = self.hidden(ids)
        for key, row in zip(keys, hidden, strict=True):
            if key not in self._known and row.nbytes <= self.room:
                self._known[key] = row.to("cpu", copy=True)
                self.room -= row.nbytes
        return hidden


def _main_memory() -> int:
    """Bytes of the machine, or as many as a container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total
