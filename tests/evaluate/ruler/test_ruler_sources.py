"""Essays and questions from every form that they are published or stored in, held to what lm-eval reads."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from ruler_sources import write_sources

from hylo.errors import HyloError
from hylo.evaluate.ruler import Sources
from hylo.evaluate.ruler.sources import Essays, QuestionData, ends_sentence


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("published"))


def squad_rows(published: Sources) -> list[dict[str, Any]]:
    assert published.squad
    return [
        {
            "id": asked["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {
                "text": [answer["text"] for answer in asked["answers"]],
                "answer_start": [answer["answer_start"] for answer in asked["answers"]],
            },
        }
        for article in json.loads(published.squad.read_text())["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def hotpotqa_rows(published: Sources) -> list[dict[str, Any]]:
    assert published.hotpotqa
    return [
        row | {"context": {"title": [t for t, _ in row["context"]], "sentences": [s for _, s in row["context"]]}}
        for row in (
            {key: value for key, value in row.items() if key != "supporting_facts"}
            for row in json.loads(published.hotpotqa.read_text())
        )
    ]


def same(data: QuestionData, other: QuestionData) -> bool:
    return (data.questions, data.documents) == (other.questions, other.documents)


@pytest.mark.parametrize("source", ["squad", "hotpotqa"])
def test_published_files_read_as_in_lm_eval(source: str, published: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.ruler.qa_utils")
    monkeypatch.setattr(theirs, "download_json", lambda file: json.loads(Path(file).read_text()))
    questions, documents = getattr(theirs, f"read_{source}")(str(getattr(published, source)))
    data = published.questions(source)
    assert data.documents == documents and len(documents) >= 8
    assert [
        {"query": q.text, "outputs": q.answers, "context": q.documents, "more_context": q.near} for q in data.questions
    ] == [{"more_context": []} | question for question in questions]


@pytest.mark.parametrize("source", ["squad", "hotpotqa"])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved splits", "hub folder", "hub"])
def test_rows_read_as_the_published_file(
    form: str, source: str, published: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (squad_rows if source == "squad" else hotpotqa_rows)(published)
    held = datasets.Dataset.from_list(rows)
    path: Path | None = tmp_path / "copy"
    assert path
    if form == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        path = path.with_suffix(".parquet")
        held.to_parquet(path)
    elif form == "saved":
        held.save_to_disk(path)
    elif form == "saved splits":
        datasets.DatasetDict({"train": held.select([0]), "validation": held}).save_to_disk(path)
    elif form == "hub folder":
        config = "squad_v2" if source == "squad" else "distractor"
        for folder, split, part in (
            (config, "validation-00000-of-00002", held.select(range(3))),
            (config, "validation-00001-of-00002", held.select(range(3, len(rows)))),
            (config, "train-00000-of-00001", held.select([0])),
            *([("fullwiki", "validation-00000-of-00001", held.select([1]))] if source == "hotpotqa" else []),
        ):
            (path / folder).mkdir(parents=True, exist_ok=True)
            part.to_parquet(path / folder / f"{split}.parquet")
        (path / "dataset_infos.json").write_text("{}")
    else:
        path, asked = None, []

        def load(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
            asked.append((name, config, split))
            return held

        monkeypatch.setattr(datasets, "load_dataset", load)
    sources = Sources(**{source: path}, hub=path is None)
    assert sources.missing(source) is None
    assert same(sources.questions(source), published.questions(source))
    assert sources.fingerprint(source) == published.fingerprint(source)
    if path is None:
        wanted = {
            "squad": ("rajpurkar/squad_v2", None, "validation"),
            "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
        }
        assert asked == [wanted[source]]  # once


@pytest.mark.parametrize("form", ["folder", "txt", "json", "jsonl", "hub"])
def test_essays_read_alike_from_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["It rains.  We go\nhome.", "The sun\tshines. We stay."]
    path: Path | None = tmp_path / "essays"
    assert path
    if form == "folder":
        path.mkdir()
        for n, text in enumerate(texts):
            (path / f"{n}.txt").write_text(text)
    elif form == "txt":
        path = path.with_suffix(".txt")
        path.write_text("\n".join(texts))
    elif form == "json":
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"text": " ".join(texts)}))
    elif form == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path = None
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": text} for text in texts])
        )
    sources = Sources(essays=path, hub=path is None)
    assert sources.missing("essays") is None
    assert " ".join(sources.essay_words().words) == "It rains. We go home. The sun shines. We stay."
    assert sources.haystack_name == "essays"


def test_what_the_hub_does_not_give_is_a_reason_not_an_error() -> None:
    reason = Sources(hub=True).missing("squad")  # the tests are offline
    assert reason is not None and "rajpurkar/squad_v2" in reason and "cannot be loaded" in reason


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *_: object, **__: object) -> datasets.Dataset:
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = Sources(hub=True)
    reasons = [sources.missing("essays") for _ in range(3)]
    assert reasons[0] is not None and "no route" in reasons[0] and reasons == 3 * reasons[:1]
    assert asked == ["baber/paul_graham_essays"]


def test_a_stand_in_haystack_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("A note. Another one.")
    sources = Sources(haystack=tmp_path / "notes.md")
    assert sources.missing("essays") is None and sources.haystack_name == "stand-in: notes.md"
    assert sources.essay_words().first(5) == ["A", "note.", "Another", "one.", "A"]
    given = Sources(haystack=["A note.", "Another one."])
    assert given.haystack_name == "stand-in: a given text"
    assert given.fingerprint("essays") == sources.fingerprint("essays") != Sources(haystack=["x"]).fingerprint("essays")
    library = Sources(haystack=Path("python-stdlib"))
    assert "import" in library.essay_words().words and library.haystack_name == "stand-in: python-stdlib"
    reason = Sources().missing("essays")
    assert reason == "no essays: neither a local copy nor the hub (baber/paul_graham_essays) was given"
    both = Sources(essays=tmp_path / "notes.md", haystack=["x"])
    assert both.haystack_name == "essays"


def test_sentences_end_where_they_do() -> None:
    essays = Essays('Mr. A. Pike left. "Did he?" He did (at 5 p.m. sharp). 3 of us saw it! and so on. Then rain')
    ends = essays.sentence_ends(len(essays.words))
    words = essays.words
    sentences = [" ".join(words[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert sentences == [
        "Mr. A. Pike left.",
        '"Did he?"',
        "He did (at 5 p.m. sharp).",
        "3 of us saw it! and so on.",
        "Then rain",
    ]
    assert not ends_sentence("e.g.", "The") and ends_sentence("it.)", "“And")


def test_sentences_of_a_text_that_is_read_over_and_over() -> None:
    essays = Essays("One two. Three four five. Six")
    assert essays.sentence_ends(4) == [2, 4]
    assert essays.sentence_ends(5) == [2, 5]
    assert essays.sentence_ends(6) == [2, 5, 6]
    assert essays.sentence_ends(9) == [2, 5, 6, 8, 9]
    assert essays.first(8) == "One two. Three four five. Six One two.".split()


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("squad", "none.json", None, r"squad \S*none.json does not exist; check the path"),
        (
            "squad",
            "cut.json",
            '{"data": [',
            r"squad \S*cut.json is damaged or of another kind \(.*\); restore it",
        ),
        ("squad", "cut.parquet", "PAR1", r"squad \S*cut.parquet is damaged or of another kind"),
        (
            "squad",
            "other.json",
            '{"rows": []}',
            r"squad \S*other.json is not of the published form \(KeyError",
        ),
        ("squad", "empty.json", '{"data": []}', r"squad \S*empty.json holds no question with an answer"),
        ("hotpotqa", "other.json", '{"data": []}', r"hotpotqa \S*other.json is not of the published form"),
        ("hotpotqa", "rows.jsonl", '{"question": "Who?"}\n', r"hotpotqa \S*rows.jsonl is not of the published form"),
        ("essays", "none", None, r"essays \S*none does not exist; check the path"),
        ("essays", "blank.txt", " \n", r"essays in \S*blank.txt are empty; give some text"),
        ("essays", "other.json", '{"body": "x"}', r"essays \S*other.json have no text; give"),
        ("essays", "rows.jsonl", '{"body": "x"}\n', r"essays \S*rows.jsonl: a row has no field 'text' .* it has body"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    source: str, name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(HyloError, match=message):
        Sources(**{source: tmp_path / name}).missing(source)


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="no .parquet, .jsonl or .json file in squad"):
        Sources(squad=tmp_path).missing("squad")
