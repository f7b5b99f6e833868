"""Training rows: fixed-length windows of a token stream, some with facts planted in them; row i is always the same."""

import numpy as np
import torch
from torch.utils.data import Dataset

from hylo.data.retrieval import FactFormat, fact_row, window
from hylo.errors import HyloError

FACT_SPACING = 40  # tokens of row per fact, whatever the length: the density of facts is what teaches retrieval
REPEATS = 4


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """`rows` rows of `length` tokens: {"input_ids": (T,) int64}.

    With `facts`, a `fact_share` of the rows carries facts, each restated `REPEATS` times (hylo.data.retrieval).
    Row i depends on (seed, i) alone, so a resumed run sees the data that an uninterrupted one would have seen.
    """

    def __init__(
        self,
        stream: np.ndarray,
        length: int,
        rows: int,
        seed: int,
        facts: FactFormat | None = None,
        fact_share: float = 0.0,
    ) -> None:
        if len(stream) < length:
            raise HyloError(f"the text has {len(stream)} tokens, fewer than one sequence of {length}; give more text")
        self.stream, self.length, self.rows, self.seed = stream, length, rows, seed
        self.facts, self.fact_share = facts, fact_share

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        if self.facts is not None and rng.random() < self.fact_share:
            n = max(1, self.length // (FACT_SPACING * REPEATS))
            ids = fact_row(rng, self.stream, self.length, self.facts, n, REPEATS).ids
        else:
            ids = window(rng, self.stream, self.length).astype(np.int64)
        return {"input_ids": torch.from_numpy(ids)}
