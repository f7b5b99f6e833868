"""The text that needles are hidden in and perplexity is measured on, as a model's own tokenizer cuts it up."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hylo.data.retrieval import FactFormat
from hylo.data.sources import whole_stream
from hylo.evaluate.subject import Subject

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
_read: dict[tuple[str, ...], "HeldOut"] = {}


@dataclass(frozen=True)
class HeldOut:
    """`stream` (tokens,) and the parts of the facts that are planted in it."""

    stream: np.ndarray
    facts: FactFormat

    @cached_property
    def digest(self) -> str:
        """Of everything that rows are made from."""
        digest = hashlib.sha256(np.ascontiguousarray(self.stream).tobytes())
        digest.update(json.dumps(asdict(self.facts)).encode())
        return digest.hexdigest()


def held_out(subject: Subject, text: Sequence[str]) -> HeldOut:
    """Files, folders or python-stdlib, tokenised once for all models that have the same tokenizer.

    Raises HyloError for text that is not there or not readable, and for a model without a tokenizer.
    """
    tokenizer = subject.tokenizer
    key = (_tokenizer_digest(subject.directory), *text)
    if key not in _read:
        _read[key] = HeldOut(whole_stream(tokenizer, text), FactFormat.of(tokenizer))
    return _read[key]


def _tokenizer_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    return digest.hexdigest()
