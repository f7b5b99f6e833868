"""lm-eval's tasks on a served model, over HTTP: the scores of the same model loaded, and what goes wrong on the way."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness_sets import rows_of, write_copies
from lm_eval.api.instance import Instance
from scores_server import ScoresServer, scores_server

from hylo.errors import HyloError
from hylo.evaluate.harness import HarnessSettings, evaluate_harness
from hylo.evaluate.harness_served import ServedLM
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import evaluations_cache
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject

ROWS = 3
HAS_CLIENT = importlib.util.find_spec("tenacity") and importlib.util.find_spec("aiohttp")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> HarnessSettings:
    folder = tmp_path_factory.mktemp("sets")
    write_copies(folder, ROWS)
    return HarnessSettings(data=folder)


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def subject(tiny_base: Path) -> Subject:
    return Subject("tiny", tiny_base)


@pytest.fixture
def server(subject: Subject) -> Iterator[ScoresServer]:
    with scores_server(subject.model, subject.tokenizer) as found:
        yield found


def _answers(suite: str) -> list[dict[str, dict[str, Any]]]:
    """The records of every model, by key."""
    paths = sorted(evaluations_cache().glob(f"*/{suite}-*.jsonl"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()[1:]] for path in paths]
    return [{line["key"]: line for line in model} for model in lines]


@pytest.mark.parametrize("suite", ["commonsense", "gsm8k"])
def test_scores_are_those_of_the_model(
    subject: Subject, server: ScoresServer, settings: HarnessSettings, suite: str
) -> None:
    served, _ = evaluate_harness(Served("served", server.address, subject.directory), suite, settings, Bar())
    loaded, _ = evaluate_harness(subject, suite, settings, Bar())
    assert served == loaded and server.asked
    one, other = _answers(suite)
    assert one.keys() == other.keys() and one
    for key, answer in one.items():
        if suite == "gsm8k":
            assert answer == other[key]
        else:
            assert answer["loglikelihood"] == pytest.approx(other[key]["loglikelihood"], abs=1e-4)
            assert answer["greedy"] == other[key]["greedy"]


def test_a_request_that_fails_is_a_failed_sample(
    subject: Subject, server: ScoresServer, settings: HarnessSettings
) -> None:
    server.fails = lambda text: "open box 1" in text
    served = Served("served", server.address, subject.directory)
    result, _ = evaluate_harness(served, "commonsense", settings, Bar())
    assert result["failures"] == {"piqa/1": 'RuntimeError: HTTP status 500: {"message": "out of order"}'}
    assert result["scores"]["piqa"]["failed"] == 1 and result["scores"]["race"]["samples"] == ROWS


def test_a_server_that_is_not_there_is_named(subject: Subject, settings: HarnessSettings) -> None:
    with scores_server(subject.model, subject.tokenizer) as gone:
        served = Served("served", gone.address, subject.directory)
        assert served.context == 512
    with pytest.raises(HyloError, match="answers no more"):
        evaluate_harness(served, "gsm8k", settings, Bar())


def test_a_long_prompt_is_cut_at_its_left(subject: Subject, server: ScoresServer) -> None:
    lm = ServedLM(Served("served", server.address, subject.directory))
    context = "The 7th row of the table. " * 300
    ((score, _),) = lm.loglikelihood([_request("loglikelihood", (context, " and"))], disable_tqdm=True)
    assert len(server.asked[-1]["prompt"]) == 511 and score < 0
    lm.generate_until([_request("generate_until", (context, {"until": ["x"], "max_gen_toks": 3}))])
    assert len(server.asked[-1]["prompt"]) == 509


@pytest.mark.skipif(not HAS_CLIENT, reason="lm-eval's own client needs lm-eval[api]")
def test_answers_are_those_of_lm_evals_own_client(subject: Subject, server: ScoresServer) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{server.address}/v1/completions"
    theirs = LocalCompletionsAPI(
        url, "huggingface", model="tiny", tokenizer=str(subject.directory), max_length=512, max_retries=1
    )
    ours = ServedLM(Served("served", server.address, subject.directory))
    pairs = [(row["goal"], " " + row[key]) for row in rows_of("piqa", 4) for key in ("sol1", "sol2")]
    requests = [_request("loglikelihood", pair) for pair in pairs]
    for own, their in zip(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests), strict=True):
        assert own == (pytest.approx(their[0], abs=1e-9), their[1])
    asked = {"until": [" the"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    requests = [_request("generate_until", (row["question"], asked)) for row in rows_of("gsm8k", 4)]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def _request(kind: Any, arguments: tuple[Any, ...]) -> Instance:
    return Instance(kind, {}, arguments, 0)
