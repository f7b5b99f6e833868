"""Serving in vLLM: a hybrid beside its base by context, a load of many clients, states in bfloat16.

Runs in the serving environment (make serve-env); benchmarks/README.md has the commands and what was measured.
"""

import argparse
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 8192
NEW = 48  # tokens of an answer
CLOSE = 1e-3  # two tokens whose log-probabilities lie so near may change places


def write_pair(out: Path) -> None:
    """A random Llama of about 100M parameters with 8 kv heads of 64, and the same with 1 MLA in 8 layers."""
    from hylo.convert import Initialisation, convert
    from hylo.plan import make_plan

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out / "base")
    words = Tokenizer(models.WordLevel({f"<t{i}>": i for i in range(VOCAB)}, unk_token="<t0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<t0>", eos_token="<t2>").save_pretrained(out / "base")
    convert(out / "base", out / "hybrid", make_plan(out / "base", "1MLA7GDN"), Initialisation(init="random"))


class Server:
    """`hylo serve DIR` and the requests that go to it."""

    def __init__(self, directory: Path, cache: str, flags: list[str]) -> None:
        import httpx

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "hylo", "serve", str(directory), "--port", str(self.port), "--name", "m"]
        command += ["--dtype", "float32", "--cache-memory", cache, "--", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready at"):
                break
        else:
            raise SystemExit("the server did not start; run hylo serve on the directory to see why")
        limits = httpx.Limits(max_connections=64)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600, limits=limits)

    def ask(self, prompt: list[int]) -> list[dict[str, float]]:
        """The greedy answer: at every step the likeliest two tokens, the one taken first."""
        body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 2, "ignore_eos": True}
        answer = self.client.post("/v1/completions", json=body | {"return_tokens_as_token_ids": True})
        answer.raise_for_status()
        said = answer.json()["choices"][0]["logprobs"]
        steps = zip(said["tokens"], said["top_logprobs"], strict=True)
        return [{token: tops[token]} | tops for token, tops in steps]

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def load(directory: Path, clients: int, seconds: float, cache: str) -> dict[str, Any]:
    """`clients` ask in turn, each the next prompt as soon as it has its answer; then every prompt is asked alone."""
    draw, config = random.Random(0), json.loads((directory / "config.json").read_text())
    longest = min(1536, config["max_position_embeddings"] - NEW)
    lengths = [round(math.exp(draw.uniform(math.log(8), math.log(longest)))) for _ in range(96)]
    questions = [[draw.randrange(10, config["vocab_size"]) for _ in range(length)] for length in lengths]
    flags = ["--enforce-eager", "--max-num-seqs", str(clients), "--max-num-batched-tokens", "1024"]
    server = Server(directory, cache, flags)
    answers: list[tuple[int, list[dict[str, float]]]] = []
    errors: list[str] = []
    waits: list[float] = []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        own = random.Random(number)
        while time.monotonic() < end:
            which, start = own.randrange(len(questions)), time.monotonic()
            try:
                answers.append((which, server.ask(questions[which])))
                waits.append(time.monotonic() - start)
            except Exception as error:
                errors.append(repr(error))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    preemptions = server.metric("vllm:num_preemptions_total")
    hits = server.metric("vllm:prefix_cache_hits_total")
    alone = {which: server.ask(questions[which]) for which in {which for which, _ in answers}}
    status = server.stop()
    equal, near, apart = 0, 0, 0
    for which, said in answers:
        first = next((pair for pair in zip(said, alone[which], strict=True) if taken(pair[0]) != taken(pair[1])), None)
        if first is None:
            equal += 1
        elif max(values := sorted(first[1].values())[-2:]) - min(values) < CLOSE:
            near += 1
        else:
            apart += 1
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(answers),
        "errors": errors,
        "equal": equal,
        "differing where two tokens are close": near,
        "differing otherwise": apart,
        "preemptions": preemptions,
        "tokens from the prefix cache": hits,
        "median seconds a request": statistics.median(waits),
        "status": status,
    }


def taken(step: dict[str, float]) -> str:
    return next(iter(step))


def states(directory: Path, texts: list[str], new: int = 256) -> dict[str, Any]:
    """How far log-probabilities of greedy answers move where states are stored in bfloat16 after every token.

    An answer is compared up to where it takes another token than in float32.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tokenizer = AutoTokenizer.from_pretrained(directory)
    questions = [{"prompt_token_ids": tokenizer(text)["input_ids"][:1024]} for text in texts]
    how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1)
    said: dict[str, list[Any]] = {}
    for dtype in ("float32", "bfloat16"):
        llm = LLM(
            str(directory),
            dtype="float32",
            mamba_ssm_cache_dtype=dtype,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
        )
        said[dtype] = [answer.outputs[0] for answer in llm.generate(questions, how, use_tqdm=False)]
        del llm
        cleanup_dist_env_and_memory()
    moved, whole = [], 0
    for full, half in zip(said["float32"], said["bfloat16"], strict=True):
        same = [a == b for a, b in zip(full.token_ids, half.token_ids, strict=True)]
        until = same.index(False) if False in same else len(same)
        whole += until == len(same)
        for step, token in enumerate(full.token_ids[:until]):
            moved.append(abs(full.logprobs[step][token].logprob - half.logprobs[step][token].logprob))
    moved.sort()
    return {
        "answers": len(questions),
        "the same for all tokens": whole,
        "tokens compared": len(moved),
        "mean": statistics.mean(moved),
        "median": statistics.median(moved),
        "99th percentile": moved[int(0.99 * len(moved))],
        "largest": moved[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pair", "load", "states"):
        commands.add_parser(name).add_argument("directory", type=Path)
    commands.choices["load"].add_argument("--clients", type=int, default=32)
    commands.choices["load"].add_argument("--seconds", type=float, default=180)
    commands.choices["load"].add_argument("--cache", default="1GiB")
    commands.choices["states"].add_argument("--text", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    if arguments.command == "pair":
        write_pair(arguments.directory)
    elif arguments.command == "load":
        print(json.dumps(load(arguments.directory, arguments.clients, arguments.seconds, arguments.cache), indent=1))
    else:
        texts = [path.read_text() for path in arguments.text]
        print(json.dumps(states(arguments.directory, texts), indent=1))


if __name__ == "__main__":
    main()
