"""How a recipe's files become one set of keys: what it extends, what is set on the command line, where paths point.

A relative path is taken from the folder of the file that it stands in. Mappings are merged key by key, everything else,
lists too, is replaced. A model is a directory, or a name on the Hugging Face Hub, `owner/name`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hylo.data.settings import STANDARD_LIBRARY
from hylo.errors import HyloError

MODELS = ("base", "teacher")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_values(path: Path, overrides: Sequence[str] = (), folder: Path | None = None) -> dict[str, Any]:
    """The keys of the recipe in `path` over those of what it extends, with every `a.b=c` of `overrides` set; no nulls.

    Relative paths in `overrides` are taken from `folder`, or else from the recipe's own.
    Raises HyloError, in one line, for a file that is missing or no mapping, for a circle, and for what cannot be set.
    """
    values = _merged(path, ())
    if values:
        for override in overrides:
            _set(values, override)
        _absolute(values, folder or path.parent)  # what the command line has set
    return _without_nulls(values)


def read_yaml(path: Path, what: str, asked: str = "") -> dict[str, Any]:
    """The keys of a YAML file; HyloError, in one line, where it has none. `what` it is, and who `asked` for it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HyloError(f"{what} {path}{asked} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyloError(f"{what} {path}{asked} cannot be read ({error}); check the file") from error
    except yaml.YAMLError as error:
        raise HyloError(f"{what} {path} is not YAML ({' '.join(str(error).split())}); mend the file") from error
    if values is not None and not isinstance(values, dict):
        raise HyloError(f"{what} {path} holds no keys; write a mapping such as `base: ...`")
    return values or {}


def dump_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def is_hub_name(path: Path) -> bool:
    """Whether a recipe's model is still to come from the Hub: directories are absolute paths."""
    return not path.is_absolute()


def snapshot(name: Path, weights: bool = True) -> Path:
    """The directory of a model from the Hub, downloaded if it is not there yet. Raises HyloError if it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.jinja", "tokenizer.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name.as_posix(), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise HyloError(
            f"model {name} is no directory here and cannot be had from the Hub ({reason}); "
            "write the path of a copy, or mend the name, the connection or the login (hf auth login)"
        ) from error


def _merged(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        circle = " extends ".join(str(file) for file in (*children[children.index(path) :], path))
        raise HyloError(f"recipe {circle}: a circle; remove one `extends`")
    values = read_yaml(path, "recipe", f", which {children[-1]} extends," if children else "")
    _absolute(values, path.parent)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise HyloError(f"recipe {path}: extends: {parent!r} is no path; write that of one recipe")
    return _merge(_merged(path.parent / parent, (*children, path)), values)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(parent.get(key), dict)
        merged[key] = _merge(parent[key], value) if both else value
    return merged


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """null is how a recipe takes away a key of the one that it extends."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _set(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise HyloError(f"--set {override}: write KEY=VALUE, e.g. stages.0.tokens=1000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HyloError(f"--set {override}: {text!r} is not YAML ({' '.join(str(error).split())})") from error
    inside: Any = values
    for depth, key in enumerate(keys):
        at, last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(inside, list):
            if not key.isdecimal() or int(key) >= len(inside):
                indices = f"its items are 0 to {len(inside) - 1}" if inside else "it is empty"
                raise HyloError(f"--set {override}: {at} is a list without {key!r}; {indices}")
            where: Any = int(key)
        elif isinstance(inside, dict):
            where = key
            if not last:
                inside.setdefault(key, {})
        else:
            raise HyloError(f"--set {override}: {at} is {inside!r} and holds no {key!r}; set {at} itself")
        if last:
            inside[where] = value
        else:
            inside = inside[where]


def _absolute(values: dict[str, Any], folder: Path) -> None:
    """Paths in place; base and teacher stay as they are where they name a model of the Hub."""
    for key in MODELS:
        if isinstance(value := values.get(key), str):
            directory = (folder / value).resolve()
            if directory.is_dir() or not HUB_NAME.fullmatch(value):
                values[key] = str(directory)
    if "data" in values:
        values["data"] = _data_absolute(values["data"], folder)


def _data_absolute(data: Any, folder: Path) -> Any:
    """The same with the paths of sources made absolute, wherever they stand in it; other things are left to Data."""

    def absolute(path: Any) -> Any:
        known = not isinstance(path, str) or path == STANDARD_LIBRARY
        return _data_absolute(path, folder) if known else str((folder / path).resolve())

    if isinstance(data, list):
        return [_data_absolute(item, folder) for item in data]
    if not isinstance(data, dict):
        return data
    made = {key: _data_absolute(value, folder) for key, value in data.items()}
    for key in ("text", "held_out", "paths"):
        if isinstance(made.get(key), list):
            made[key] = [absolute(item) for item in made[key]]
    if isinstance(name := made.get("dataset"), str) and (folder / name).is_dir():
        made["dataset"] = str((folder / name).resolve())
    return made
