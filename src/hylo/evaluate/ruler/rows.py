"""Rows of a data set: from a file, from a folder that `save_to_disk` or the hub left, or from the hub itself."""

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from hylo.data.records import open_hub
from hylo.data.settings import HubSource
from hylo.errors import HyloError


def local_rows(path: Path, what: str, config: str | None, split: str) -> Any:
    """A list of rows, or what a .json file holds. Raises HyloError, with `what` in it, for what cannot be read."""
    if not path.exists():
        raise HyloError(f"{what} {path} does not exist; check the path")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return hub_rows(str(path), config, split)
    files = _files(path, config, split) if path.is_dir() else [path]
    if not files:
        raise HyloError(f"no .parquet, .jsonl or .json file in {what} {path}; give the published file")
    try:
        parts = [_read(file) for file in files]
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise HyloError(f"{what} {path} is damaged or of another kind ({reason}); restore it") from error
    return parts[0] if len(parts) == 1 else [row for part in parts for row in part]


def hub_rows(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of a split. Raises HyloError if it cannot be loaded."""
    return list(open_hub(HubSource.model_validate({"kind": "hub", "dataset": name, "config": config, "split": split})))


def _files(folder: Path, config: str | None, split: str) -> list[Path]:
    """Of a folder of the hub's, which holds other configurations and splits too, the files of one."""
    for suffix in (".parquet", ".jsonl", ".json"):
        files = sorted(folder.rglob(f"*{suffix}"))
        for part in (config, split):
            files = [file for file in files if part and part in str(file.relative_to(folder))] or files
        if files:
            return files
    return []


def _read(file: Path) -> Any:
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
