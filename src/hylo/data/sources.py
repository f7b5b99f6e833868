"""Where text comes from: files, folders, or the Python standard library; and its form as one stream of tokens."""

import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hylo.data.settings import STANDARD_LIBRARY
from hylo.errors import HyloError

HELD_OUT_SHARE = 20  # one document in twenty, or a twentieth of the tokens
SUFFIXES = {".txt", ".md", ".rst", ".py"}


def whole_stream(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> np.ndarray:
    """All tokens of the sources, for text that was set aside as a whole; of the standard library its held-out part."""
    parts = [
        standard_library(held_out=True) if source == STANDARD_LIBRARY else read_documents(Path(source))
        for source in sources
    ]
    return token_stream(tokenizer, [document for part in parts for document in part])


def standard_library(held_out: bool) -> list[str]:
    """The running Python's own library as documents, without its tests; split by path, so alike on every machine.

    The library's licence (PSF) lets everyone use and redistribute the text; nothing is downloaded.
    """
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for path in standard_library_files()
        if standard_library_holds_out(path) == held_out
    ]


def standard_library_files() -> list[Path]:
    """The files of `standard_library`, both parts, in the order of their paths."""
    root = _standard_library()
    unwanted = ("site-packages", "test", "idlelib", "encodings", "lib2to3")
    return [
        p for p in sorted(root.rglob("*.py")) if not any(part in p.relative_to(root).as_posix() for part in unwanted)
    ]


def standard_library_holds_out(path: Path) -> bool:
    """Whether a file of the standard library is never trained on."""
    return zlib.crc32(path.relative_to(_standard_library()).as_posix().encode()) % HELD_OUT_SHARE == 0


def read_documents(path: Path) -> list[str]:
    """A text file as one document, or every .txt, .md, .rst and .py file below a folder, in the order of their paths.

    Raises HyloError if there is no such path, no text below it, or a file that is not UTF-8.
    """
    documents = [read_text(file) for file in text_files(path)]
    if not any(documents):
        raise no_text(path)
    return documents


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files below a folder. Raises HyloError if there is no such path."""
    if not path.exists():
        raise HyloError(f"text {path} does not exist; give a file, a folder, or {STANDARD_LIBRARY}")
    return sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HyloError(f"text {file} is not readable UTF-8 ({error}); convert it or leave it out") from error


def no_text(path: Path) -> HyloError:
    return HyloError(f"no text in {path}; looked for {', '.join(sorted(SUFFIXES))} files that are not empty")


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """All documents one after the other, each closed by the end-of-text token: (tokens,) int32."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False).input_ids
    return np.array([token for ids in encoded for token in [*ids, *end]], np.int32)


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
