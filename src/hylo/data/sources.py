"""Where text comes from: files, folders, or the Python standard library; and its form as one stream of tokens."""

import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hylo.errors import HyloError

STANDARD_LIBRARY = "python-stdlib"
HELD_OUT_SHARE = 20  # one document in twenty, or the last twentieth of the tokens
SUFFIXES = {".txt", ".md", ".rst", ".py"}


def training_stream(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> np.ndarray:
    """Tokens to train on: the sources without what `held_out_stream` takes from them. (tokens,) int32."""
    return _stream(tokenizer, sources, held_out=False)


def held_out_stream(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> np.ndarray:
    """Tokens never trained on: a twentieth of the standard library's documents, the last twentieth of other sources."""
    return _stream(tokenizer, sources, held_out=True)


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
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in ("site-packages", "test", "idlelib", "encodings", "lib2to3")):
            continue
        if (zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0) == held_out:
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
    return documents


def read_documents(path: Path) -> list[str]:
    """A text file as one document, or every .txt, .md, .rst and .py file below a folder, in the order of their paths.

    Raises HyloError if there is no such path, no text below it, or a file that is not UTF-8.
    """
    if not path.exists():
        raise HyloError(f"text {path} does not exist; give a file, a folder, or {STANDARD_LIBRARY}")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise HyloError(f"text {file} is not readable UTF-8 ({error}); convert it or leave it out") from error
    if not any(documents):
        raise HyloError(f"no text in {path}; looked for {', '.join(sorted(SUFFIXES))} files that are not empty")
    return documents


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """All documents one after the other, each closed by the end-of-text token: (tokens,) int32."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False).input_ids
    return np.array([token for ids in encoded for token in [*ids, *end]], np.int32)


def _stream(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], held_out: bool) -> np.ndarray:
    parts = []
    for source in sources:
        if source == STANDARD_LIBRARY:
            parts.append(token_stream(tokenizer, standard_library(held_out)))
        else:
            tokens = token_stream(tokenizer, read_documents(Path(source)))
            cut = len(tokens) - len(tokens) // HELD_OUT_SHARE
            parts.append(tokens[cut:] if held_out else tokens[:cut])
    return np.concatenate(parts)
