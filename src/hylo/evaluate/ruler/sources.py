"""What the tasks are made of beside words: essays, SQuAD and HotpotQA, from local files or from the hub."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hylo.data.settings import STANDARD_LIBRARY
from hylo.data.sources import read_documents, standard_library
from hylo.errors import HyloError
from hylo.evaluate.ruler.rows import hub_rows, local_rows

HUB = {
    "essays": ("baber/paul_graham_essays", None, "train"),
    "squad": ("rajpurkar/squad_v2", None, "validation"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
}
ABBREVIATIONS = frozenset(
    "mr. mrs. ms. dr. prof. st. jr. sr. vs. etc. e.g. i.e. cf. no. fig. al. inc. co. corp.".split()
)


@dataclass(frozen=True)
class Question:
    """`documents` (numbers) hold the answer, `near` are others of the same article; one of `answers` is enough."""

    text: str
    answers: list[str]
    documents: list[int]
    near: list[int]


@dataclass(frozen=True)
class QuestionData:
    """`documents` are different from each other and sorted; `name` says where all this is from."""

    name: str
    questions: list[Question]
    documents: list[str]


class Essays:
    """Running text as words, and where its sentences end."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self._ends = [i + 1 for i in range(len(self.words) - 1) if ends_sentence(self.words[i], self.words[i + 1])]

    def first(self, count: int) -> list[str]:
        """The first `count` words, the whole text over and over where it is shorter."""
        return (self.words * -(-count // len(self.words)))[:count]

    def sentence_ends(self, count: int) -> list[int]:
        """How many of the first `count` words stand before the end of each sentence; the last may be cut short."""
        total = len(self.words)
        ends = [turn * total + end for turn in range(-(-count // total)) for end in [*self._ends, total]]
        return [*ends[: bisect_right(ends, count - 1)], count]


def ends_sentence(word: str, following: str) -> bool:
    """Whether a sentence ends with `word`: a full stop, no abbreviation or initial, before a capital or a figure."""
    bare = word.rstrip("\"')]}”’*_")
    if not bare.endswith((".", "?", "!")) or bare.lower() in ABBREVIATIONS or re.fullmatch(r"\W*[A-Z]\.", bare):
        return False
    start = following.lstrip("\"'([{“‘*_")
    return not start or not start[0].islower()


@dataclass(frozen=True)
class Sources:
    """Where essays and questions come from.

    `essays`: a folder of .txt files, a .txt file, .json with "text", or rows with a field `text`.
    `squad`: the published dev-v2.0.json, or rows as rajpurkar/squad_v2 has them.
    `hotpotqa`: the published hotpot_dev_distractor_v1.json, or rows as hotpotqa/hotpot_qa has them.
    `hub`: load from the hub what is not named.
    `haystack`: a text file, a folder of them, python-stdlib or documents, in place of essays that are not named; the
    results say so.

    Rows are .jsonl or .parquet files, or a folder as `save_to_disk` or the hub leaves it.
    """

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    hub: bool = False
    haystack: Path | Sequence[str] | None = None

    def missing(self, source: str) -> str | None:
        """Why the tasks on a source ("essays", "squad", "hotpotqa") cannot be run; None if they can.

        Raises HyloError for a file that is named and cannot be used.
        """
        if getattr(self, source) is not None or (source == "essays" and self.haystack is not None):
            self._read(source)
            return None
        if not self.hub:
            return f"no {source}: neither a local copy nor the hub ({HUB[source][0]}) was given"
        if source not in self._refused:
            try:
                self._read(source)
            except HyloError as error:
                self._refused[source] = str(error)
        return self._refused.get(source)

    @cached_property
    def _refused(self) -> dict[str, str]:
        """What the hub did not give, and why: it is asked once."""
        return {}

    def essay_words(self) -> Essays:
        return self._essays[0]

    def questions(self, source: str) -> QuestionData:
        """`source` is "squad" or "hotpotqa"."""
        return (self._squad if source == "squad" else self._hotpotqa)[0]

    @property
    def haystack_name(self) -> str:
        """What the results say of the essays."""
        if self.essays is not None or self.haystack is None:
            return "essays"
        return f"stand-in: {self.haystack.name if isinstance(self.haystack, Path) else 'a given text'}"

    def fingerprint(self, source: str | None) -> dict[str, str]:
        """Of the content of a source, {name: hash}; {} of no source."""
        return {} if source is None else {source: self._read(source)[1]}

    def _read(self, source: str) -> tuple[Any, str]:
        found: tuple[Any, str] = getattr(self, f"_{source}")  # which reads it once
        return found

    @cached_property
    def _essays(self) -> tuple[Essays, str]:
        text = " ".join(self._essay_texts())
        if not text.strip():
            raise HyloError(
                f"the essays in {self.essays or self.haystack or HUB['essays'][0]} are empty; give some text"
            )
        return Essays(text), _hash(text)

    def _essay_texts(self) -> list[str]:
        if self.essays is None and self.haystack is not None:
            if not isinstance(self.haystack, Path):
                return list(self.haystack)
            if str(self.haystack) == STANDARD_LIBRARY:
                return standard_library(held_out=True)
            return read_documents(self.haystack)
        if self.essays is not None and _is_text(self.essays):
            return read_documents(self.essays)
        found = self._rows("essays")
        if isinstance(found, dict):
            text = found.get("text")
            if not isinstance(text, str):
                raise HyloError(f"essays {self.essays} have no text; give the benchmark's file or a folder of .txt")
            return [text]
        return [_field(row, "text", str, f"essays {self.essays}") for row in found]

    @cached_property
    def _squad(self) -> tuple[QuestionData, str]:
        return self._data("squad", _published_squad, _squad_rows)

    @cached_property
    def _hotpotqa(self) -> tuple[QuestionData, str]:
        return self._data("hotpotqa", _published_hotpotqa, _hotpotqa_rows)

    def _data(
        self, source: str, published: Callable[[Any], list["_Asked"]], rows: Callable[[Any], list["_Asked"]]
    ) -> tuple[QuestionData, str]:
        found = self._rows(source)
        where = str(getattr(self, source) or HUB[source][0])
        try:
            # both published files differ from rows in the form of what a record holds
            whole = isinstance(found, dict) or (found and isinstance(found[0].get("context"), list))
            asked = (published if whole else rows)(found)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise HyloError(
                f"{source} {where} is not of the published form ({type(error).__name__}: {error}); "
                f"give the published file or a copy of {HUB[source][0]}"
            ) from error
        data = _numbered(where, asked)
        if not data.questions:
            raise HyloError(f"{source} {where} holds no question with an answer; give the published file")
        return data, _hash(json.dumps([data.documents, [vars(question) for question in data.questions]]))

    def _rows(self, source: str) -> Any:
        path: Path | None = getattr(self, source)
        name, config, split = HUB[source]
        return hub_rows(name, config, split) if path is None else local_rows(path, source, config, split)


@dataclass(frozen=True)
class _Asked:
    """A question before documents have numbers."""

    text: str
    answers: list[str]
    documents: list[str]
    near: list[str]


def _published_squad(data: Mapping[str, Any]) -> list[_Asked]:
    return [
        _Asked(
            asked["question"],
            [answer["text"] for answer in asked["answers"]] if not asked["is_impossible"] else [],
            [paragraph["context"]],
            [other["context"] for other in article["paragraphs"]],
        )
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def _squad_rows(rows: list[dict[str, Any]]) -> list[_Asked]:
    articles: dict[str, dict[str, None]] = {}
    for row in rows:
        articles.setdefault(row["title"], {})[row["context"]] = None
    return [
        _Asked(row["question"], list(row["answers"]["text"]), [row["context"]], list(articles[row["title"]]))
        for row in rows
    ]


def _published_hotpotqa(rows: list[dict[str, Any]]) -> list[_Asked]:
    return [
        _Asked(row["question"], [row["answer"]], [_titled(title, parts) for title, parts in row["context"]], [])
        for row in rows
    ]


def _hotpotqa_rows(rows: list[dict[str, Any]]) -> list[_Asked]:
    return [
        _Asked(
            row["question"],
            [row["answer"]],
            [_titled(t, s) for t, s in zip(row["context"]["title"], row["context"]["sentences"], strict=True)],
            [],
        )
        for row in rows
    ]


def _titled(title: str, sentences: list[str]) -> str:
    return f"{title}\n{''.join(sentences)}"


def _numbered(name: str, asked: list[_Asked]) -> QuestionData:
    """Every document once, sorted; questions without an answer serve for their documents alone."""
    documents = sorted({text for question in asked for text in (*question.documents, *question.near)})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for question in asked:
        own = list(dict.fromkeys(number[text] for text in question.documents))
        near = [i for i in dict.fromkeys(number[text] for text in question.near) if i not in own]
        if question.answers:
            questions.append(Question(question.text, question.answers, own, near))
    return QuestionData(name, questions, documents)


def _field(row: dict[str, Any], field: str, kind: type, where: str) -> Any:
    if not isinstance(row.get(field), kind):
        raise HyloError(f"{where}: a row has no field {field!r} with text; it has {', '.join(row) or 'none'}")
    return row[field]


def _is_text(path: Path) -> bool:
    return path.suffix == ".txt" or (path.is_dir() and any(path.rglob("*.txt")))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
