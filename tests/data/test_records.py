"""What is read of JSONL, Parquet and the Hub, and what is said of files that cannot be."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from hylo.data.records import read_preferences, read_prompts, read_source
from hylo.data.settings import HubSource, JsonlSource, ParquetSource, TextSource
from hylo.errors import HyloError

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(source: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [document.text for document in read_source(source, tokenizer)]


def test_every_form_of_record(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"body": "plain", "chat": TURNS, "q": "why?", "a": "so"})
    form = {"kind": "jsonl", "paths": [file]}
    assert texts(JsonlSource(**form, text="body"), letters) == ["plain"]
    assert texts(JsonlSource(**form, messages="chat"), letters) == ["[system]s[user]u[assistant]a"]
    assert texts(JsonlSource(**form, prompt="q", answer="a"), letters) == ["[user]why?[assistant]so"]


def test_conversations_in_the_other_spelling(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    source = JsonlSource(kind="jsonl", paths=[jsonl(tmp_path / "a.jsonl", {"c": turns})], messages="c")
    assert texts(source, letters) == ["[user]u[assistant]a"]


def test_without_a_template_messages_are_lines(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, eos_token="<end>")
    source = JsonlSource(kind="jsonl", paths=[jsonl(tmp_path / "a.jsonl", {"c": TURNS})], messages="c")
    assert texts(source, plain) == ["s\nu\na"]
    assert read_prompts(source, plain, [(source.paths[0], 1)]) == {(source.paths[0], 1): "s\nu\n"}


def test_documents_know_their_place(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    (tmp_path / "sub").mkdir()
    first = jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": ""})
    second = jsonl(tmp_path / "sub" / "b.jsonl", {"text": "y"})
    (tmp_path / "other.txt").write_text("not read")
    found = [document[:3] for document in read_source(JsonlSource(kind="jsonl", paths=[str(tmp_path)]), letters)]
    assert found == [(first, 1, "x"), (first, 2, ""), (second, 1, "y")]


def test_parquet_and_a_local_copy_of_a_hub_data_set(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    body = [f"row {i}" for i in range(2500)]
    parquet.write_table(pyarrow.table({"body": body, "n": range(2500)}), tmp_path / "a.parquet", row_group_size=900)
    source = ParquetSource(kind="parquet", paths=[str(tmp_path)], text="body")
    assert texts(source, letters) == body
    assert [document.record for document in read_source(source, letters)] == list(range(1, 2501))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": body})}).save_to_disk(tmp_path / "copy")
    assert texts(HubSource(kind="hub", dataset=str(tmp_path / "copy"), text="body"), letters) == body
    datasets.Dataset.from_dict({"c": [TURNS, TURNS[:2]]}).save_to_disk(tmp_path / "chat")
    chat = HubSource(kind="hub", dataset=str(tmp_path / "chat"), messages="c")
    assert texts(chat, letters) == ["[system]s[user]u[assistant]a", "[system]s[user]u"]
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl", *[{"body": text} for text in body[:3]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        assert texts(HubSource(kind="hub", dataset=str(tmp_path / "files"), text="body"), letters) == body[:3]


def test_prompts_end_where_the_answer_begins(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"c": TURNS}, {"c": TURNS}, {"c": TURNS[:2]})
    source = JsonlSource(kind="jsonl", paths=[file], messages="c")
    expected = "[system]s[user]u[assistant]"
    assert read_prompts(source, letters, [(file, 1), (file, 3)]) == {(file, 1): expected, (file, 3): expected}


def test_preferences(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"q": "why?", "y": "so", "n": "no"}, {"q": "why?", "y": TURNS, "n": TURNS[:2]})
    source = JsonlSource(kind="jsonl", paths=[file], prompt="q", chosen="y", rejected="n")
    prompt = "[user]why?[assistant]"
    assert list(read_preferences(source, letters)) == [
        {"prompt": prompt, "chosen": "so", "rejected": "no"},
        {"prompt": prompt, "chosen": "a", "rejected": "u"},
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "a.jsonl line 2 is not JSON"),
        ("[1]", "a.jsonl line 2 is no JSON object; write one with text"),
        ('{"body": "x"}', "a.jsonl line 2 has no field 'text'; it has body"),
        ('{"text": null}', "a.jsonl line 2: field 'text' holds null, not text"),
        ('{"text": 3}', "a.jsonl line 2: field 'text' holds a number, not text"),
        ("\x00\x01", "a.jsonl line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, letters: PreTrainedTokenizerFast, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(HyloError, match=words) as caught:
        texts(JsonlSource(kind="jsonl", paths=[str(tmp_path / "a.jsonl")]), letters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", ["text", None, [{"role": "user"}], ["text"], [{"role": 1, "content": "x"}]])
def test_bad_messages_are_named(tmp_path: Path, letters: PreTrainedTokenizerFast, messages: Any) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"c": TURNS}, {"c": messages})
    with pytest.raises(HyloError, match="line 2: field 'c' is no list of messages"):
        texts(JsonlSource(kind="jsonl", paths=[file], messages="c"), letters)


def test_a_template_that_refuses(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    strict = PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer, chat_template="{{ raise_exception('roles must alternate') }}"
    )
    file = jsonl(tmp_path / "a.jsonl", {"c": TURNS})
    with pytest.raises(HyloError, match="line 1: the chat template refuses it .roles must alternate"):
        texts(JsonlSource(kind="jsonl", paths=[file], messages="c"), strict)


def test_files_that_hold_nothing_or_are_damaged(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    def refused(source: Any, words: str) -> None:
        with pytest.raises(HyloError, match=words):
            texts(source, letters)

    refused(JsonlSource(kind="jsonl", paths=[str(tmp_path / "no.jsonl")]), "no.jsonl does not exist")
    refused(JsonlSource(kind="jsonl", paths=[str(tmp_path)]), "no .jsonl file in")
    refused(JsonlSource(kind="jsonl", paths=[jsonl(tmp_path / "a.jsonl")]), "a.jsonl holds no records")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = ParquetSource(kind="parquet", paths=[str(tmp_path / "a.parquet")])
    refused(source, "a.parquet is damaged after row 0")
    table = pyarrow.table({"text": [f"{i} {hash(i)}" for i in range(20000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5000)
    whole = (tmp_path / "a.parquet").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 5000] = bytes(5000)
    (tmp_path / "a.parquet").write_bytes(broken)
    refused(source, "a.parquet is damaged after row [1-9]")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    refused(source, "a.parquet row 1 has no field 'text'; it has body")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    refused(source, "a.parquet row 2: field 'text' holds null")
    (tmp_path / "a.txt").write_text("")
    refused(TextSource(paths=[str(tmp_path / "a.txt")]), "no text in .*a.txt")


def test_hub_data_sets_that_cannot_be_loaded(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "copy")
    with pytest.raises(HyloError, match="copy row 1 has no field 'text'; it has body"):
        texts(HubSource(kind="hub", dataset=str(tmp_path / "copy")), letters)
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "split")
    with pytest.raises(HyloError, match="split train, cannot be loaded .*check name, config and split"):
        texts(HubSource(kind="hub", dataset=str(tmp_path / "split")), letters)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HyloError, match="empty, split train, cannot be loaded"):
        texts(HubSource(kind="hub", dataset=str(tmp_path / "empty")), letters)
