"""A batch of prompts as a tree: columns in which rows agree are computed for the first of them alone.

columns   0         a         b          N
row 0     |─────────┬─────────┬──────────|      segments: [0,a) one row, [a,b) two rows, [b,N) three
row 1     |         |         └··────────|      ··: padding, where a row leaves the last of those it agrees with,
row 2     |         └···─────────────────|          so that all rows end in the last column
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STEP = 64  # rows part at multiples of this many columns: fewer, longer forward passes


@dataclass(frozen=True)
class Segment:
    """Columns `start` to `end`, computed for the rows `first`.

    Row i goes on from row `parents[i]` of the segment before, or, where that is None, from row i.
    """

    start: int
    end: int
    first: list[int]
    parents: Tensor | None


@dataclass(frozen=True)
class Tree:
    """Rows in an order in which those that agree are neighbours: row i of ids (B,N) is prompt `rows[i]`.

    The mask (B,N) is 0 on padding; the segments cover all columns, the last one has every row.
    """

    rows: list[int]
    ids_BN: Tensor
    mask_BN: Tensor
    segments: list[Segment]

    @property
    def computed(self) -> int:
        """Columns times rows that a prefill computes."""
        return sum((s.end - s.start) * len(s.first) for s in self.segments)


def make_tree(prompts: Sequence[Sequence[int]]) -> Tree:
    """Of prompts of one token or more."""
    rows = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    arrays = [np.asarray(prompts[i], np.int64) for i in rows]
    shared = [_shared(a, b) for a, b in zip(arrays, arrays[1:], strict=False)]
    width = max(map(len, arrays))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, tokens in enumerate(arrays):
        leaves = max(shared[max(0, i - 1) : i + 1], default=0)
        head, tail = torch.from_numpy(tokens).split([leaves, len(tokens) - leaves])
        ids[i, :leaves], ids[i, width - len(tail) :] = head, tail
        mask[i, :leaves] = mask[i, width - len(tail) :] = 1
    return Tree(rows, ids, mask, list(_segments(shared, width)))


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two rows begin with alike, in steps; each keeps one token at least of its own."""
    most = min(len(a), len(b)) - 1
    unlike = np.flatnonzero(a[:most] != b[:most])
    return int(unlike[0] if len(unlike) else most) // STEP * STEP


def _segments(shared: list[int], width: int) -> Iterator[Segment]:
    """`shared[i]`: columns in which rows i and i + 1 are one."""
    before: list[int] = [0]
    for start, end in _pairs(sorted({0, *shared, width})):
        first = [0, *(i + 1 for i, columns in enumerate(shared) if columns < end)]
        parents = None
        if first != before:
            parents = torch.tensor([sum(row <= i for row in before) - 1 for i in first])
        yield Segment(start, end, first, parents)
        before = first


def _pairs(bounds: list[int]) -> Iterator[tuple[int, int]]:
    return zip(bounds, bounds[1:], strict=False)
