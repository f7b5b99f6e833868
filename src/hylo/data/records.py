"""Documents out of text, JSONL, Parquet and the Hub, one at a time, each with the place that it comes from."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hylo.data.settings import (
    STANDARD_LIBRARY,
    DocumentSource,
    HubSource,
    JsonlSource,
    RecordSource,
    TextSource,
    source_name,
)
from hylo.data.sources import no_text, read_text, standard_library_files, standard_library_holds_out, text_files
from hylo.errors import HyloError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DATE = "26 Jul 2024"  # some templates write today's date, which would make tomorrow's tokens differ
BATCH = 1024  # records read at once


class Document(NamedTuple):
    """`record` counts the lines or records of `file` from 1; `held_out` is None where nothing has decided it yet."""

    file: str
    record: int
    text: str
    held_out: bool | None = None


class Record(NamedTuple):
    file: str
    number: int
    fields: dict[str, Any]
    unit: str  # what `number` counts

    @property
    def place(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


def read_source(source: DocumentSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """The documents of a source in its own order. Raises HyloError that names the file, the line and the field."""
    if isinstance(source, TextSource):
        yield from _texts(source)
        return
    for record in read_records(source):
        yield Document(record.file, record.number, render(record, source, tokenizer))


def read_prompts(
    source: RecordSource, tokenizer: PreTrainedTokenizerBase, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], str]:
    """Of some records, by file and number, the conversation up to where the last answer begins."""
    wanted, prompts = set(wanted), {}
    for record in read_records(source):
        if (place := (record.file, record.number)) in wanted:
            turns = _turns(record, source)
            while turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            prompts[place] = _through_template(tokenizer, turns, record, opens_answer=True)
    return prompts


def read_preferences(source: RecordSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, str]]:
    """{"prompt", "chosen", "rejected"} of every record: the prompt as `render` writes it, the answers as they are.

    An answer may be a conversation, of which the last message counts.
    """
    assert source.prompt and source.chosen and source.rejected
    for record in read_records(source):
        turns = [{"role": "user", "content": _text(record, source.prompt)}]
        yield {
            "prompt": _through_template(tokenizer, turns, record, opens_answer=True),
            "chosen": _answer(record, source.chosen),
            "rejected": _answer(record, source.rejected),
        }


def render(record: Record, source: RecordSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """A record as one text; conversations and questions through the chat template, if the tokenizer has one."""
    if source.text:
        return _text(record, source.text)
    return _through_template(tokenizer, _turns(record, source), record, opens_answer=False)


def read_records(source: RecordSource) -> Iterator[Record]:
    """Records in order. Raises HyloError for files that are absent, empty or corrupt, with the line or row."""
    if isinstance(source, HubSource):
        yield from _hub(source)
        return
    for file in source_files(source):
        number = 0
        for record in (_jsonl if isinstance(source, JsonlSource) else _parquet)(file, source.columns):
            number = record.number
            yield record
        if not number:
            raise HyloError(f"{file} holds no records; restore the file or leave it out")


def source_files(source: DocumentSource) -> list[Path]:
    """The files that a source is read from; of a data set from the Hub those of its local copy."""
    if isinstance(source, TextSource):
        parts = [standard_library_files() if p == STANDARD_LIBRARY else text_files(Path(p)) for p in source.paths]
        return [file for part in parts for file in part]
    if isinstance(source, HubSource):
        return [Path(file["filename"]) for file in open_hub(source).cache_files]
    files = []
    for path in map(Path, source.paths):
        if not path.exists():
            raise HyloError(f"{source.kind} {path} does not exist; check the path")
        found = sorted(path.rglob(f"*.{source.kind}")) if path.is_dir() else [path]
        if not found:
            raise HyloError(f"no .{source.kind} file in {path}; check the path")
        files += found
    return files


def open_hub(source: HubSource) -> Any:
    """The datasets.Dataset of a source: a directory that save_to_disk wrote, or what load_dataset makes of its name."""
    import datasets

    datasets.disable_progress_bars()
    try:
        directory = Path(source.dataset)
        if (directory / "state.json").exists() or (directory / "dataset_dict.json").exists():
            held = datasets.load_from_disk(source.dataset)
            return held[source.split] if isinstance(held, datasets.DatasetDict) else held
        return datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HyloError(
            f"{source_name(source)}, split {source.split}, cannot be loaded ({reason}); "
            "check name, config and split, or name the directory of a local copy"
        ) from error


def _texts(source: TextSource) -> Iterator[Document]:
    for path in source.paths:
        if path == STANDARD_LIBRARY:
            for file in standard_library_files():
                text = file.read_text(encoding="utf-8", errors="replace")
                yield Document(str(file), 1, text, standard_library_holds_out(file))
            continue
        empty = True
        for file in text_files(Path(path)):
            text = read_text(file)
            empty = empty and not text
            yield Document(str(file), 1, text)
        if empty:
            raise no_text(Path(path))


def _jsonl(file: Path, columns: list[str]) -> Iterator[Record]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise HyloError(f"{file} line {number} is not JSON ({error}); mend the line or remove it") from None
                if not isinstance(fields, dict):
                    raise HyloError(f"{file} line {number} is no JSON object; write one with {', '.join(columns)}")
                yield Record(str(file), number, fields, "line")
    except OSError as error:
        raise HyloError(f"{file} cannot be read ({error.strerror}); check the file") from error


def _parquet(file: Path, columns: list[str]) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            named = table.schema_arrow.names
            if missing := [name for name in columns if name not in named]:
                raise HyloError(f"{file} row 1 has no field {missing[0]!r}; it has {', '.join(named)}")
            for batch in table.iter_batches(BATCH, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(str(file), number, fields, "row")
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HyloError(f"{file} is damaged after row {number} ({reason}); restore the file or leave it out") from error


def _hub(source: HubSource) -> Iterator[Record]:
    held = open_hub(source)
    name = source_name(source)
    if missing := [column for column in source.columns if column not in held.column_names]:
        raise HyloError(f"{name} row 1 has no field {missing[0]!r}; it has {', '.join(held.column_names)}")
    if not len(held):
        raise HyloError(f"{name} holds no records; check its split {source.split}")
    number = 0
    for batch in held.select_columns(source.columns).iter(BATCH):
        for values in zip(*(batch[column] for column in source.columns), strict=True):
            number += 1
            yield Record(name, number, dict(zip(source.columns, values, strict=True)), "row")


def _text(record: Record, field: str) -> str:
    if field not in record.fields:
        raise HyloError(f"{record.place} has no field {field!r}; it has {', '.join(record.fields) or 'none'}")
    value = record.fields[field]
    if not isinstance(value, str):
        raise HyloError(f"{record.place}: field {field!r} holds {_kind(value)}, not text; mend it or remove the record")
    return value


def _answer(record: Record, field: str) -> str:
    if isinstance(record.fields.get(field), list):
        turns = _messages(record, field)
        return turns[-1]["content"] if turns else ""
    return _text(record, field)


def _turns(record: Record, source: RecordSource) -> list[dict[str, str]]:
    """A record as a conversation of {"role", "content"}."""
    if source.messages:
        return _messages(record, source.messages)
    assert source.prompt and source.answer
    return [
        {"role": "user", "content": _text(record, source.prompt)},
        {"role": "assistant", "content": _text(record, source.answer)},
    ]


def _messages(record: Record, field: str) -> list[dict[str, str]]:
    if field not in record.fields:
        raise HyloError(f"{record.place} has no field {field!r}; it has {', '.join(record.fields) or 'none'}")
    turns, messages = [], record.fields[field]
    for message in messages if isinstance(messages, list) else [messages]:
        turn = message if isinstance(message, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise HyloError(
                f"{record.place}: field {field!r} is no list of messages with role and content (or from and value); "
                "mend it or remove the record"
            )
        turns.append({"role": ROLES.get(role, role), "content": content})
    return turns


def _through_template(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], record: Record, opens_answer: bool
) -> str:
    """A conversation as text; without a template, as base models have none, its messages one a line."""
    from jinja2 import TemplateError

    if not turns:
        return ""
    if not tokenizer.chat_template:
        return "\n".join(turn["content"] for turn in turns) + "\n" * opens_answer
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opens_answer, date_string=DATE
        )
    except TemplateError as error:
        raise HyloError(f"{record.place}: the chat template refuses it ({error}); mend or remove the record") from None
    assert isinstance(text, str)
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
