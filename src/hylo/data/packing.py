"""Documents in a random order, packed one after the other into rows; all of it from the documents' lengths alone.

A corpus is the tokens of some caches, one after the other, so that a token has one number, its place. What a stage
reads are pieces of it: a document, or what a cut has left of one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from hylo.data.token_cache import Place, TokenCache


class Corpus:
    """The tokens of several caches as one long run; documents are counted through all of them."""

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        self.caches = list(caches)
        self.first = list(accumulate((len(cache.tokens) for cache in caches), initial=0))
        self.first_document = list(accumulate(map(len, caches), initial=0))

    def source(self, place: int) -> int:
        """The number of the cache that a token is of."""
        return bisect_right(self.first, place) - 1

    def read(self, place: int, tokens: int) -> np.ndarray:
        """A view of int32; not over the end of a cache."""
        source = self.source(place)
        begin = place - self.first[source]
        return self.caches[source].tokens[begin : begin + tokens]

    def locate(self, place: int) -> tuple[TokenCache, Place]:
        """The source of a token, and where in it the token stands."""
        source = self.source(place)
        found = self.caches[source].place(place - self.first[source])
        return self.caches[source], found._replace(document=found.document + self.first_document[source])

    def document(self, number: int) -> tuple[int, int]:
        """The place of a document's first token, and how many it has."""
        source = bisect_right(self.first_document, number) - 1
        begin, end = self.caches[source].offsets[number - self.first_document[source] :][:2]
        return int(begin) + self.first[source], int(end - begin)


@dataclass(frozen=True)
class Pieces:
    """Runs of a corpus in the order in which they are read: `places` (M,) int64, `lengths` (M,) int32 or int64."""

    places: np.ndarray
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def shuffled(self, seed: Sequence[int]) -> "Pieces":
        order = np.random.default_rng(seed).permutation(len(self.places))
        return Pieces(self.places[order], self.lengths[order])

    def cut(self, begin: int, end: int) -> "Pieces":
        """The tokens [begin, end) of all, counted in this order; a piece that an edge falls in is divided there."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        low, high = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left") + 1
        places, lengths, ends = self.places[low:high].copy(), self.lengths[low:high].copy(), ends[low:high]
        if end <= begin or not len(places):
            return Pieces(places[:0], lengths[:0])
        lengths[-1] -= max(0, ends[-1] - end)
        skipped = begin - (ends[0] - self.lengths[low])
        places[0] += skipped
        lengths[0] -= skipped
        return Pieces(places, lengths)

    @classmethod
    def joined(cls, parts: Sequence["Pieces"]) -> "Pieces":
        return cls(np.concatenate([p.places for p in parts]), np.concatenate([p.lengths for p in parts]))


class PackedStream:
    """Pieces of a corpus one after the other: len() tokens, of which slices can be taken."""

    def __init__(self, corpus: Corpus, pieces: Pieces) -> None:
        self.corpus, self.pieces = corpus, pieces
        self.ends = np.cumsum(pieces.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: slice) -> np.ndarray:
        begin, end, _ = index.indices(len(self))
        return np.concatenate([self.corpus.read(*span) for span in self.spans(begin, end)], dtype=np.int32)

    def spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The runs (place, tokens) of the corpus that make up the tokens [begin, end) of the stream; no empty one."""
        spans = []
        piece = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            until = min(end, int(self.ends[piece]))
            if until > begin:
                skipped = begin - int(self.ends[piece]) + int(self.pieces.lengths[piece])
                spans.append((int(self.pieces.places[piece]) + skipped, until - begin))
            begin, piece = until, piece + 1
        return spans


def training_pieces(
    cache: TokenCache, first: int, seed: Sequence[int], share: int, most: int, all_of_it: bool
) -> tuple[Pieces, Pieces]:
    """A source's documents in a random order: (to train on, held out), in a corpus where the source begins at `first`.

    Held out are the documents that their source says so of, and of those that it says nothing of the last 1/`share` of
    the tokens, at most `most`, in that random order; with `all_of_it` only the former.
    """
    lengths = np.diff(cache.offsets)
    pieces = Pieces(cache.offsets[:-1] + first, lengths)

    def chosen(kind: int) -> Pieces:
        which = np.flatnonzero((cache.held_out == kind) & (lengths > 0))
        return Pieces(pieces.places[which], pieces.lengths[which])

    open_ones = chosen(-1).shuffled(seed)
    total = open_ones.tokens
    kept = total if all_of_it else total - min(total // share, most)
    train = Pieces.joined([chosen(0), open_ones.cut(0, kept)]).shuffled(seed)
    return train, Pieces.joined([chosen(1), open_ones.cut(kept, total)])
