"""Tokens on disk: what is in them, when they are made again, and that nobody else is sent their memory."""

import json
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from hylo.data import records, sources, token_cache
from hylo.data.settings import JsonlSource, TextSource
from hylo.data.sources import token_stream
from hylo.data.token_cache import TokenCache, tokenised
from hylo.errors import HyloError

TEXTS = ["first", "", "the third is longer", "é and 漢字 <end>", "x" * 200]


@pytest.fixture
def source(tmp_path: Path) -> JsonlSource:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return JsonlSource(kind="jsonl", paths=[str(path)])


def one_directory(cache: Path) -> Path:
    return next(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("batch", [1, 2, 2048])
def test_tokens_are_those_of_the_tokenizer(
    source: JsonlSource,
    letters: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    monkeypatch.setattr(token_cache, "BATCH_DOCUMENTS", batch)
    held = tokenised(source, letters, tmp_path / "cache")
    assert len(held) == len(TEXTS) and held.tokens.dtype == np.int32
    for i, text in enumerate(TEXTS):
        ids = letters(text, add_special_tokens=False).input_ids
        expected = ids if not ids or ids[-1] == 256 else [*ids, 256]  # text that ends so already is not closed twice
        assert held.tokens[held.offsets[i] : held.offsets[i + 1]].tolist() == expected
    assert held.record.tolist() == [1, 2, 3, 4, 5] and held.file.tolist() == [0] * 5


def test_place_of_a_token(source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    held = tokenised(source, letters, tmp_path / "cache")
    assert held.place(0) == (0, source.paths[0], 1, 0)
    assert held.place(5) == (0, source.paths[0], 1, 5)
    assert held.place(6) == (2, source.paths[0], 3, 0)  # the second document is empty
    assert held.place(len(held.tokens) - 1) == (4, source.paths[0], 5, 200)


def test_files_are_plain_safetensors(source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    held = tokenised(source, letters, tmp_path / "cache")
    directory = one_directory(tmp_path / "cache")
    assert (load_file(directory / "tokens.safetensors")["tokens"] == held.tokens).all()
    assert json.loads((directory / "manifest.json").read_text())["tokens"] == len(held.tokens)
    assert sorted(path.name for path in directory.iterdir()) == [
        "documents.safetensors",
        "manifest.json",
        "tokens.safetensors",
    ]


def test_tokenised_once(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenised(source, letters, tmp_path / "cache")
    monkeypatch.setattr(token_cache, "_write", None)  # a second call would fail
    assert tokenised(source.model_copy(update={"weight": 2.0}), letters, tmp_path / "cache").digest == first.digest


def test_of_several_processes_one_writes(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [], token_cache._write
    monkeypatch.setattr(token_cache, "_write", lambda *given: (calls.append(1), write(*given)))
    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(lambda _: tokenised(source, letters, tmp_path / "cache"), range(4)))
    assert len(calls) == 1 and len({each.digest for each in held}) == 1


def test_what_a_killed_process_has_left_is_removed(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = tokenised(source, letters, tmp_path / "cache").directory
    left = directory.rename(directory.with_name(f".{directory.name}.partial-abc"))
    (left / "manifest.json").unlink()
    assert tokenised(source, letters, tmp_path / "cache").directory == directory
    assert not left.exists()


def test_another_source_tokenizer_or_template_is_another_entry(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def entries() -> int:
        return sum(path.is_dir() for path in (tmp_path / "cache").iterdir())

    def other(**settings: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, **settings)

    for tokenizer in (letters, other(eos_token="<end>"), other(eos_token="a", chat_template="x"), other()):
        tokenised(source, tokenizer, tmp_path / "cache")
    assert entries() == 4
    os.utime(source.paths[0], ns=(1, 1))
    tokenised(source, letters, tmp_path / "cache")
    assert entries() == 5


def test_truncation_and_padding_of_a_saved_tokenizer_are_ignored(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = tokenised(source, letters, tmp_path / "cache")
    letters.backend_tokenizer.enable_truncation(3)
    letters.backend_tokenizer.enable_padding(length=300)
    assert tokenised(source, letters, tmp_path / "cache").directory == expected.directory
    letters.backend_tokenizer.enable_truncation(3)
    assert tokenised(source, letters, tmp_path / "another").digest == expected.digest


@pytest.mark.parametrize("file", ["tokens.safetensors", "documents.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_named_and_made_again(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path, file: str, damage: str
) -> None:
    expected = tokenised(source, letters, tmp_path / "cache").tokens.copy()
    path = one_directory(tmp_path / "cache") / file
    whole = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        whole[len(whole) // 2] ^= 0x80
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole)
    console = Console(file=StringIO(), width=1000)
    assert (tokenised(source, letters, tmp_path / "cache", console).tokens == expected).all()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "is damaged" in said and (file in said or damage == "gone")


def test_a_source_that_fails_leaves_nothing(
    source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    Path(source.paths[0]).write_text('{"text": "x"}\n{"text": 1}\n')
    with pytest.raises(HyloError, match="line 2"):
        tokenised(source, letters, tmp_path / "cache")
    Path(source.paths[0]).write_text('{"text": ""}\n')
    with pytest.raises(HyloError, match="a.jsonl holds no text"):
        tokenised(source, letters, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_full_disk_leaves_nothing(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(HyloError, match="cannot write .*; free space"):
            tokenised(TextSource(paths=[str(tmp_path / "a.txt")]), letters, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_pickle_holds_the_path_alone(source: JsonlSource, letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    held = tokenised(source, letters, tmp_path / "cache")
    sent = pickle.dumps(held)
    assert len(sent) < 400
    again: TokenCache = pickle.loads(sent)
    assert (again.tokens == held.tokens).all()


def test_the_standard_library_keeps_its_own_split(
    letters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = sources.standard_library_files()
    files = [*of[:8], *[file for file in of if sources.standard_library_holds_out(file)][:2]]
    for module in (sources, records):
        monkeypatch.setattr(module, "standard_library_files", lambda: files)
    held = tokenised(TextSource(paths=["python-stdlib"]), letters, tmp_path / "cache")
    mine = np.repeat(held.held_out == 1, np.diff(held.offsets))
    assert 0 < mine.sum() < len(mine)
    assert (held.tokens[mine] == token_stream(letters, sources.standard_library(True))).all()
    assert (held.held_out >= 0).all()
