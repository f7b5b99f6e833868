"""Finished samples of one model on one set, a JSON line each, on disk as they come: what an evaluation goes on from.

CACHE/evaluations/MODEL/SUITE-KEY.jsonl   MODEL: the start of the model's hash; KEY: the start of a hash of all that
                                          fixes an answer; the first line says what that is

One evaluation after another adds to the file: more samples later, or the same model beside others, cost what is new.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hylo.errors import HyloError
from hylo.files import differences, locked
from hylo.ops.kernels import KernelsError

BAD_INPUT = (HyloError, KernelsError)  # no sample is to blame for these: they end the evaluation


class Records(Mapping[str, dict[str, Any]]):
    """Records by key; `add` appends one to the file. Made by `records`."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read(identity)
        else:
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        self._file = path.open("ab", buffering=0)

    def _read(self, identity: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # without a line that a kill cut short
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()] or [identity]
            self._known = {line.pop("key"): line for line in lines}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise HyloError(f"answers {self.path} are damaged ({error}); remove the file") from error
        if not whole:
            self.path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        if unlike := differences(first, json.loads(json.dumps(identity))):
            raise HyloError(f"answers {self.path} are of another evaluation: {unlike[0]}; remove the file")

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Raises HyloError where the disk is full."""
        line, before = (json.dumps({"key": key, **record}) + "\n").encode(), self.path.stat().st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.truncate(self.path, before)
            raise HyloError(f"cannot write {self.path} ({error.strerror}); free the disk and run this again") from error
        self._known[key] = dict(record)

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def close(self) -> None:
        self._file.close()


@contextmanager
def records(model_hash: str, suite: str, identity: Mapping[str, Any], cache: Path | None = None) -> Iterator[Records]:
    """The records of a model on what `identity` (JSON values) fixes. HyloError if another process adds to them."""
    known = {"model": model_hash, "suite": suite, **identity}
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache or evaluations_cache()) / model_hash[:16] / f"{suite}-{key}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HyloError(f"cannot write {path.parent} ({error.strerror}); set HYLO_CACHE to another folder") from error
    with locked(path.with_suffix(".lock"), f"another evaluation is at work on {path}; wait for it"):
        found = Records(path, known)
        try:
            yield found
        finally:
            found.close()


def evaluations_cache() -> Path:
    """$HYLO_CACHE/evaluations, or else ~/.cache/hylo/evaluations."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HYLO_CACHE") or Path(folder) / "hylo") / "evaluations"
