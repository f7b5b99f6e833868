"""`hylo serve` and `hylo plan --serve` as a user calls them, with a stand-in where vLLM's server would be."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import hylo
from safetensors.torch import load_file, save_file

from hylo.errors import HyloError
from hylo.serve import server
from hylo.serve.server import reason_in, run_server

STAND_IN = Path(__file__).parent / "helpers" / "stand_in_server.py"
CACHE = ("--cache-memory", "64MiB")


@pytest.fixture(scope="module")
def hybrid(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "tiny-hybrid"
    assert hylo("convert", tiny_base, directory, "--layout", "1MLA2GDN").returncode == 0
    return directory


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.2)


def test_the_command_line_says_what_the_model_says(tiny_base: Path, hybrid: Path) -> None:
    done = hylo("serve", hybrid, "--dry-run", *CACHE, "--port", 9000, "--name", "small", "--", "--enforce-eager")
    assert done.returncode == 0, done.stderr
    words = done.stdout.strip().splitlines()[-1].split()
    flags = dict(zip(words, words[1:], strict=False))
    assert str(hybrid) in words and words[-1] == "--enforce-eager"
    assert flags["--max-model-len"] == "512" and flags["--dtype"] == "float32"
    assert flags["--mamba-ssm-cache-dtype"] == "float32" and flags["--kv-cache-memory-bytes"] == str(64 << 20)
    assert flags["--served-model-name"] == "small" and flags["--port"] == "9000"
    assert "--block-size" not in words and "--tensor-parallel-size" not in words
    assert "block:" in done.stdout and "largest context" in done.stdout

    options = ("--max-model-len", "256", "--dtype", "bfloat16", "--state-dtype", "bfloat16", "--tensor-parallel", 2)
    words = hylo("serve", tiny_base, "--dry-run", *CACHE, *options, "--block-size", 64).stdout.split()
    flags = dict(zip(words, words[1:], strict=False))
    assert flags["--max-model-len"] == "256" and flags["--dtype"] == "bfloat16" and flags["--block-size"] == "64"
    assert flags["--tensor-parallel-size"] == "2" and "--mamba-ssm-cache-dtype" not in words  # a base has no state


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the cache is vLLM's choice")
def test_a_cpu_gets_half_of_what_is_free_or_what_the_variable_says(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache() -> int:
        words = hylo("serve", tiny_base, "--dry-run").stdout.split()
        return int(words[words.index("--kv-cache-memory-bytes") + 1])

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr("hylo.serve.command.free_memory", lambda: 4 << 30)
    assert 1.9 * 2**30 < cache() <= 2**31
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cache() == 3 << 30
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3.5")
    done = hylo("serve", tiny_base, "--dry-run")
    assert done.returncode == 2 and "VLLM_CPU_KVCACHE_SPACE=3.5 is no number of GiB" in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--max-model-len", "1024"), "supports 512 tokens at most"),
        (("--cache-memory", "1KiB"), "too small for one sequence of 512 tokens"),
        (("--cache-memory", "lots"), "--cache-memory lots: write a size such as 80GiB"),
        (("--max-model-len", "4x"), "'4x' is no number of tokens"),
        (("--max-model-len", "64,128"), "give one length"),
        (("--tensor-parallel", "3"), "3 devices"),
        (("extra",), "extra is no flag of vllm serve"),
        (("--", "--port", "3"), "give --port before the --"),
        (("--", "--max_model_len=3"), "give --max-model-len before the --"),
        (("--enforce-eager",), "--enforce-eager"),
    ],
)
def test_bad_options_are_one_line(tiny_base: Path, options: tuple[str, ...], named: str) -> None:
    memory = () if "--cache-memory" in options else CACHE
    done = hylo("serve", tiny_base, "--dry-run", *memory, *options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_cache_too_small_names_the_length_that_fits(tiny_base: Path) -> None:
    done = hylo("serve", tiny_base, "--dry-run", "--cache-memory", "200KB")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    fits = int(done.stderr.split("give --max-model-len ")[1].split(",")[0])
    assert 0 < fits < 512 and f"{fits} fit" in done.stderr
    done = hylo("serve", tiny_base, "--dry-run", "--cache-memory", "200KB", "--max-model-len", fits)
    assert done.returncode == 0, done.stderr


def test_damaged_directories_are_one_line(hybrid: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    def refused(named: str, spoil: Callable[[Path], object]) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(hybrid, broken)
        spoil(broken)
        done = hylo("serve", broken, "--dry-run", *CACHE)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr

    def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
        def spoil(directory: Path) -> None:
            tensors = load_file(directory / "model.safetensors")
            change(tensors)
            save_file(tensors, directory / "model.safetensors")

        return spoil

    def config(**changes: object) -> Callable[[Path], object]:
        def spoil(directory: Path) -> None:
            path = directory / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return spoil

    norm = "model.norm.weight"
    refused("lacks model.norm.weight", rewrite(lambda tensors: tensors.pop(norm)))
    refused("unexpected extra", rewrite(lambda tensors: tensors.update(extra=torch.zeros(1))))
    refused("model.norm.weight in another shape", rewrite(lambda tensors: tensors.update({norm: torch.zeros(3)})))
    refused("holds no model.safetensors", lambda directory: (directory / "model.safetensors").unlink())
    whole = (hybrid / "model.safetensors").read_bytes()
    refused("not a whole safetensors", lambda d: (d / "model.safetensors").write_bytes(whole[: len(whole) // 2]))
    refused("is of model_type mamba2x", config(model_type="mamba2x", architectures=["mamba2xForCausalLM"]))
    refused("unknown mixers", config(mixers=["mla", "rwkv", "mla"]))
    refused("base_model_type gpt2", config(base_model_type="gpt2"))
    refused("not valid", config(num_attention_heads="many"))
    refused("a released checkpoint", lambda directory: (directory / "hybrid_config.json").write_text("{}"))
    done = hylo("serve", tmp_path / "nowhere", "--dry-run")
    assert done.returncode == 2 and "does not exist" in done.stderr


def test_without_vllm_nothing_starts(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.serve.versions.DISTRIBUTIONS", ("no-such-package",))
    done = hylo("serve", tiny_base, *CACHE)
    assert done.returncode == 2 and "vLLM is not installed" in done.stderr and done.stderr.count("\n") == 1


def _run(behaviour: str, port: int, ready: Callable[[], object] = lambda: None, seconds: float = 20) -> int:
    command = [sys.executable, str(STAND_IN), behaviour, "--port", str(port)]
    return run_server(command, "127.0.0.1", port, seconds, lambda: ready() and None, os.environ)


def test_the_server_is_started_and_reported_ready(tiny_base: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.serve.versions.check_vllm", lambda: "0.32.0")
    monkeypatch.setattr("hylo.serve.command._program", lambda: [sys.executable, str(STAND_IN), "polite"])
    before = signal.getsignal(signal.SIGTERM)
    stop = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    done = hylo("serve", tiny_base, *CACHE, "--port", port, "--", "--some-flag")
    stop.cancel()
    assert done.returncode == 0, done.stderr
    assert f"ready at http://127.0.0.1:{port}/v1, model tiny-llama" in done.stdout
    assert f"arguments: {tiny_base} --served-model-name tiny-llama" in done.stderr  # the log goes through
    assert "--some-flag" in done.stderr and signal.getsignal(signal.SIGTERM) is before


def test_a_server_that_dies_before_it_answers(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HyloError, match=r"ended before it answered: ValueError: no room for one sequence$"):
        _run("dies", port)
    assert "INFO starting" in capfd.readouterr().err


def test_a_server_that_never_answers(port: int) -> None:
    started = time.monotonic()
    with pytest.raises(HyloError, match=r"did not answer within 1 s; give it more with --start-timeout"):
        _run("silent", port, seconds=1)
    assert time.monotonic() - started < 8


def test_an_engine_that_dies_while_it_serves(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("dying engine", port) == 1
    assert "hylo: vLLM's engine died: RuntimeError: the device was lost" in capfd.readouterr().err


def test_a_server_that_dies_while_it_serves(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("short", port) == 128 + signal.SIGKILL
    assert "hylo: vllm serve ended by itself, with status 137: FatalError: enough" in capfd.readouterr().err


def test_a_second_signal_ends_a_server_that_ignores_the_first(port: int) -> None:
    def twice() -> None:
        for seconds in (0.1, 0.4):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()

    assert _run("stubborn", port, ready=twice) == 128 + signal.SIGKILL


def test_a_taken_port_is_said_at_once(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(HyloError, match="choose another --port"):
            _run("polite", port)


def test_the_reason_is_the_cause() -> None:
    log = ["INFO fine", "  ValueError: too small", "RuntimeError: Engine core initialization failed. See", ""]
    assert reason_in(log) == "ValueError: too small"
    assert reason_in(["no", "killed"]) == "killed" and reason_in([]) == "it said nothing"


def test_plan_of_a_server(tiny_base: Path, hybrid: Path) -> None:
    done = hylo("plan", hybrid, "--serve", "--memory", "2GiB", "--json")
    served = json.loads(done.stdout)["serve"]
    assert served["kv_bytes_per_token"] == json.loads(done.stdout)["kv_bytes_per_token"]
    assert served["state_bytes_per_sequence"] == json.loads(done.stdout)["state_bytes_per_sequence"]
    assert served["tokens"] > served["max_model_len"] == 512 and served["platform"] == "cuda"
    planned = hylo("plan", tiny_base, "--layout", "1MLA2GDN", "--serve", "--memory", "2GiB", "--json")
    assert json.loads(planned.stdout)["serve"] == served
    done = hylo("plan", tiny_base, "--serve", "--max-model-len", "256", "--platform", "cpu")  # the base as it is
    assert done.returncode == 0 and "3 attention" in done.stdout and "256 tokens" in done.stdout
    shared = hylo("plan", tiny_base, "--layout", "3MLA", "--serve", "--tensor-parallel", "2", "--memory", "2GiB")
    assert "warning: each of the 2 devices holds MLA's latents whole" in shared.stdout


def test_plan_of_a_hybrid_is_its_own(tiny_base: Path, hybrid: Path) -> None:
    own, planned = hylo("plan", hybrid, "--json"), hylo("plan", tiny_base, "--layout", "1MLA2GDN", "--json")
    assert own.returncode == 0 and json.loads(own.stdout) == json.loads(planned.stdout)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("hybrid", ("--layout", "3MLA"), "whose layout and geometry are settled"),
        ("hybrid", ("--set", "kv_lora_rank=4"), "whose layout and geometry are settled"),
        ("hybrid", ("--memory", "1GiB"), "add --serve"),
        ("hybrid", ("--serve", "--memory", "much"), "--memory much: write a size"),
        ("hybrid", ("--serve", "--memory", "64KiB"), "no room for a cache"),
        ("base", (), "give --layout"),
        ("base", ("--serve", "--max-model-len", "0"), "no number of tokens"),
    ],
)
def test_bad_plans_are_one_line(tiny_base: Path, hybrid: Path, kind: str, options: tuple[str, ...], named: str) -> None:
    done = hylo("plan", hybrid if kind == "hybrid" else tiny_base, *options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
