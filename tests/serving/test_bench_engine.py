"""`hylo bench serve` and `hylo serve` on vLLM's own engine, with tiny dense models."""

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hylo

TEACHER = Path(hylo.__file__).parent / "demo" / "teacher"  # with a tokenizer


def _hylo(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "hylo", *map(str, arguments)]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 KiB of cache a token in float32, no tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.skipif(torch.cuda.is_available(), reason="block sizes and bytes are a CPU's")
def test_latency_through_the_engine(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency"
    options = ["--lengths", "128,256,512,2k", "--concurrency", "1,2", "--new-tokens", 4, "--repeats", 2]
    command = _hylo("bench", "serve", tiny_llama, *options, "--cache-memory", "512KiB", "--eager", "--out", out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "latency.json").read_text())
    (model,) = result["models"]
    assert result["kind"] == "serve" and model["dtype"] == "float32"
    assert model["engine"]["kv_bytes_per_token"] == 1024 and model["engine"]["state_bytes_per_sequence"] == 0
    assert model["engine"]["num_blocks"] == 4 and model["engine"]["groups"][0]["block_size"] == 128
    points = {(point["length"], point["concurrency"]): point for point in model["points"]}
    for place in ((128, 1), (128, 2), (256, 1)):
        assert points[place]["status"] == "measured" and 0 < points[place]["ttft"] < 60
        assert len(points[place]["tpot_of_repeats"]) == 2 and points[place]["tpot"] > 0
    assert points[256, 2]["reason"] == "the cache holds 1 of 2 sequences"  # three blocks of 128 tokens, one is vLLM's
    assert {points[512, n]["status"] for n in (1, 2)} == {"out of memory"}  # the engine does not start
    assert {points[2048, n]["status"] for n in (1, 2)} == {"beyond the model's length"}
    assert (out / "latency.png").is_file() and (out / "latency.svg").is_file()


def test_a_server_is_watched(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log.txt"
    command = _hylo("serve", TEACHER, "--port", port, "--cache-memory", "64MiB", "--", "--enforce-eager")
    with log.open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=tmp_path)
        try:
            assert server.stdout is not None
            assert any("ready at" in line for line in server.stdout), log.read_text()[-2000:]
            body = json.dumps({"model": "teacher", "prompt": "def f", "max_tokens": 4}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
            (engine,) = (p for p in psutil.Process(server.pid).children(recursive=True) if "EngineCore" in _title(p))
            engine.kill()
            assert server.wait(120) != 0
            assert log.read_text().splitlines()[-1].startswith("hylo: "), log.read_text()[-2000:]
        finally:
            server.terminate()
            server.wait(60)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
