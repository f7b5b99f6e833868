"""Writes tensors as they come into safetensors shards of limited size, so that memory holds one shard and no model."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hylo.checkpoint import INDEX, WEIGHTS

SHARD_BYTES = 1 << 29


class ShardWriter:
    """`add` tensors, then `finish`: one model.safetensors, or numbered shards with an index."""

    def __init__(self, directory: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory, self.dtype, self.shard_bytes = directory, dtype, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * self.dtype.itemsize
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        # cloned when nothing was cast, or a small view would keep (or write) all of what it views
        tensor = tensor.detach().to(self.dtype, copy=True).contiguous()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            self._shard_path(0).rename(self.directory / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for i, tensor_names in enumerate(self._shards):
            shard = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._shard_path(i).rename(self.directory / shard)
            weight_map |= dict.fromkeys(tensor_names, shard)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        path = self._shard_path(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error  # complete_directory tells of a full disk and of its own directory
        path.chmod(0o644)  # safetensors writes for the owner alone
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, i: int) -> Path:
        return self.directory / f"shard-{i}.safetensors"
