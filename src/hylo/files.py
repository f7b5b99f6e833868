"""Output directories and files that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hylo.errors import HyloError


@contextlib.contextmanager
def complete_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    Raises HyloError if `out` exists, or if the disk is full or not writable.
    """
    if out.exists():
        raise HyloError(f"{out} exists already; choose another output directory or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield partial
        partial.chmod(0o755)
        sync(partial)
        os.rename(partial, out)
        _sync(out.parent)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_files(source: Path, directory: Path, without: Sequence[str] = ()) -> None:
    """The files of one directory in another too, without taking room again where the disk can do that.

    `without` names files, by pattern, that are left out. A linked file is to be replaced, never written into.
    """

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:  # another disk, or one without links
            shutil.copy2(file, copy)

    ignore = shutil.ignore_patterns(*without)
    shutil.copytree(source, directory, copy_function=link, ignore=ignore, dirs_exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise _cannot_write(path, error) from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; `what` names it in the error line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HyloError(f"{what} {path} does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HyloError(f"{what} {path} is not readable JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise HyloError(f"{what} {path} holds no JSON object; restore the file")
    return value


def checksum(path: Path) -> str:
    """sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Every place where two JSON values differ: `stages.0.tokens is 1000 there, 2000 here`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{path}.{key}", theirs.get(key), ours.get(key)) for key in theirs | ours]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True))]
    else:
        return [] if theirs == ours else [f"{path.lstrip('.')} is {theirs} there, {ours} here"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a lock file, which goes with the process; raises HyloError(`busy`) if another one holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HyloError(busy) from None
        yield


@contextlib.contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Holds a lock file, when whoever holds it has let it go. Raises HyloError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _cannot_write(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def sync(directory: Path) -> None:
    """Sees to it that a directory and all that is in it survive a power cut."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> HyloError:
    return HyloError(f"cannot write {path}: {error.strerror or error}; free space or choose a writable place")
