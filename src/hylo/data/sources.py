"""Where text comes from: a file, a folder, or the Python standard library; and its form as one stream of tokens."""

import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 20  # one document in twenty


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


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """All documents one after the other, each closed by the end-of-text token: (tokens,) int32."""
    stream: list[int] = []
    for document in documents:
        stream.extend(tokenizer.encode(document, add_special_tokens=False))
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    return np.array(stream, np.int32)
