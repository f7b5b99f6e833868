"""RULER on a model: what is answered is kept and counted once, what fails stays outside of the mean."""

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ruler_child
from completions_server import completions_server
from counting_bar import CountingBar
from ruler_sources import write_sources

from hylo.errors import HyloError
from hylo.evaluate.generation import GreedyGenerator, Prompt
from hylo.evaluate.records import evaluations_cache
from hylo.evaluate.ruler import Sources, ruler_samples
from hylo.evaluate.ruler_suite import RulerSettings, check_ruler, evaluate_ruler
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject
from hylo.files import read_json, write_json

SETTINGS = ruler_child.SETTINGS
NOTHING = "nothing of the kind"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the context that templates need in so small a vocabulary."""
    directory = tmp_path_factory.mktemp("ruler-suite") / "tiny"
    shutil.copytree(tiny_base, directory)
    config = read_json(directory / "config.json", "configuration")
    write_json(directory / "config.json", config | {"max_position_embeddings": 2048})
    return directory


@pytest.fixture
def subject(base: Path) -> Subject:
    return Subject("tiny", base)


class Scripted:
    """Answers the n-th prompt that it is asked, over all its life, with `script(n)`."""

    def __init__(self, script: Callable[[int], str | Exception]) -> None:
        self.script, self.asked = script, list[Prompt]()

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | Exception]]:
        for i in reversed(range(len(prompts))):  # in no order that anyone counts on
            self.asked.append(prompts[i])
            yield i, self.script(len(self.asked) - 1)


def silent() -> Scripted:
    return Scripted(lambda n: NOTHING)


def answers_of(subject: Subject, settings: RulerSettings) -> dict[tuple[int, ...], str]:
    """The right answer to every sample, by nothing but its place among the prompts asked."""
    return {
        (task, length, sample.index): " and ".join(sample.outputs)
        for task in settings.tasks
        for length in settings.lengths
        for sample in ruler_samples(task, length, settings.samples, subject.tokenizer, settings.seed, settings.sources)
    }


def test_scores_their_errors_and_their_mean(subject: Subject) -> None:
    """Per task and length 4 samples; in turn all right, 3 of 4, none, and 2 of 4 are answered right."""
    right = answers_of(subject, SETTINGS)
    cells = [(task, length) for length in (1280, 1536) for task in SETTINGS.tasks]
    shares = [4, 3, 0, 2]

    def script(n: int) -> str:
        cell, index = divmod(n, 4)
        return right[(*cells[cell], 3 - index)] if index < shares[cell] else NOTHING

    bar = CountingBar()
    result, not_run = evaluate_ruler(subject, SETTINGS, bar, Scripted(script))
    assert not_run == {}
    found = {(task, int(n)): cell for task, by in result["scores"].items() for n, cell in by.items()}
    assert [found[cell]["score"] for cell in cells] == [100, 75, 0, 50]
    errors = [0, 25, 0, 100 * math.sqrt(1 / 3) / 2]  # deviations 0, 50, 0 and 57.7 over the root of 4
    assert [found[cell]["se"] for cell in cells] == pytest.approx(errors)
    assert all((cell["samples"], cell["failed"]) == (4, 0) for cell in found.values())
    assert result["mean"]["1280"] == {"score": 87.5, "se": pytest.approx(12.5), "tasks": 2}
    assert result["mean"]["1536"] == {"score": 25, "se": pytest.approx(errors[3] / 2), "tasks": 2}
    assert bar.announced == bar.read == 2 * 4 * (1280 + 1536)


def test_prompts_are_the_samples_and_fit(subject: Subject) -> None:
    run = silent()
    evaluate_ruler(subject, replace(SETTINGS, lengths=[1536], tasks=["vt"]), CountingBar(), run)
    samples = list(ruler_samples("vt", 1536, 4, subject.tokenizer, 0, Sources()))
    assert [prompt.new_tokens for prompt in run.asked] == [30] * 4
    assert [subject.tokenizer.decode(prompt.ids) for prompt in reversed(run.asked)] == [s.prompt for s in samples]
    assert all(1400 < len(prompt.ids) <= 1536 - 30 for prompt in run.asked)


def test_nothing_is_answered_twice(subject: Subject) -> None:
    """Not again, not with more samples, not with another task, not at another length, and not in another order."""
    first = evaluate_ruler(subject, SETTINGS, CountingBar(), silent())
    again, bar = silent(), CountingBar()
    assert evaluate_ruler(subject, SETTINGS, bar, again) == first
    assert (again.asked, bar.announced) == ([], 0)
    more = silent()
    evaluate_ruler(subject, replace(SETTINGS, samples=6), CountingBar(), more)
    assert len(more.asked) == 2 * 2 * 2
    other = silent()
    evaluate_ruler(subject, RulerSettings([1792, 1536], ["niah_multikey_2", "vt"], samples=5), CountingBar(), other)
    assert len(other.asked) == 2 * 5 + 5
    fewer = silent()
    result, _ = evaluate_ruler(subject, replace(SETTINGS, samples=2), CountingBar(), fewer)
    assert (fewer.asked, result["scores"]["vt"]["1280"]["samples"]) == ([], 2)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"chat": True}, {"sources": 1}, {"subject": 1}, {"tokenizer": 1}],
    ids=lambda c: next(iter(c)),
)
def test_what_changes_an_answer_asks_again(
    subject: Subject, base: Path, change: dict[str, Any], tmp_path: Path
) -> None:
    settings = RulerSettings([1280], ["niah_single_2"], samples=2, sources=Sources(haystack=["Some text. " * 90]))
    subject.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    run = silent()
    evaluate_ruler(subject, settings, CountingBar(), run)
    assert len(run.asked) == 2
    match change:
        case {"sources": _}:
            settings = replace(settings, sources=Sources(haystack=["Other text. " * 90]))
        case {"subject": _}:
            other = Subject("tiny", base, "bf16")
            vars(other)["tokenizer"] = subject.tokenizer
            subject = other
        case {"tokenizer": _}:
            subject.tokenizer.add_tokens("special magic")
        case _:
            settings = replace(settings, **change)
    evaluate_ruler(subject, settings, CountingBar(), run)
    assert len(run.asked) == 4


def test_a_failing_sample_is_kept_as_such_and_tried_again(subject: Subject) -> None:
    settings = replace(SETTINGS, lengths=[1536], tasks=["vt"])
    right = answers_of(subject, settings)

    def script(n: int) -> str | Exception:
        return RuntimeError("no\nluck") if n == 1 else right["vt", 1536, 3 - n]

    result, _ = evaluate_ruler(subject, settings, CountingBar(), Scripted(script))
    assert result["scores"]["vt"]["1536"] == {"score": 100, "se": 0, "samples": 3, "failed": 1}
    (path,) = evaluations_cache().glob("*/ruler-*.jsonl")
    assert '"error": "RuntimeError: no luck"' in path.read_text()
    again = silent()
    result, _ = evaluate_ruler(subject, settings, CountingBar(), again)
    assert len(again.asked) == 1
    assert result["scores"]["vt"]["1536"] == {"score": 75, "se": 25, "samples": 4, "failed": 0}


def test_a_task_that_fails_altogether_has_no_score(subject: Subject) -> None:
    def script(n: int) -> str | Exception:
        return RuntimeError("no") if n < 4 else NOTHING

    result, _ = evaluate_ruler(subject, replace(SETTINGS, lengths=[1536]), CountingBar(), Scripted(script))
    assert result["scores"]["niah_single_1"]["1536"] == {"score": None, "se": None, "samples": 0, "failed": 4}
    assert result["mean"]["1536"] == {"score": 0, "se": 0, "tasks": 1}


def test_one_sample_has_no_error(subject: Subject) -> None:
    result, _ = evaluate_ruler(subject, replace(SETTINGS, samples=1), CountingBar(), silent())
    assert result["scores"]["vt"]["1280"] == {"score": 0, "se": None, "samples": 1, "failed": 0}
    assert result["mean"]["1280"] == {"score": 0, "se": None, "tasks": 2}


def test_a_killed_evaluation_goes_on(
    subject: Subject, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kill -9 in the middle of a task: what was answered is not asked again, and the result is the same."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, ruler_child.__file__, str(base), "6"], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    asked, generate = [], GreedyGenerator.generate

    def watched(self: GreedyGenerator, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | Exception]]:
        asked.extend(prompts)
        return generate(self, prompts)

    monkeypatch.setattr(GreedyGenerator, "generate", watched)
    resumed = evaluate_ruler(subject, SETTINGS, CountingBar())
    assert len(asked) == 16 - 6
    predictions = said()
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "another"))
    assert evaluate_ruler(subject, SETTINGS, CountingBar()) == resumed
    assert said() == predictions and len(predictions) == 16
    assert any(text.split() for text in predictions)


def said() -> list[str]:
    """All records of the cache: a line each, in order."""
    files = sorted(evaluations_cache().glob("*/ruler-*.jsonl"))
    return sorted(f"{path.name} {line}" for path in files for line in path.read_text().splitlines()[1:])


def test_a_model_is_loaded_only_to_be_asked(subject: Subject) -> None:
    evaluate_ruler(subject, SETTINGS, CountingBar(), silent())
    evaluate_ruler(subject, SETTINGS, CountingBar())
    assert "model" not in vars(subject)


def test_a_served_model_answers_too(subject: Subject, base: Path) -> None:
    """As the model itself does."""
    settings = replace(SETTINGS, samples=2)
    expected, _ = evaluate_ruler(subject, settings, CountingBar())
    itself = [line.partition(" ")[2] for line in said()]
    run = GreedyGenerator(subject.model, subject.tokenizer)

    def answer(ids: list[int], tokens: int) -> str:
        return subject.tokenizer.decode(run.answers([Prompt(ids, tokens)])[0], skip_special_tokens=True)

    with completions_server(answer, context=2048) as server:
        served = Served("served", server.address, base)
        assert evaluate_ruler(served, settings, CountingBar()) == (expected, {})
        assert len(server.asked) == 8
        assert sorted(itself * 2) == sorted(line.partition(" ")[2] for line in said())
        evaluate_ruler(served, settings, CountingBar())
        assert len(server.asked) == 8


def test_what_cannot_be_had_is_not_run(subject: Subject, tmp_path: Path) -> None:
    settings = RulerSettings([1280], ["vt", "qa_1", "niah_single_2"], samples=1)
    result, not_run = evaluate_ruler(subject, settings, CountingBar(), silent())
    assert list(result["scores"]) == ["vt"]
    assert not_run.keys() == {"qa_1", "niah_single_2"}
    assert "squad" in not_run["qa_1"]
    tasks, not_run = check_ruler(subject, replace(settings, sources=write_sources(tmp_path)))
    assert ([task.name for task in tasks], not_run) == (["vt", "qa_1", "niah_single_2"], {})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (RulerSettings([2049], ["vt"]), "RULER at 2049 tokens exceeds the context of tiny, 2048"),
        (RulerSettings([64], ["vt"]), "vt needs .* tokens, not 64"),
        (RulerSettings([1280], ["poetry"]), "no task 'poetry'"),
        (RulerSettings([1280], ["vt"], samples=0), "0 samples"),
        (RulerSettings([1280], ["vt"], chat=True), "no chat template"),
        (RulerSettings([1280], ["qa_1"], sources=Sources(squad=Path("/nowhere/dev.json"))), "/nowhere/dev.json"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(base: Path, settings: RulerSettings, named: str) -> None:
    subject = Subject("tiny", base)
    for run in (check_ruler, lambda s, t: evaluate_ruler(s, t, CountingBar())):
        with pytest.raises(HyloError, match=named):
            run(subject, settings)
    assert "model" not in vars(subject)
