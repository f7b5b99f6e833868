"""All of RULER through the real samples, batches, caches and scores: what answers right scores 100, what guesses 0."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle_model import Oracle
from rich.console import Console
from ruler_sources import write_sources
from transformers import GenerationMixin

from hylo.evaluate.prefixes import make_tree
from hylo.evaluate.progress import Bar
from hylo.evaluate.ruler import TASKS, Sample, Sources, encode, ruler_samples
from hylo.evaluate.ruler_suite import RulerSettings, evaluate_ruler
from hylo.evaluate.subject import Subject

LENGTH, SAMPLES = 3072, 3
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}[assistant]"
PROBES = 8 + 16  # tokens that the generator reads to learn how large a cache is


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("ruler"))


@pytest.fixture
def quiet() -> Bar:
    return Bar(Console(quiet=True))


def samples_of(subject: Subject, task: str, sources: Sources) -> Iterator[Sample]:
    chat = subject.tokenizer.chat_template is not None
    return ruler_samples(task, LENGTH, SAMPLES, subject.tokenizer, 0, sources, chat)


def subject_of(
    directory: Path, name: str, sources: Sources, at_random: bool = False, wrong: str = "", template: str | None = None
) -> Subject:
    """A subject whose model is an oracle, with a right answer to every sample; `wrong` is the task it gets wrong."""
    subject = Subject(name, directory)
    subject.tokenizer.chat_template = template
    oracle = Oracle(subject.tokenizer, at_random=at_random)
    for task in TASKS:
        for sample in samples_of(subject, task, sources):
            answer = "no" if task == wrong else " ".join(sample.outputs[:1] if TASKS[task].part else sample.outputs)
            oracle.learn(encode(subject.tokenizer, sample.prompt), f" {answer}")
    vars(subject).update(model=oracle, hash=name, config=oracle.config)
    return subject


def test_right_answers_score_100_on_every_task(tiny_base: Path, sources: Sources, quiet: Bar) -> None:
    subject = subject_of(tiny_base, "oracle", sources)
    result, not_run = evaluate_ruler(subject, RulerSettings([LENGTH], samples=SAMPLES, sources=sources), quiet)
    assert not_run == {} and list(result["scores"]) == list(TASKS) and len(TASKS) == 13
    right = {"score": 100.0, "se": 0.0, "samples": SAMPLES, "failed": 0}
    assert {task: cells[str(LENGTH)] for task, cells in result["scores"].items()} == dict.fromkeys(TASKS, right)
    assert result["mean"] == {str(LENGTH): {"score": 100.0, "se": 0.0, "tasks": 13}}


def test_samples_of_a_task_are_one_batch_and_what_they_share_is_read_once(
    tiny_base: Path, sources: Sources, quiet: Bar
) -> None:
    subject = subject_of(tiny_base, "counting", sources)
    evaluate_ruler(subject, RulerSettings([LENGTH], samples=SAMPLES, sources=sources), quiet)
    prompts = [
        [encode(subject.tokenizer, sample.prompt) for sample in samples_of(subject, task, sources)] for task in TASKS
    ]
    read = [rows * columns for rows, columns in subject.model.read if columns > 1]
    whole = sum(len(ids) for task in prompts for ids in task)
    assert sum(read) - PROBES == sum(make_tree(task).computed for task in prompts) < 0.95 * whole


def test_answers_at_random_score_about_0(tiny_base: Path, sources: Sources, quiet: Bar) -> None:
    subject = subject_of(tiny_base, "random", sources, at_random=True)
    result, _ = evaluate_ruler(subject, RulerSettings([LENGTH], samples=SAMPLES, sources=sources), quiet)
    scores = {task: cells[str(LENGTH)]["score"] for task, cells in result["scores"].items()}
    assert max(scores.values()) < 15, scores
    assert result["mean"][str(LENGTH)]["score"] < 2


def test_one_task_that_is_wrong_lowers_that_task_alone(tiny_base: Path, sources: Sources, quiet: Bar) -> None:
    subject = subject_of(tiny_base, "partly", sources, wrong="vt")
    result, _ = evaluate_ruler(subject, RulerSettings([LENGTH], samples=SAMPLES, sources=sources), quiet)
    assert {task for task, cells in result["scores"].items() if cells[str(LENGTH)]["score"] < 100} == {"vt"}
    assert result["mean"][str(LENGTH)]["score"] == pytest.approx(1200 / 13)


def test_prompts_of_a_chat_are_answered_too(tiny_base: Path, sources: Sources, quiet: Bar) -> None:
    subject = subject_of(tiny_base, "chatting", sources, template=TEMPLATE)
    settings = RulerSettings([LENGTH], samples=SAMPLES, sources=sources, chat=True)
    result, _ = evaluate_ruler(subject, settings, quiet)
    assert result["mean"] == {str(LENGTH): {"score": 100.0, "se": 0.0, "tasks": 13}}


def test_the_oracle_answers_transformers_generate_too(tiny_base: Path) -> None:
    tokenizer = Subject("tiny", tiny_base).tokenizer
    oracle = Oracle(tokenizer)
    assert isinstance(oracle, GenerationMixin)
    texts = [f"The {n}th row of the table" + " again" * n for n in range(4)]
    for n, text in enumerate(texts):
        oracle.learn(encode(tokenizer, text), f" says {n * n}")
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    out = oracle.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers == [f" says {n * n}" for n in range(4)]
