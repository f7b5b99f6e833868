"""A stage's rows: packed from its part of every source, mixed by weight, some with facts planted in them.

Row i depends on the settings and on i alone, whoever asks for it and in whatever order: nothing has a state, so a
resumed run, another number of workers and another number of processes all read the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from hylo.data.packing import PackedStream
from hylo.data.retrieval import FactFormat, fact_row
from hylo.errors import HyloError

FACT_SPACING = 40  # tokens of row per fact, whatever the length: the density of facts is what teaches retrieval
REPEATS = 4
GOLDEN = 11400714819323198485  # 2^64 divided by the golden ratio


@dataclass(frozen=True)
class Pool:
    """Sources that are packed together, and their share of the rows."""

    name: str
    weight: float
    stream: PackedStream


class Row(NamedTuple):
    """What row i is made of: `spans` are runs (place, tokens) of a pool's corpus; facts are planted in their text."""

    pool: int
    epoch: int
    spans: list[tuple[int, int]]
    facts: bool


class MixedRows(Dataset[dict[str, torch.Tensor]]):
    """`count` rows of `length` tokens: {"input_ids": (T,) int64}, with `boundaries` also {"position_ids": (T,) int64}.

    position_ids begin at 0 where a row and where a document begins. A row with facts is one document. `fact_share` of
    the rows have facts, the others are of the `pools` by their weights: row i is where i times the golden ratio falls
    among the shares, so that any run of rows holds them to within a row or two. Raises HyloError if a pool has fewer
    rows than it is asked for in `epochs`.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        length: int,
        count: int,
        seed: int,
        facts: FactFormat | None = None,
        fact_share: float = 0.0,
        boundaries: bool = True,
        epochs: int = 1,
    ) -> None:
        self.pools, self.length, self.seed = list(pools), length, seed
        self.facts, self.boundaries = facts, boundaries
        self.weights = np.array([pool.weight for pool in pools]) / sum(pool.weight for pool in pools)
        shares = np.cumsum([fact_share, *(1 - fact_share) * self.weights])
        bounds = np.minimum(shares[:-1] * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
        offset = np.random.default_rng(seed).integers(0, 2**64, dtype=np.uint64)
        with np.errstate(over="ignore"):
            drawn = np.arange(count, dtype=np.uint64) * GOLDEN + offset
        self.kinds = np.searchsorted(bounds, drawn, side="right").astype(np.uint8)  # 0 facts, else the pool's, from 1
        self.order = np.empty(count, np.int64)  # how many rows of its kind come before a row
        for kind in range(len(pools) + 1):
            of_kind = np.flatnonzero(self.kinds == kind)
            self.order[of_kind] = np.arange(len(of_kind))
            if kind:
                self._check(self.pools[kind - 1], len(of_kind), epochs)
        self._epochs: dict[int, Epoch] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, ids = self._read(index)
        item = {"input_ids": torch.from_numpy(ids)}
        if self.boundaries:
            positions = np.arange(self.length)
            if not row.facts:
                lengths = np.array([tokens for _, tokens in row.spans])
                positions -= np.repeat(np.cumsum(lengths) - lengths, lengths)
            item["position_ids"] = torch.from_numpy(positions)
        return item

    def row(self, index: int) -> Row:
        """What a row is made of."""
        return self._read(index)[0]

    def candidates(self, place: int, tokens: int) -> list[int]:
        """The rows that tokens [place, place + tokens) of the corpus are in, and all rows with facts, in order."""
        found = set(np.flatnonzero(self.kinds == 0).tolist())
        for pool, held in enumerate(self.pools):
            of_pool = np.flatnonzero(self.kinds == pool + 1)
            per_epoch = len(held.stream) // self.length
            for number in range(-(-len(of_pool) // per_epoch)):
                epoch = self._epoch(pool, number)
                pieces, ends = epoch.stream.pieces, epoch.stream.ends
                for piece in np.flatnonzero(
                    (pieces.places < place + tokens) & (pieces.places + pieces.lengths > place)
                ):
                    begin, end = int(ends[piece] - pieces.lengths[piece]), int(ends[piece])
                    packed = np.arange(begin // self.length, min(-(-end // self.length), per_epoch))
                    orders = number * per_epoch + np.flatnonzero(np.isin(epoch.rows, packed))
                    found.update(of_pool[orders[orders < len(of_pool)]].tolist())
        return sorted(found)

    def _read(self, index: int) -> tuple[Row, np.ndarray]:
        kind, order = int(self.kinds[index]), int(self.order[index])
        if kind == 0:
            return self._fact_row(index)
        number, begin, stream = self._packed(kind - 1, order)
        spans = stream.spans(begin, begin + self.length)
        ids = np.concatenate([stream.corpus.read(*span) for span in spans], dtype=np.int64)
        return Row(kind - 1, number, spans, facts=False), ids

    def _packed(self, pool: int, order: int) -> tuple[int, int, PackedStream]:
        """The epoch, and where in its stream the `order`-th row of a pool begins."""
        stream = self.pools[pool].stream
        number, order = divmod(order, len(stream) // self.length)
        epoch = self._epoch(pool, number)
        return number, int(epoch.rows[order]) * self.length, epoch.stream

    def _epoch(self, pool: int, number: int) -> "Epoch":
        stream, epoch = self.pools[pool].stream, self._epochs.get(pool)
        if epoch is None or epoch.number != number:
            seed = (self.seed, pool, number)
            shuffled = PackedStream(stream.corpus, stream.pieces.shuffled(seed))
            rows = np.random.default_rng(seed).permutation(len(stream) // self.length)
            self._epochs[pool] = epoch = Epoch(number, shuffled, rows)
        return epoch

    def _fact_row(self, index: int) -> tuple[Row, np.ndarray]:
        assert self.facts is not None
        rng = np.random.default_rng((self.seed, index))
        pool = int(np.searchsorted(np.cumsum(self.weights)[:-1], rng.random(), side="right"))
        text = _Noted(self.pools[pool].stream)
        n = max(1, self.length // (FACT_SPACING * REPEATS))
        ids = fact_row(rng, text, self.length, self.facts, n, REPEATS).ids
        return Row(pool, 0, text.stream.spans(text.begin, text.end), facts=True), ids

    def _check(self, pool: Pool, rows: int, epochs: int) -> None:
        held = len(pool.stream)
        if held < self.length:
            raise HyloError(
                f"{pool.name}: the text has {held:,} tokens, fewer than one sequence of {self.length:,}; give more text"
            )
        if rows > (most := epochs * (held // self.length)):
            times = "once" if epochs == 1 else f"{epochs} times"
            raise HyloError(
                f"{pool.name}: the stage reads {rows * self.length:,} tokens, and there are {most * self.length:,} in "
                f"whole sequences of {self.length:,}, read {times}; give more text, lower tokens, or raise data.epochs"
            )


class Epoch(NamedTuple):
    """One reading of a pool: its documents in an order of their own, and the order in which the packed rows are read.

    Rows that are packed side by side may share a document; read side by side, they would make a poor batch.
    """

    number: int
    stream: PackedStream
    rows: np.ndarray


class _Noted:
    """A stream that remembers which slice was taken of it."""

    def __init__(self, stream: PackedStream) -> None:
        self.stream, self.begin, self.end = stream, 0, 0

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: slice) -> np.ndarray:
        self.begin, self.end, _ = index.indices(len(self.stream))
        return self.stream[index]
