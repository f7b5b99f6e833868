"""lm-eval's tasks on local copies: scores are lm-eval's own, samples are resumed, failures are set apart."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_sets import gold, rows_of, write_copies, write_lines
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from oracle_model import Oracle

from hylo.demo import TEACHER
from hylo.errors import HyloError
from hylo.evaluate.harness import COMMONSENSE, HarnessSettings, check_harness, evaluate_harness, mean_and_error
from hylo.evaluate.harness_data import SOURCES, load_ruler_task, load_task
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import evaluations_cache
from hylo.evaluate.subject import Subject

ROWS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_copies(folder, ROWS)
    return folder


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def subject(tiny_base: Path) -> Subject:
    return Subject("tiny", tiny_base)


class Asked:
    """Counts the requests that reach the model, and lets some fail. `batches`: how many came at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Any = lambda requests: None) -> None:
        self.batches: list[int] = []
        for name in ("loglikelihood", "generate_until"):
            monkeypatch.setattr(HFLM, name, self._counted(getattr(HFLM, name), fails))

    def _counted(self, real: Any, fails: Any) -> Any:
        def counted(lm: HFLM, requests: list[Instance], disable_tqdm: bool = False) -> Any:
            if error := fails(requests):
                raise error
            self.batches.append(len(requests))
            return real(lm, requests, disable_tqdm=disable_tqdm)

        return counted

    @property
    def count(self) -> int:
        return sum(self.batches)


def test_scores_are_those_of_lm_eval(subject: Subject, data: Path, tmp_path: Path) -> None:
    """Against simple_evaluate, which loads model and data by itself, one row at a time."""
    tasks = []
    for task, source in SOURCES.items():
        write_lines(tmp_path / f"{task}.jsonl", rows_of(task, ROWS))
        files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / f"{task}.jsonl"))
        kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        changed = {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}
        tasks.append({"group": f"group_{task}", "task": [changed]})
        assert source.split in files
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(subject.directory)},
        tasks=tasks,
        num_fewshot=0,
        device="cpu",
        batch_size=1,
        bootstrap_iters=1,
    )
    assert theirs is not None
    settings = HarnessSettings(data=data)
    ours = {}
    for suite in ("commonsense", "gsm8k"):
        result, not_run = evaluate_harness(subject, suite, settings, Bar())
        ours |= result["scores"]
        assert not not_run and not result["failures"] and result["truncated"] == 0
    assert set(ours) == set(SOURCES)
    for task, scores in ours.items():
        for metric, found in scores["metrics"].items():
            name, _, kind = metric.partition(", ")
            row = theirs["results"][task]
            assert found["score"] / 100 == pytest.approx(row[f"{name},{kind or 'none'}"], abs=1e-15)
            assert found["se"] / 100 == pytest.approx(row[f"{name}_stderr,{kind or 'none'}"], abs=1e-15)
            assert found["samples"] == ROWS
    chosen = {task: scores["metric"] for task, scores in ours.items()}
    assert chosen["race"] == chosen["winogrande"] == "acc" and chosen["piqa"] == "acc_norm"
    assert chosen["gsm8k"] == "exact_match, flexible-extract"
    assert {scores["score"] for scores in ours.values()} - {0.0, 100.0}  # that something was told apart


class Sure(Oracle):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 50 * found.logits
        return found


def _taught(subject: Subject, data: Path, off: int) -> Subject:
    """A model that prefers the right choice, or where `off` is 1 the one after it."""
    oracle = Sure(subject.tokenizer, context=512)
    for task in SOURCES:
        loaded = load_task(task, data, 0)
        loaded.build_all_requests()
        for request in loaded.instances:
            n, (before, after) = request.doc_id, request.args
            if task == "gsm8k":
                oracle.learn(subject.tokenizer(before)["input_ids"], f" It is {n}. #### {n + 2 + off}")
            elif request.idx == (gold(task, n) + off) % (2 if task in ("piqa", "winogrande") else 4):
                oracle.learn(subject.tokenizer(before)["input_ids"], after)
    subject.__dict__["model"] = oracle
    return subject


@pytest.mark.parametrize(("off", "score"), [(0, 100.0), (1, 0.0)])
def test_a_model_that_knows_scores_100_and_one_that_errs_0(
    subject: Subject, data: Path, off: int, score: float
) -> None:
    taught = _taught(subject, data, off)
    for suite in ("commonsense", "gsm8k"):
        result, _ = evaluate_harness(taught, suite, HarnessSettings(data=data), Bar())
        assert {task: row["score"] for task, row in result["scores"].items()} == dict.fromkeys(result["scores"], score)
        assert result["mean"] == {"score": score, "se": 0.0, "tasks": 7 if suite == "commonsense" else 1}


