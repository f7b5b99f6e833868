"""Scores on disk as they come, a file each, so that a selection that was stopped goes on where it was."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hylo.distill import signals
from hylo.errors import HyloError
from hylo.files import differences, read_json, write_json

IDENTITY = "identity.json"


class Records:
    """JSON objects by key (`kl/round-1/layer-3`) in FOLDER/`kl.round-1.layer-3.json`; `folder` None keeps them in
    memory.

    `identity` is what fixes them: settings and the models' hashes. Raises HyloError where the folder has another's.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        ours = json.loads(json.dumps(identity or {}))
        if (folder / IDENTITY).exists():
            theirs = read_json(folder / IDENTITY, "records of a selection")
            if unlike := differences(theirs, ours):
                raise HyloError(
                    f"{folder.parent} holds a selection with other settings: {unlike[0]}; give these, or another --out"
                )
        else:
            write_json(folder / IDENTITY, ours)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was recorded under a key, None if nothing was."""
        if key not in self._known and self.folder is not None and self._path(key).exists():
            self._known[key] = read_json(self._path(key), "record of a selection")
        return self._known.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Records JSON values, aside and then renamed; returns them as a second run would read them."""
        self._known[key] = json.loads(json.dumps(record))
        if self.folder is not None:
            with signals.held():  # a signal waits for the file to be whole
                write_json(self._path(key), self._known[key])
        return self._known[key]

    def timed(self, key: str, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What was recorded under a key, or else what `read` finds, with the "seconds" that it took."""
        if (known := self.get(key)) is not None:
            return known
        began = time.perf_counter()
        found = read()
        return self.add(key, {**found, "seconds": time.perf_counter() - began})

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.replace('/', '.')}.json"
