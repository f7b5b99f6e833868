"""Held-out text is tokenised once a tokenizer, and its digest covers all that rows are made from."""

import shutil
from dataclasses import replace
from pathlib import Path

from hylo.evaluate.held_out import held_out
from hylo.evaluate.subject import Subject


def test_once_a_tokenizer(tiny_base: Path, text_file: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    for directory in (same, other):
        shutil.copytree(tiny_base, directory)
    file = other / "tokenizer.json"
    text = file.read_text()
    file.write_text(text[: text.index('"merges"')] + '"merges": []}}')  # every character a token
    first = held_out(Subject("a", tiny_base), (str(text_file),))
    assert held_out(Subject("b", same), (str(text_file),)) is first
    assert len(held_out(Subject("c", other), (str(text_file),)).stream) > len(first.stream)


def test_the_digest_covers_text_and_facts(tiny_base: Path, text_file: Path) -> None:
    text = held_out(Subject("a", tiny_base), (str(text_file),))
    others = [replace(text, stream=text.stream[:-1]), replace(text, facts=replace(text.facts, suffix=[1]))]
    assert len({text.digest, *(other.digest for other in others)}) == 3
    assert replace(text).digest == text.digest