def test_the_first_samples_are_those_of_more(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    few, _ = evaluate_harness(subject, "commonsense", HarnessSettings(data=data, samples=2), Bar())
    assert asked.count == 2 * (5 * 4 + 2 * 2) and few["scores"]["race"]["samples"] == 2
    evaluate_harness(subject, "commonsense", HarnessSettings(data=data), Bar())
    assert asked.count == ROWS * (5 * 4 + 2 * 2)


class Deadly(Bar):
    """Kills the process, as kill -9 does, when some requests are done."""

    left = 5

    def advance(self, tokens: int) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_evaluation_goes_on(
    subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = HarnessSettings(data=data, batch=2)
    subject.model  # noqa: B018 (loaded before the fork)
    child = os.fork()
    if not child:
        try:
            evaluate_harness(subject, "commonsense", settings, Deadly())
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (path,) = evaluations_cache().glob("*/*.jsonl")
    done = len(path.read_text().splitlines()) - 1
    assert done == 5
    asked = Asked(monkeypatch)
    result, _ = evaluate_harness(subject, "commonsense", settings, Bar())
    assert asked.count == ROWS * 24 - done
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "another"))
    assert evaluate_harness(subject, "commonsense", settings, Bar())[0] == result


def test_what_fails_is_set_apart_and_asked_again(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HarnessSettings(data=data)
    with monkeypatch.context() as patch:
        Asked(patch, lambda requests: ValueError("no") if any("box 3" in r.args[0] for r in requests) else None)
        result, _ = evaluate_harness(subject, "commonsense", settings, Bar())
    assert result["failures"] == {"piqa/3": "ValueError: no", "winogrande/3": "ValueError: no"}
    for task, row in result["scores"].items():
        lost = int(task in ("piqa", "winogrande"))
        assert (row["samples"], row["failed"]) == (ROWS - lost, lost)
    asked = Asked(monkeypatch)
    again, _ = evaluate_harness(subject, "commonsense", settings, Bar())
    assert asked.count == 4 and not again["failures"] and again["scores"]["piqa"]["samples"] == ROWS


def test_a_batch_that_memory_does_not_hold_is_halved(
    subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = HarnessSettings(data=data)
    tried: list[int] = []

    def full(requests: list[Instance]) -> Exception | None:
        tried.append(len(requests))
        return torch.OutOfMemoryError("full") if len(requests) > 5 else None

    with monkeypatch.context() as patch:
        asked = Asked(patch, full)
        result, _ = evaluate_harness(subject, "commonsense", settings, Bar())
    assert max(asked.batches) == 4 and not result["failures"]
    assert sum(rows > 5 for rows in tried) <= 1 + 2 + 4 + 8  # of the first 64 rows alone
    monkeypatch.setenv("HYLO_CACHE", str(data / "another"))
    whole, _ = evaluate_harness(subject, "commonsense", settings, Bar())
    assert result["scores"] == whole["scores"]


def test_examples_are_put_before_the_question(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    Asked(monkeypatch, lambda requests: seen.extend(request.args[0] for request in requests))
    evaluate_harness(subject, "gsm8k", HarnessSettings(data=data, samples=1, few_shot=2), Bar())
    assert [text.count("Question:") for text in seen] == [3]


def test_data_that_cannot_be_had_are_named(subject: Subject, tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa" / "validation.jsonl", rows_of("piqa", 2))
    result, not_run = evaluate_harness(subject, "commonsense", HarnessSettings(data=tmp_path), Bar())
    assert set(result["scores"]) == {"piqa"} and set(not_run) == set(COMMONSENSE) - {"piqa"}
    assert not_run["race"].startswith("EleutherAI/race has no local copy and cannot be had (")
    nothing, _ = evaluate_harness(subject, "gsm8k", HarnessSettings(), Bar())
    assert nothing["scores"] == {} and nothing["mean"] is None


def test_the_hub_is_asked_for_the_published_sets(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    asked = {}

    def load_dataset(path: str, name: str | None, **_: Any) -> DatasetDict:
        task = next(task for task, source in SOURCES.items() if (source.hub, source.configuration) == (path, name))
        asked[task] = (path, name)
        return DatasetDict({SOURCES[task].split: Dataset.from_list(rows_of(task, ROWS))})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub, not_run = evaluate_harness(subject, "commonsense", HarnessSettings(), Bar())
    assert set(asked) == set(COMMONSENSE) and not not_run
    local, _ = evaluate_harness(subject, "commonsense", HarnessSettings(data=data), Bar())
    assert hub["scores"] == local["scores"] and hub["data"]["race"]["source"] == "hub, EleutherAI/race"
    assert {task: row["hash"] for task, row in hub["data"].items()} == {
        task: row["hash"] for task, row in local["data"].items()
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 0}, "samples 0: at least 1"),
        ({"few_shot": -1}, "few-shot examples -1"),
        ({"batch": "many"}, "batch 'many' is neither auto"),
        ({"chat": True}, "tiny has no chat template"),
        ({"data": Path("nowhere")}, "local copies nowhere do not exist"),
    ],
)
def test_bad_settings_are_named(subject: Subject, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(HyloError, match=said):
        check_harness(subject, "commonsense", HarnessSettings(**changes))
    assert "model" not in subject.__dict__


def test_a_copy_that_lacks_something_is_named(subject: Subject, tmp_path: Path) -> None:
    settings = HarnessSettings(data=tmp_path)
    write_lines(tmp_path / "openai/gsm8k/main/train.jsonl", rows_of("gsm8k", 2))
    with pytest.raises(HyloError, match=r"gsm8k/main of gsm8k has no split test"):
        check_harness(subject, "gsm8k", settings)
    path = tmp_path / "openai/gsm8k/main/test.jsonl"
    write_lines(path, [{"question": "one?"}])
    with pytest.raises(HyloError, match="lacks column answer in split test"):
        check_harness(subject, "gsm8k", settings)
    path.write_text('{"question": "a", "ans')
    _forget()
    with pytest.raises(HyloError, match="gsm8k is not readable"):
        check_harness(subject, "gsm8k", settings)


def _forget() -> None:
    from hylo.evaluate.harness_data import _read

    _read.cache_clear()


def test_mean_and_error() -> None:
    assert mean_and_error([1.0, 0.0, 1.0, 1.0]) == {"score": 75.0, "se": pytest.approx(25.0), "samples": 4}
    assert mean_and_error([1.0]) == {"score": 100.0, "se": None, "samples": 1}


WORD_LISTS = """class RandomWord:
    def __init__(self):
        nouns, adjectives = ["bread", "river", "stone"], ["red", "small", "quick"]
        self._categories = {"nouns": nouns, "adjectives": adjectives, "verbs": ["go", "see"]}
"""


@pytest.fixture
def word_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for wonderwords, whose lists are not needed to tell whether lm-eval's ruler runs."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "wonderwords.py").write_text(WORD_LISTS)
    monkeypatch.syspath_prepend(tmp_path / "words")


@pytest.mark.usefixtures("word_lists")
def test_ruler_through_lm_eval() -> None:
    pytest.importorskip("nltk")
    teacher = Subject("teacher", TEACHER)
    oracle = Sure(teacher.tokenizer, context=2048)
    loaded = load_ruler_task("niah_single_1", (2048,), TEACHER)
    loaded.build_all_requests(limit=2)
    for request in loaded.instances:
        oracle.learn(teacher.tokenizer(request.args[0])["input_ids"], f" {request.doc['outputs'][0]}.")
    teacher.__dict__["model"] = oracle
    settings = HarnessSettings(samples=3, lengths=(2048,), ruler_tasks=("niah_single_1",))
    result, not_run = evaluate_harness(teacher, "ruler", settings, Bar())
    cell = {"score": pytest.approx(200 / 3), "se": pytest.approx(100 / 3), "samples": 3, "failed": 0}
    assert result["scores"] == {"niah_single_1": {"2048": cell}} and not not_run  # two of three were taught
    assert result["mean"]["2048"]["tasks"] == 1


@pytest.mark.usefixtures("word_lists")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "ruler needs lengths"),
        ({"lengths": (512,)}, "at 512 tokens may never find a sample"),
        ({"lengths": (4096,)}, "exceeds the context of tiny, 512"),
        ({"ruler_tasks": ("niah_single_9",)}, "RULER has no task niah_single_9"),
    ],
)
def test_bad_settings_of_ruler_are_named(subject: Subject, changes: dict[str, Any], said: str) -> None:
    pytest.importorskip("nltk")
    with pytest.raises(HyloError, match=said):
        check_harness(subject, "ruler", HarnessSettings(**changes))


def test_what_ruler_needs_is_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.evaluate.harness.find_spec", lambda name: name == "lm_eval")
    with pytest.raises(HyloError, match=r'needs nltk and wonderwords; run: pip install "lm-eval\[ruler\]"'):
        check_harness(subject, "ruler", HarnessSettings(lengths=(2048,)))
    monkeypatch.setattr("hylo.evaluate.harness.find_spec", lambda name: None)
    with pytest.raises(HyloError, match=r'pip install "hylo\[eval\]"'):
        check_harness(subject, "gsm8k", HarnessSettings())
