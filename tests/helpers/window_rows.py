"""Training rows without documents: windows of a stream of tokens at random places."""

import numpy as np
import torch
from torch.utils.data import Dataset

from hylo.data.retrieval import window


class WindowRows(Dataset[dict[str, torch.Tensor]]):
    """`rows` rows of `length` tokens: {"input_ids": (T,) int64}; row i depends on (seed, i) alone."""

    def __init__(self, stream: np.ndarray, length: int, rows: int, seed: int) -> None:
        self.stream, self.length, self.rows, self.seed = stream, length, rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        return {"input_ids": torch.from_numpy(window(rng, self.stream, self.length).astype(np.int64))}
