"""`hylo teacher-cache`, and `hylo extend` from a cache, as a user calls them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Done, hylo

from hylo.modeling.loading import load_model

GEOMETRY = ("--set", "q_lora_rank=16", "--set", "qk_rope_head_dim=4", "--rank", "8")
ORDER = ("--length", 32, "--rows", 2, "--tokens", 512, "--facts", 0.5, "--seed", 3, "--precision", "float32")


@pytest.fixture(scope="module")
def student(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "converted"
    assert hylo("convert", tiny_base, out, "--layout", "1MLA2GDN", *GEOMETRY).returncode == 0
    return out


@pytest.fixture(scope="module")
def cache(tiny_base: Path, text_file: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    done = hylo("teacher-cache", tiny_base, text_file, out, "--student", student, *ORDER, "--shard-gib", 0.00001)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("512 tokens of 140 bytes each, 70.0 KiB in all" in line for line in lines), lines
    assert lines[-1] == f"wrote {out}"
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def refused(done: Done, *named: str) -> None:
    assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    assert all(part in done.stderr for part in named), done.stderr


def test_extend_needs_nothing_but_the_cache_and_trains_as_from_the_teacher(
    cache: Path, student: Path, tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    common = ("--learning-rate", "1e-3", "--yarn-original", 16)
    done = hylo("extend", student, tmp_path / "cached", "--teacher-cache", cache, *common)
    assert done.returncode == 0 and "checking" in done.stdout, done.stderr
    live = ("--teacher", tiny_base, "--data", text_file, *ORDER, "--frozen-head")
    done = hylo("extend", student, tmp_path / "live", *live, *common)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "cached")) == 8
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    model = load_model(tmp_path / "cached")
    assert not model.config.tie_word_embeddings and model.config.mla_rope_parameters["factor"] == 2.0
    assert (tmp_path / "cached" / "tokenizer.json").exists()
    done = hylo("extend", student, tmp_path / "same", "--teacher-cache", cache, *common, *ORDER, "--data", text_file)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "same") == losses(tmp_path / "cached")


def test_several_sources(cache: Path, tiny_base: Path, student: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.md").write_text("more text, and more of it. " * 50)
    sources = (text_file, tmp_path / "more")
    done = hylo("teacher-cache", tiny_base, *sources, tmp_path / "out", "--student", student, *ORDER)
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert recipe["data"] == [str(source) for source in sources] and (recipe["facts"], recipe["seed"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), ("either --teacher and --data, or --teacher-cache",)),
        (("--teacher", "BASE"), ("either --teacher and --data, or --teacher-cache",)),
        (("--data", "TEXT"), ("either --teacher and --data, or --teacher-cache",)),
        (("--teacher-cache", "CACHE", "--teacher", "BASE", "--data", "TEXT"), ("not both",)),
        (("--teacher-cache", "CACHE", "--length", 64), ("length 32, not 64",)),
        (("--teacher-cache", "CACHE", "--rows", 1), ("rows 2, not 1",)),
        (("--teacher-cache", "CACHE", "--facts", 0), ("facts 0.5, not 0.0",)),
        (("--teacher-cache", "CACHE", "--seed", 4), ("seed 3, not 4",)),
        (("--teacher-cache", "CACHE", "--tokens", 1024), ("holds 512 tokens, fewer than 1024",)),
        (("--teacher-cache", "CACHE", "--tokens", 0), ("--tokens 0",)),
        (("--teacher-cache", "CACHE", "--data", "OTHER"), ("gives other rows",)),
        (("--teacher-cache", "CACHE", "--track", "nonsense"), ("--track nonsense", "trackio or wandb")),
        (("--teacher-cache", "nowhere"), ("teacher cache nowhere does not exist",)),
        (("--teacher-cache", "BASE"), ("holds no manifest.json",)),
    ],
)
def test_what_does_not_fit_is_refused(
    cache: Path,
    student: Path,
    tiny_base: Path,
    text_file: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    named: tuple[str, ...],
) -> None:
    other = text_file.with_name("other.txt")
    other.write_text(text_file.read_text()[1000:])
    places = {"BASE": tiny_base, "TEXT": text_file, "CACHE": cache, "OTHER": other}
    given = [places.get(str(option), option) for option in options]
    refused(hylo("extend", student, tmp_path / "out", *given), *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"DATA": "nowhere", "--length": 32}, "text nowhere does not exist"),
        ({"DATA": None}, "Missing argument 'data'"),
        ({"TEACHER": "nowhere"}, "nowhere does not exist"),
        ({"--student": "nowhere"}, "nowhere"),
        ({"--student": None}, "Missing option '--student'"),
        ({"--dtype": "float16"}, "--dtype"),
        ({"--length": 1024}, "exceed the 512"),
        ({"--length": 0}, "--length 0"),
        ({"--rows": -1}, "--rows -1"),
        ({"--seed": -1}, "--seed -1"),
        ({"--facts": 2}, "--facts"),
        ({"--shard-gib": 0}, "--shard-gib"),
    ],
)
def test_a_cache_of_bad_input_is_not_begun(
    tiny_base: Path, student: Path, text_file: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    values = {"TEACHER": tiny_base, "DATA": text_file, "OUT": tmp_path / "out", "--student": student} | change
    arguments = [v for key, v in values.items() if not key.startswith("-") and v is not None]
    options = [part for key, v in values.items() if key.startswith("-") and v is not None for part in (key, v)]
    refused(hylo("teacher-cache", *arguments, *options), named)
    assert not list(tmp_path.iterdir())


def test_a_killed_command_goes_on_where_it_was(tiny_base: Path, student: Path, text_file: Path, tmp_path: Path) -> None:
    order = ("--length", 16, "--rows", 2, "--tokens", 16 * 200, "--precision", "float32", "--shard-gib", 0.000001)

    def arguments(out: Path) -> list[str]:
        return [str(part) for part in ("teacher-cache", tiny_base, text_file, out, "--student", student, *order)]

    out, journal = tmp_path / "cache", tmp_path / "cache.partial" / "shards.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "hylo", *arguments(out)], stdout=subprocess.DEVNULL)
    waited = time.monotonic()
    while not (journal.exists() and journal.read_text().count("\n") >= 3) and time.monotonic() - waited < 120:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    there = journal.read_text().count("\n")
    refused(
        hylo("extend", student, tmp_path / "x", "--teacher-cache", out), "incomplete", "teacher-cache command again"
    )
    refused(hylo(*arguments(out), "--seed", 1), "cache.partial is part of another cache (seed 0, not 1)")
    refused(hylo(*arguments(tmp_path / "cache.partial")), "exists already")

    done = hylo(*arguments(out))
    assert done.returncode == 0 and f"{there} of 200 shards are there already" in done.stdout, done.stderr
    assert hylo(*arguments(tmp_path / "whole")).returncode == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert not journal.parent.exists()
    refused(hylo(*arguments(out)), "exists already")


def test_a_full_disk_is_one_line(tiny_base: Path, student: Path, text_file: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's."""
    arguments = ("teacher-cache", tiny_base, text_file, tmp_path / "cache", "--student", student, *ORDER)
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from hylo.cli import main; "
        f"main({[str(argument) for argument in arguments]})"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cache.partial: File too large; free space" in done.stderr and not (tmp_path / "cache").exists()
    assert [path.name for path in (tmp_path / "cache.partial").glob("*")] and not list(tmp_path.glob("*/.rows*"))
    assert hylo(*arguments).returncode == 0


def test_a_damaged_shard_and_another_head_are_refused(
    cache: Path, student: Path, tiny_base: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    data = bytearray((damaged / "rows-00003.safetensors").read_bytes())
    data[-40] ^= 16
    (damaged / "rows-00003.safetensors").write_bytes(data)
    done = hylo("extend", student, tmp_path / "out", "--teacher-cache", damaged)
    refused(done, "rows-00003.safetensors is damaged")
    model = load_model(student)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    shutil.copyfile(student / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    done = hylo("extend", tmp_path / "other", tmp_path / "out", "--teacher-cache", cache)
    refused(done, "the lm_head of", "other", "is not the one", "--student")
    refused(hylo("extend", tiny_base, tmp_path / "out", "--teacher-cache", cache), "convert it first")
    assert not (tmp_path / "out").exists()
