"""A served model is asked with token ids, several at once, and what can go wrong with it is said by name."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from completions_server import completions_server

from hylo.errors import HyloError
from hylo.evaluate.generation import Prompt
from hylo.evaluate.served import IN_FLIGHT, Served, ServedGenerator

PROMPTS = [Prompt([7, 8, n], 5 + n) for n in range(1, 7)]


def echo(ids: list[int], tokens: int) -> Any:
    return f"{ids} {tokens}"


def test_answers_are_those_of_the_prompts(tiny_base: Path) -> None:
    with completions_server(echo) as server:
        served = Served("tiny", server.address, tiny_base)
        answers = dict(ServedGenerator(served).generate(PROMPTS))
        assert answers == {i: echo(prompt.ids, prompt.new_tokens) for i, prompt in enumerate(PROMPTS)}
        assert {(asked["model"], asked["temperature"]) for asked in server.asked} == {("tiny", 0)}
        assert served.context == 512


def test_several_are_in_flight(tiny_base: Path) -> None:
    together = threading.Barrier(IN_FLIGHT, timeout=10)

    def answer(ids: list[int], tokens: int) -> str:
        together.wait()
        return "ready"

    with completions_server(answer) as server:
        prompts = [Prompt([n], 1) for n in range(IN_FLIGHT)]
        answers = dict(ServedGenerator(Served("tiny", server.address, tiny_base)).generate(prompts))
    assert answers == dict.fromkeys(range(IN_FLIGHT), "ready")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((400, {"message": "too long"}), 'HTTP status 400: {"message": "too long"}'),
        ((200, {"choices": []}), "no completion"),
        (None, "Remote end closed connection"),
    ],
)
def test_a_request_that_fails_is_one_failed_prompt(tiny_base: Path, said: Any, reason: str) -> None:
    with completions_server(lambda ids, tokens: said if ids[-1] == 3 else echo(ids, tokens)) as server:
        answers = dict(ServedGenerator(Served("tiny", server.address, tiny_base)).generate(PROMPTS))
    failed = {i for i, answer in answers.items() if isinstance(answer, Exception)}
    assert failed == {2}
    assert reason in str(answers[2])
    assert len(answers) == len(PROMPTS)


def test_a_server_that_dies_is_named(tiny_base: Path) -> None:
    with completions_server(echo) as server:
        served = Served("tiny", server.address, tiny_base)
        assert served.card["id"] == "tiny"
        server.stop()
        with pytest.raises(HyloError, match=f"{server.address} answers no more .*refused.* start it again"):
            dict(ServedGenerator(served).generate(PROMPTS))


def test_nobody_at_the_address(tiny_base: Path) -> None:
    with completions_server(echo) as server:
        pass
    with pytest.raises(HyloError, match=f"no server answers at {server.address} .*refused"):
        Served("tiny", server.address, tiny_base).check_context([5], "RULER")


def test_unknown_models_are_named(tiny_base: Path) -> None:
    with completions_server(echo, models=("one", "two")) as server:
        with pytest.raises(HyloError, match="does not serve three; choose one of one, two"):
            _ = Served("tiny", server.address, tiny_base, "three").card
        with pytest.raises(HyloError, match="serves several models; choose one of one, two"):
            _ = Served("tiny", server.address, tiny_base).card
        assert Served("tiny", server.address + "/v1/", tiny_base, "two").card["id"] == "two"


def test_the_server_says_its_context(tiny_base: Path) -> None:
    with completions_server(echo, context=64) as server:
        served = Served("tiny", server.address, tiny_base)
        served.check_context([64], "RULER")
        with pytest.raises(HyloError, match="RULER at 65 tokens exceeds what .* takes, 64"):
            served.check_context([32, 65], "RULER")
    with completions_server(echo, context=None) as server:
        Served("tiny", server.address, tiny_base).check_context([10**6], "RULER")


def test_another_served_model_has_another_hash(tiny_base: Path) -> None:
    with completions_server(echo, models=("one", "two")) as server:
        hashes = {Served("tiny", server.address, tiny_base, model).hash for model in ("one", "two", "one")}
    assert len(hashes) == 2


def test_a_served_directory_with_other_weights_has_another_hash(tiny_base: Path, tmp_path: Path) -> None:
    """As of a server that was started again after more training."""
    shutil.copytree(tiny_base, tmp_path / "served")
    weights, hashes = tmp_path / "served" / "model.safetensors", set()
    for _ in range(2):
        served = Served("tiny", "http://127.0.0.1:1", tiny_base)
        vars(served)["card"] = {"id": "tiny", "root": str(tmp_path / "served")}
        hashes.add(served.hash)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert len(hashes) == 2


def test_the_key_goes_along(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with completions_server(echo) as server:
        dict(ServedGenerator(Served("tiny", server.address, tiny_base)).generate(PROMPTS[:1]))
    assert server.headers[0]["Authorization"] == "Bearer secret"
