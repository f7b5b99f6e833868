"""What a run reads in all: the split, the parts, prompts and preferences, and what a resumed run is held to."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from hylo.data.inspect import Reading, print_document, print_row, print_totals, trace, uses
from hylo.data.settings import Data
from hylo.data.training import TrainingData
from hylo.errors import HyloError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def make(letters: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """TrainingData of settings, in whose paths `DIR` stands for a folder of two JSONL files, a text and preferences."""
    for name, first in (("a", 0), ("b", 13)):
        texts = [LETTERS[first + i % 13] * (20 + i) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "one.txt").write_text("".join(chr(33 + i) for i in np.random.default_rng(0).integers(0, 90, 1999)))
    pairs = [{"q": f"q{i}", "y": f"good {i}", "n": f"bad {i}", "a": "x" * i} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def make(**settings: Any) -> TrainingData:
        values = json.loads(json.dumps(settings).replace("DIR", str(tmp_path)))
        return TrainingData(Data.model_validate(values), letters, tmp_path / "cache")

    return make


def jsonl(name: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "paths": [f"DIR/{name}.jsonl"]} | fields


def places(data: TrainingData, part: tuple[float, float]) -> set[int]:
    return {
        p
        for pieces in data.pieces(part)
        for a, n in zip(pieces.places, pieces.lengths, strict=True)
        for p in range(a, a + n)
    }


@pytest.mark.parametrize("sources", [{"text": ["DIR/one.txt"]}, {"sources": [jsonl("a"), jsonl("b")]}])
def test_parts_and_the_held_out_split_are_disjoint_and_complete(make: Any, sources: Any) -> None:
    data = make(**sources)
    total = int(data.corpus.first[-1])
    first, second = places(data, (0.0, 0.2)), places(data, (0.2, 1.0))
    assert not first & second and first | second == places(data, (0.0, 1.0))
    assert len(first) + len(second) + len(data.held_out) == total
    assert len(data.held_out) == sum(len(cache.tokens) // 20 for cache in data.corpus.caches)
    assert len(first) == pytest.approx(0.2 * (total - len(data.held_out)), abs=2)
    rows = data.rows("s", 0, (0.0, 0.2))(32, len(first) // 32)
    read = {p for i in range(len(rows)) for place, n in rows.row(i).spans for p in range(place, place + n)}
    assert read <= first and len(read) == len(first) // 32 * 32


def test_held_out_text_of_its_own_leaves_the_sources_whole(make: Any) -> None:
    data = make(sources=[jsonl("a")], held_out=["DIR/one.txt", jsonl("b")])
    assert sum(pieces.tokens for pieces in data.pieces()) == len(data.corpus.caches[0].tokens)
    assert len(data.held_out) == 2000 + sum(20 + i + 1 for i in range(40))


def test_the_order_is_the_seeds(make: Any) -> None:
    orders = [make(sources=[jsonl("a")], seed=seed).pieces()[0].places.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_stages_and_seeds_have_orders_of_their_own(make: Any) -> None:
    data = make(sources=[jsonl("a"), jsonl("b")])
    rows = [data.rows(stage, seed)(64, 10) for stage, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    drawn = [torch.stack([each[i]["input_ids"] for i in range(10)]) for each in rows]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[3])


def test_weights_mix_sources_row_by_row(make: Any, letters: PreTrainedTokenizerFast) -> None:
    data = make(sources=[jsonl("a", weight=3), jsonl("b", weight=1)])
    rows = data.rows("s", 0)(32, 32)
    of_a = [set(letters.decode(rows[i]["input_ids"]).replace("<end>", "")) <= set(LETTERS[:13]) for i in range(32)]
    of_b = [set(letters.decode(rows[i]["input_ids"]).replace("<end>", "")) <= set(LETTERS[13:]) for i in range(32)]
    assert sum(of_a) + sum(of_b) == 32 and 23 <= sum(of_a) <= 25


def test_without_weights_every_source_is_read_to_its_end(make: Any) -> None:
    data = make(sources=[jsonl("a"), {"kind": "text", "paths": ["DIR/one.txt"]}])
    rows = data.rows("s", 0)
    tokens = len(rows.pools[0].stream)
    assert len(rows.pools) == 1 and tokens == sum(pieces.tokens for pieces in data.pieces())
    rows(50, tokens // 50)
    with pytest.raises(HyloError, match="jsonl .*a.jsonl, text .*one.txt: the stage reads"):
        rows(50, tokens // 50 + 1)


def test_calibration_reads_its_part_of_the_training_text(make: Any) -> None:
    data = make(text=["DIR/one.txt"])
    rows = data.calibration(400, 50, (0.5, 1.0))
    assert rows.shape == (8, 50) and rows.dtype == torch.int64
    mine, others = PackedText(data, (0.5, 1.0)), PackedText(data, (0.0, 0.5))
    assert all(mine.holds(row) and not others.holds(row) for row in rows)


class PackedText:
    def __init__(self, data: TrainingData, part: tuple[float, float]) -> None:
        self.tokens = np.array([data.corpus.read(p, 1)[0] for p in sorted(places(data, part))])

    def holds(self, row: torch.Tensor) -> bool:
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, len(row))
        return bool((windows == row.numpy()).all(1).any())


def test_prompts_of_text_and_of_questions(make: Any) -> None:
    data = make(sources=[jsonl("a"), jsonl("pairs", prompt="q", answer="a")], epochs=9)
    texts = [row["prompt"] for row in data.prompts("s", 0, tokens=19)]
    asked = [text for text in texts if text.startswith("[user]")]
    assert sorted(asked) == sorted({f"[user]q{i}[assistant]" for i in range(10)} & set(asked)) and 7 <= len(asked) <= 10
    plain = [text for text in texts if not text.startswith("[user]")]
    assert all(len(text) <= 19 and set(text) <= set(LETTERS[:13]) for text in plain) and len(plain) > 60
    assert data.prompts("s", 0, tokens=19) == [{"prompt": text} for text in texts]
    assert data.prompts("s", 1, tokens=19) != data.prompts("s", 0, tokens=19)
    assert len(data.prompts("s", 0, tokens=19, count=5)) == 5


def test_prompts_of_parts_are_disjoint(make: Any) -> None:
    data = make(sources=[jsonl("pairs", prompt="q", answer="a")])
    one, other = ({row["prompt"] for row in data.prompts("s", 0, part, 40)} for part in ((0.0, 0.5), (0.5, 1.0)))
    assert one and other and not one & other


def test_preferences(make: Any) -> None:
    data = make(sources=[jsonl("a"), jsonl("pairs", prompt="q", chosen="y", rejected="n")])
    pairs = data.preferences("s", 0)
    assert {"prompt": "[user]q3[assistant]", "chosen": "good 3", "rejected": "bad 3"} in pairs and len(pairs) == 20
    assert pairs == data.preferences("s", 0) != data.preferences("s", 1)
    one, other = (data.preferences("s", 0, part) for part in ((0.0, 0.5), (0.5, 1.0)))
    assert len(one) == len(other) == 10 and all(pair not in other for pair in one)
    assert len(data.corpus.caches) == 1  # they are no text to train on
    with pytest.raises(HyloError, match="no preferences; name a source with prompt"):
        make(text=["DIR/one.txt"]).preferences("s", 0)
    with pytest.raises(HyloError, match="preferences alone"):
        make(sources=[jsonl("pairs", prompt="q", chosen="y", rejected="n")]).rows("s", 0)(8, 1)


def test_identity_says_what_fixes_the_rows(make: Any, tmp_path: Path) -> None:
    def identity(stage: str = "s", seed: int = 0, part: Any = (0.0, 1.0), **settings: Any) -> dict[str, Any]:
        return make(**({"sources": [jsonl("a"), jsonl("b")]} | settings)).rows(stage, seed, part).identity

    mine = identity()
    assert identity() == mine == json.loads(json.dumps(mine))
    changes: list[dict[str, Any]] = [{"stage": "t"}, {"seed": 1}, {"part": (0.0, 0.5)}, {"sources": [jsonl("a")]}]
    changes += [{"seed": 1}, {"epochs": 2}, {"boundaries": False}, {"held_out": ["DIR/one.txt"]}]
    changes += [{"sources": [jsonl("a", weight=1), jsonl("b", weight=2)]}]
    for change in changes:
        assert identity(**change) != mine, change
    path = tmp_path / "a.jsonl"
    text = path.read_text()
    path.write_text(text.replace("b", "z", 1))
    assert identity()["sources"][0].startswith("jsonl a.jsonl (") and identity() != mine
    path.write_text(text)  # another date, the same tokens
    assert identity() == mine


def test_a_row_is_traced_to_its_documents(make: Any, letters: PreTrainedTokenizerFast) -> None:
    data = make(sources=[jsonl("a"), jsonl("b")])
    rows = data.rows("s", 0)(64, 20)
    for index in range(20):
        ids, at = rows[index]["input_ids"], 0
        for span in trace(rows, index):
            assert span.at == at
            record = json.loads(Path(span.file).read_text().splitlines()[span.record - 1])["text"] + "<end>"
            expected = letters(record, add_special_tokens=False).input_ids[span.first : span.first + span.tokens]
            assert ids[at : at + span.tokens].tolist() == expected
            at += span.tokens
        assert at == 64


def test_a_document_is_traced_to_its_rows(make: Any) -> None:
    sources = [jsonl("a"), jsonl("b"), {"kind": "retrieval", "share": 0.3}]
    rows = make(sources=sources, epochs=2).rows("s", 0)(160, 40)
    for document in (0, 7, 39, 40, 79):
        expected = [
            (index, span.first, span.tokens)
            for index in range(40)
            for span in trace(rows, index)
            if span.document == document
        ]
        assert [use[:3] for use in uses(rows, document)] == expected
    assert any(use.facts for document in range(80) for use in uses(rows, document))
    with pytest.raises(HyloError, match="no document 80; they are numbered from 0 to 79"):
        uses(rows, 80)


def test_what_is_printed(make: Any) -> None:
    data = make(sources=[jsonl("a", weight=1), jsonl("b", weight=1)])
    reading = Reading(data.rows("aligned", 0, (0.0, 0.5)), 32, 10)
    console = Console(file=StringIO(), width=300)
    print_totals(data, [reading], console)
    print_row(reading, data.tokenizer, 3, console)
    print_document(reading, 41, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    tokens = len(data.corpus.caches[0].tokens)
    assert f"{tokens:,}" in said and f"{tokens - tokens // 20:,}" in said and f"{tokens // 20}" in said
    assert "aligned, row 3: 32 tokens" in said and "document 41 is record 2 of" in said and "b.jsonl" in said
    with pytest.raises(HyloError, match="stage aligned has no row 10; its rows are numbered from 0 to 9"):
        print_row(reading, data.tokenizer, 10, console)
