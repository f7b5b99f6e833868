"""Rows read in batches, a record of each as soon as it is read: what needle and intrinsic have in common."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hylo.evaluate.records import BAD_INPUT

BATCH_TOKENS = 8192  # tokens in one forward pass

Record = dict[str, Any]
Read = Callable[[Tensor, list[int]], list[Record]]  # rows (B, T) and their indices -> a record each


class Done(Protocol):
    """What hylo.evaluate.records gives, or `InMemory`."""

    def __contains__(self, key: object, /) -> bool: ...

    def __getitem__(self, key: str, /) -> Record: ...

    def add(self, key: str, record: Mapping[str, Any]) -> None: ...


class InMemory(dict[str, Record]):
    """Records of a model that has no directory."""

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        self[key] = dict(record)


def is_done(done: Done, key: str) -> bool:
    """Whether there is a record; one that says why a row failed does not count, so that it is tried again."""
    return key in done and "error" not in done[key]


def record_rows(
    rows_RT: Tensor, keys: Sequence[str], read: Read, done: Done, advance: Callable[[int], None] = lambda tokens: None
) -> None:
    """Records every row that has no record yet, at most BATCH_TOKENS tokens at a time, or one row where it is longer.

    Batches begin at the same rows however much was done before. A batch that fails, for want of memory or for any other
    reason, is read again in halves; a row that fails alone gets the record {"error": why}. BAD_INPUT is passed on.
    """
    size = max(1, BATCH_TOKENS // rows_RT.shape[1])
    for start in range(0, len(keys), size):
        batch = range(start, min(start + size, len(keys)))
        if missing := [row for row in batch if not is_done(done, keys[row])]:
            _record_batch(rows_RT, missing, keys, read, done, advance)


def _record_batch(
    rows_RT: Tensor, batch: list[int], keys: Sequence[str], read: Read, done: Done, advance: Callable[[int], None]
) -> None:
    began = time.perf_counter()
    try:
        found = read(rows_RT[batch], batch)
    except BAD_INPUT:
        raise
    except Exception as error:  # of whatever class the model's own code raises
        found = [{"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}]
    if len(found) < len(batch):  # outside of the handler, which holds on to the tensors of the failed attempt
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            _record_batch(rows_RT, half, keys, read, done, advance)
        return
    seconds = (time.perf_counter() - began) / len(batch)
    for row, record in zip(batch, found, strict=True):
        done.add(keys[row], record | {"seconds": round(seconds, 4)})
    advance(len(batch) * rows_RT.shape[1])


def row_keys(prefix: str | int, rows: int) -> list[str]:
    return [f"{prefix}/{row}" for row in range(rows)]


def tokens_left(sets: Iterable[tuple[int, Sequence[str]]], done: Done) -> int:
    """Tokens of the rows that have no record; each set is (tokens a row, keys)."""
    return sum(length * sum(not is_done(done, key) for key in keys) for length, keys in sets)


def outcomes(keys: Sequence[str], done: Done) -> tuple[list[Record], list[str]]:
    """The records of the rows that were read, and what was wrong with those that failed."""
    records = [done[key] for key in keys]
    return [r for r in records if "error" not in r], [r["error"] for r in records if "error" in r]


def per_row(keys: Sequence[str], done: Done, value: Callable[[Record], float]) -> list[float | None]:
    """A value of every row, None of one that failed."""
    return [value(done[key]) if is_done(done, key) else None for key in keys]
