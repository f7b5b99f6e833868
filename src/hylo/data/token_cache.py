"""A source's documents as tokens on disk, mapped into memory: tokenised once, read by every stage and process.

    CACHE/KEY/tokens.safetensors       tokens (N,) int32: every document closed by the end-of-text token
    CACHE/KEY/documents.safetensors    offsets (M+1,) int64 into tokens; file (M,) int32; record (M,) int64;
                                       held_out (M,) int8: 1 never trained on, 0 always, -1 undecided
    CACHE/KEY/manifest.json            the source, its files, and the checksums of the two

KEY is a hash of the tokenizer, its template, the source's settings and the name, size and date of all its files, so
that a source that has changed gets another directory. A directory that is damaged is named and made again.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from hylo.data.records import Document, read_source, source_files
from hylo.data.settings import DocumentSource, source_name
from hylo.errors import HyloError
from hylo.files import checksum, complete_directory, read_json, waited_for, write_json

VERSION = 1
HEADER = 256  # bytes before the tokens, with room for any length
BATCH_DOCUMENTS, BATCH_CHARACTERS = 2048, 1 << 22  # tokenised at once
TOKENS, DOCUMENTS, MANIFEST = "tokens.safetensors", "documents.safetensors", "manifest.json"


class Place(NamedTuple):
    """Where a token stands: the document's number, its file and record (from 1), and the token's place in it."""

    document: int
    file: str
    record: int
    token: int


class TokenCache:
    """A cache directory: `tokens`, `offsets`, `file`, `record` and `held_out` as above, and `name` of the source."""

    def __init__(self, directory: Path) -> None:
        manifest = read_json(directory / MANIFEST, "token cache")
        self.directory, self.name, self.files = directory, str(manifest["name"]), list(manifest["files"])
        self.digest = str(manifest["sha256"][TOKENS])
        arrays: dict[str, np.ndarray] = {}
        for file in (TOKENS, DOCUMENTS):
            with safe_open(directory / file, "pt") as held:  # torch's tensors are views of the file
                arrays |= {key: held.get_tensor(key).numpy() for key in held.keys()}
        self.tokens, self.offsets = arrays["tokens"], arrays["offsets"]
        self.file, self.record, self.held_out = arrays["file"], arrays["record"], arrays["held_out"]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.directory,)  # a worker maps the files, it is not sent them

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    def place(self, token: int) -> Place:
        """Which document the `token`-th token is of."""
        document = int(np.searchsorted(self.offsets, token, side="right")) - 1
        file, record = self.files[self.file[document]], int(self.record[document])
        return Place(document, file, record, token - int(self.offsets[document]))


def tokenised(
    source: DocumentSource, tokenizer: PreTrainedTokenizerBase, cache: Path, console: Console | None = None
) -> TokenCache:
    """The source's tokens, read from `cache` or written there first; of several processes one writes.

    Raises HyloError for sources that cannot be read or hold nothing, and if the disk is full.
    """
    directory = cache / _key(source, tokenizer)
    with waited_for(directory.with_suffix(".lock")):  # of several processes one works, the others find it done
        if directory.exists() and (damage := _damage(directory)):
            if console:
                console.print(f"data: {damage} is damaged; {source_name(source)} is tokenised again", style="yellow")
            shutil.rmtree(directory)
        if not directory.exists():
            for left in cache.glob(f".{directory.name}.partial-*"):  # by a process that was killed
                shutil.rmtree(left)
            if console:
                console.print(f"data: tokenising {source_name(source)}")
            _write(source, tokenizer, directory)
            if console:
                held = TokenCache(directory)
                console.print(f"data: {len(held.tokens):,} tokens in {len(held):,} documents")
    return TokenCache(directory)


def _write(source: DocumentSource, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    files: dict[str, int] = {}
    offsets, file, record, held_out = array("q", [0]), array("i"), array("q"), array("b")
    with complete_directory(out) as work:
        with (work / TOKENS).open("wb") as stream:
            stream.write(bytes(HEADER))
            for documents, encoded in _encoded(read_source(source, tokenizer), tokenizer):
                for document, ids in zip(documents, encoded, strict=True):
                    stream.write(ids.tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    file.append(files.setdefault(document.file, len(files)))
                    record.append(document.record)
                    held_out.append(-1 if document.held_out is None else document.held_out)
            stream.seek(0)
            stream.write(_header(offsets[-1]))
        if not offsets[-1]:
            raise HyloError(f"{source_name(source)} holds no text; check its fields, or leave it out")
        arrays = {"offsets": offsets, "file": file, "record": record, "held_out": held_out}
        save_file({name: np.asarray(values) for name, values in arrays.items()}, work / DOCUMENTS)
        manifest = {
            "version": VERSION,
            "name": source_name(source),
            "source": source.model_dump(mode="json", exclude_none=True),
            "tokens": offsets[-1],
            "documents": len(record),
            "files": list(files),
            "sha256": {name: checksum(work / name) for name in (TOKENS, DOCUMENTS)},
        }
        write_json(work / MANIFEST, manifest)


def _encoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Batches of documents with their token ids; while one is tokenised the next is read."""
    encode = _encoder(tokenizer)
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for batch in _batches(documents):
            started = batch, pool.submit(encode, [document.text for document in batch])
            if pending:
                yield pending[0], pending[1].result()
            pending = started
        if pending:
            yield pending[0], pending[1].result()


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Any:
    """texts -> arrays of int32; what has text ends in the end-of-text token, which some templates write themselves."""
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int32)
    backend = _backend(tokenizer) if tokenizer.is_fast else None

    def encode(texts: list[str]) -> list[np.ndarray]:
        if backend is not None:
            ids = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        arrays = [np.array(tokens, np.int32) for tokens in ids]
        return [a if not len(a) or np.array_equal(a[-1:], end) else np.concatenate([a, end]) for a in arrays]

    return encode


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What tokenises, without the cutting and filling that it may have been saved with."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _header(tokens: int) -> bytes:
    """Of a safetensors file with one tensor, padded with spaces: its length is known when all has been written."""
    header = json.dumps({"tokens": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, 4 * tokens]}}).encode()
    return (HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8)


def _key(source: DocumentSource, tokenizer: PreTrainedTokenizerBase) -> str:
    words = _backend(tokenizer).to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source_files(source)]
    settings = source.model_dump(mode="json", exclude={"weight"})
    parts = [VERSION, words, tokenizer.eos_token_id, tokenizer.chat_template, settings, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _damage(directory: Path) -> Path | None:
    """The first file that is not what was written."""
    try:
        sums = read_json(directory / MANIFEST, "token cache")["sha256"]
        for name in (TOKENS, DOCUMENTS):
            if checksum(directory / name) != sums[name]:
                return directory / name
        TokenCache(directory)
    except (HyloError, OSError, KeyError, TypeError, SafetensorError):
        return directory / MANIFEST
    return None
