"""What a recipe may say of its data, and what it is told of contradictions."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hylo.data.settings import Data, RetrievalSource, TextSource, source_name

TEXT = {"kind": "text", "paths": ["a.txt"]}
CHAT = {"kind": "jsonl", "paths": ["a.jsonl"], "messages": "messages"}
PAIRS = {"kind": "parquet", "paths": ["a.parquet"], "prompt": "q", "chosen": "good", "rejected": "bad"}


def test_the_short_form_stands_for_sources() -> None:
    data = Data.model_validate({"text": ["python-stdlib", "a.txt"], "held_out": ["b.txt"], "facts": 0.5})
    assert data.sources == [
        TextSource(paths=["python-stdlib", "a.txt"]),
        RetrievalSource(kind="retrieval", share=0.5),
    ]
    assert data.held_out == [TextSource(paths=["b.txt"])] and data.facts == 0.5 and len(data.documents) == 1
    assert Data.model_validate({"text": ["a.txt"], "facts": 0}).facts == 0


def test_what_is_written_out_reads_back() -> None:
    data = Data.model_validate({"sources": [TEXT, CHAT, PAIRS, {"kind": "hub", "dataset": "owner/name"}], "epochs": 2})
    assert Data.model_validate(data.model_dump(mode="json")) == data
    assert [source_name(source) for source in data.documents] == ["text a.txt", "jsonl a.jsonl", "hub owner/name"]
    assert data.documents[2].text == "text" and [s.kind for s in data.preferences] == ["parquet"]


def test_paths_are_taken_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    hubs = [{"kind": "hub", "dataset": "copy"}, {"kind": "hub", "dataset": "owner/name"}]
    data = Data.model_validate({"sources": [TEXT, CHAT, *hubs], "held_out": ["python-stdlib"]}).resolved(tmp_path)
    text, chat, local, distant = data.sources
    assert text.paths == [str(tmp_path / "a.txt")] and chat.paths == [str(tmp_path / "a.jsonl")]
    assert local.dataset == str(tmp_path / "copy") and distant.dataset == "owner/name"
    assert data.held_out[0].paths == ["python-stdlib"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sources": [TEXT], "text": ["a"]}, "write either these or sources"),
        ({"sources": []}, "at least 1"),
        ({"text": []}, "at least 1"),
        ({"text": ["a"], "facts": 2}, "less than or equal to 1"),
        ({"text": ["a"], "txt": 1}, "txt"),
        ({"sources": [TEXT | {"kind": "xml"}]}, "'xml'"),
        ({"sources": [TEXT | {"weight": 0}]}, "greater than 0"),
        ({"sources": [TEXT | {"weight": 1}, CHAT]}, "source 1 of 2 has no weight"),
        ({"sources": [CHAT | {"prompt": "q"}]}, "got messages, prompt"),
        ({"sources": [PAIRS | {"weight": 1}]}, "have no weight"),
        ({"sources": [{"kind": "retrieval", "share": 0.5}]}, "name a source of text beside it"),
        ({"sources": [TEXT, *[{"kind": "retrieval", "share": 0.6}] * 2]}, "come to 1.2"),
        ({"sources": [TEXT], "held_out": [PAIRS]}, "cannot be held out"),
        ({"text": ["a"], "epochs": 0}, "greater than 0"),
    ],
)
def test_contradictions(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Data.model_validate(values)
