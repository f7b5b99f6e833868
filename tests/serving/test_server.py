"""`hylo serve` as a user has it: the OpenAI-compatible address in front of vLLM's own processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from serving import VOCAB, prompts, reference, write_hybrid

START_SECONDS = 240
WHOLE = {"ignore_eos": True, "skip_special_tokens": False}


class Server:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "hylo", "serve", str(directory), "--port", str(self.port), "--name", "hybrid"]
        command += ["--cache-memory", "64MiB", "--start-timeout", str(START_SECONDS)]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        flags = ["--", "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "128"]
        self.process = subprocess.Popen(
            [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("ready at"):
                break
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def healthy(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
            return bool(answer.status == 200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(write_hybrid(tmp_path_factory.mktemp("server") / "model", "mgms"))
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0


def words(ids: list[int]) -> str:
    return "".join(f"<t{i}>" for i in ids)


def test_it_prints_its_flags_and_is_ready(server: Server) -> None:
    said = "".join(server.said)
    assert "--max-model-len 512" in said and "--dtype float32" in said and "ready at" in said
    assert server.healthy()


def test_answers_are_those_of_generate_however_many_ask(server: Server) -> None:
    """Prompts in chunks, requests that come and go: in vLLM's normal mode, with processes of its own."""
    questions = prompts((7, 33, 150, 1, 129, 70, 200, 12, 64, 128, 3, 90))
    expected = [tokens for tokens, _ in reference(server.directory, questions, new=32)]

    def answer(ids: list[int]) -> str:
        said = server.client.completions.create(
            model="hybrid", prompt=ids, max_tokens=32, temperature=0, extra_body=WHOLE
        )
        return said.choices[0].text.replace(" ", "")

    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(answer, questions)) == [words(tokens) for tokens in expected]


def test_log_probabilities(server: Server) -> None:
    question = prompts((33,))
    ((tokens, logprobs),) = reference(server.directory, question, new=8)
    said = server.client.completions.create(
        model="hybrid", prompt=question[0], max_tokens=8, temperature=0, logprobs=2, extra_body=WHOLE
    )
    given = said.choices[0].logprobs
    assert given is not None and given.token_logprobs is not None
    for step, (token, logprob) in enumerate(zip(tokens, given.token_logprobs, strict=True)):
        assert logprob == pytest.approx(logprobs[step, token].item(), abs=1e-4)


def test_streaming_and_stop_strings(server: Server) -> None:
    question = prompts((20,))[0]
    options = {"model": "hybrid", "prompt": question, "max_tokens": 24, "temperature": 0}
    whole = server.client.completions.create(**options, extra_body=WHOLE).choices[0].text
    pieces = server.client.completions.create(**options, stream=True, extra_body=WHOLE)
    streamed = [piece.choices[0].text for piece in pieces]
    assert len(streamed) > 5 and "".join(streamed) == whole
    stop = whole.replace(" ", "").split("><")[6].strip("<>") + ">"
    stopped = server.client.completions.create(**options, stop=[stop], extra_body=WHOLE).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == whole[: whole.index(stop)]


def test_sampling_follows_its_seed(server: Server) -> None:
    def sampled(seed: int) -> str:
        said = server.client.completions.create(
            model="hybrid", prompt=[10, 11, 12], max_tokens=24, temperature=1.5, top_p=0.95, seed=seed
        )
        return said.choices[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_chat_goes_through_the_template(server: Server) -> None:
    """The template frames a message with <t1> <t4> ... <t5> <t6>."""
    said = server.client.chat.completions.create(
        model="hybrid",
        messages=[{"role": "user", "content": "<t20> <t21>"}],
        max_tokens=16,
        temperature=0,
        extra_body=WHOLE,
    )
    assert said.usage is not None and said.usage.prompt_tokens == 6
    ((tokens, _),) = reference(server.directory, [[1, 4, 20, 21, 5, 6]], new=16)
    assert (said.choices[0].message.content or "").replace(" ", "") == words(tokens)


def test_bad_requests_leave_it_up(server: Server) -> None:
    with pytest.raises(BadRequestError) as refused:
        server.client.completions.create(model="hybrid", prompt=[10] * 600, max_tokens=1)
    assert "512" in json.dumps(refused.value.body)
    with pytest.raises(BadRequestError):
        server.client.completions.create(model="hybrid", prompt=[10, VOCAB + 5], max_tokens=1)
    assert server.healthy()
    assert server.client.completions.create(model="hybrid", prompt=[10, 11], max_tokens=1).choices
