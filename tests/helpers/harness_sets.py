"""Tiny sets of lm-eval's tasks as the hub stores them, with the right answer of each row: what a local copy holds."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from hylo.evaluate.harness_data import SOURCES

WORDS = ("bread", "river", "stone", "lamp", "cloud", "wheel", "garden", "letter")
Row = dict[str, Any]


def rows_of(task: str, count: int) -> list[Row]:
    return [_MAKERS[task](i) for i in range(count)]


def gold(task: str, i: int) -> int:
    """The number of the right choice of row i."""
    return (i + 50 * (task == "arc_challenge")) % (2 if task in ("piqa", "winogrande") else 4)


def _words(i: int) -> list[str]:
    return [f"the {WORDS[(i + k) % len(WORDS)]} of row {i}" + " too" * (k % 2) for k in range(4)]


def _arc(i: int) -> Row:
    labels = list("ABCD") if i % 2 else list("1234")  # ARC has both
    choices = {"text": _words(i), "label": labels}
    return {"id": f"row-{i}", "question": f"Which one is {i}?", "choices": choices, "answerKey": labels[i % 4]}


def _hellaswag(i: int) -> Row:
    return {
        "ind": i,
        "activity_label": "Baking [header]",
        "ctx_a": f"Somebody takes {WORDS[i % 8]} {i}.",
        "ctx_b": "then somebody",
        "ctx": f"Somebody takes {WORDS[i % 8]} {i}. then somebody",
        "endings": _words(i),
        "source_id": f"s~{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }


def _openbookqa(i: int) -> Row:
    choices = {"text": _words(i), "label": list("ABCD")}
    return {"id": f"o-{i}", "question_stem": f"What is {i} made of", "choices": choices, "answerKey": "ABCD"[i % 4]}


def _piqa(i: int) -> Row:
    return {"goal": f"open box {i}", "sol1": _words(i)[0], "sol2": _words(i)[1], "label": i % 2}


def _race(i: int) -> Row:
    problems = [
        {"question": f"Row {i} is about  _  .", "answer": "B", "options": _words(i)},
        {"question": f"What is row {i}?", "answer": "ABCD"[i % 4], "options": _words(i + 1)},
    ]
    return {"article": f"A short article about {WORDS[i % 8]}, row {i}.", "problems": str(problems)}


def _winogrande(i: int) -> Row:
    sentence = f"The {WORDS[i % 8]} did not fit the box {i} because _ was large."
    return {"sentence": sentence, "option1": "the bread", "option2": "the box", "answer": str(1 + i % 2)}


def _gsm8k(i: int) -> Row:
    answer = f"{i} and 2 make <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"
    return {"question": f"Ann has {i} pens and buys 2. How many?", "answer": answer}


_MAKERS = {
    "arc_challenge": lambda i: _arc(i + 50),
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "race": _race,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
}


def write_copies(data: Path, count: int = 6) -> None:
    """Copies of all eight, each in another of the ways that a copy may lie there."""
    _saved(data / "allenai/ai2_arc/ARC-Challenge", "arc_challenge", count)
    _parquet(data / "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet", rows_of("arc_easy", count))
    half = count // 2
    snapshot = data / "datasets--Rowan--hellaswag" / "snapshots" / "ab12"
    _parquet(snapshot / "data/validation-00000-of-00002.parquet", rows_of("hellaswag", count)[:half])
    _parquet(snapshot / "data/validation-00001-of-00002.parquet", rows_of("hellaswag", count)[half:])
    (data / "datasets--Rowan--hellaswag" / "refs").mkdir()
    (data / "datasets--Rowan--hellaswag" / "refs" / "main").write_text("ab12")
    write_lines(data / "openbookqa/test.jsonl", rows_of("openbookqa", count))
    write_lines(data / "baber/piqa/validation.jsonl", rows_of("piqa", count))
    _saved(data / "race", "race", count)
    _parquet(data / "allenai/winogrande/winogrande_xl/validation/part.parquet", rows_of("winogrande", count))
    write_lines(data / "openai/gsm8k/main/test.jsonl", rows_of("gsm8k", count))
    write_lines(data / "openai/gsm8k/main/train.jsonl", rows_of("gsm8k", count + 9)[count:])


def write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)


def _saved(folder: Path, task: str, count: int) -> None:
    DatasetDict({SOURCES[task].split: Dataset.from_list(rows_of(task, count))}).save_to_disk(folder)
