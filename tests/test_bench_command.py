"""`hylo bench` as a user calls it: the Hugging Face path on tiny models, and what becomes of points that fail."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command import hylo

from hylo.serve.curves import draw_latency
from hylo.serve.latency import BEYOND, FAILED, LEFT_OUT, MEASURED, OUT_OF_MEMORY, Job, Model, measure, places

QUICK = ("--new-tokens", 3, "--repeats", 2, "--warmup", 0)


def test_generate_measures_base_and_hybrid(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the children
    hybrid, out = tmp_path / "hybrid", tmp_path / "latency"
    assert hylo("convert", tiny_base, hybrid, "--layout", "1MLA2GDN").returncode == 0
    done = hylo(
        "bench", "generate", tiny_base, hybrid, "--lengths", "64,32,1k", "--concurrency", "2", *QUICK, "--out", out
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "latency.json").read_text())
    assert result["kind"] == "generate" and result["device"] and result["versions"]["torch"]
    assert result["settings"]["lengths"] == [32, 64, 1024] and result["settings"]["concurrency"] == [2]
    assert [model["model"] for model in result["models"]] == ["tiny-llama", "hybrid"]
    for model, layout in zip(result["models"], ("3A", "1MLA2GDN"), strict=True):
        assert model["layout"] == layout and model["dtype"] == "float32"
        short, long, beyond = model["points"]
        assert (short["length"], long["length"], beyond["length"]) == (32, 64, 1024)
        assert short["status"] == MEASURED and beyond["status"] == BEYOND and "ttft" not in beyond
        assert short["ttft"] > 0 and short["tpot"] > 0 and len(short["tpot_of_repeats"]) == 2
        grown = long["cache_bytes"] - short["cache_bytes"]
        plan = json.loads(hylo("plan", tiny_base, "--layout", layout, "--json").stdout)
        assert grown == 2 * 32 * plan["kv_bytes_per_token"]
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "latency.svg").read_text()
    assert svg.startswith("<svg xmlns") and "tiny-llama" in svg and "hybrid" in svg
    assert "1K" in done.stdout and "beyond" in done.stdout


def test_running_out_of_memory_is_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "helpers"))
    job = Job("nowhere", places([256, 1024, 4096, 8192], [1, 2], 2), new_tokens=2, any_length=True)
    said: list[str] = []
    models = [Model("a", job, 128, {}), Model("b", replace(job, dtype="broken", any_length=False), 256, {})]
    results = measure("dying_child", models, said.append)
    points = {(p["length"], p["concurrency"]): p["status"] for p in results[0]["points"]}
    assert points == {
        (256, 1): MEASURED,
        (256, 2): MEASURED,
        (1024, 1): MEASURED,
        (1024, 2): OUT_OF_MEMORY,  # MemoryError
        (4096, 1): OUT_OF_MEMORY,  # killed
        (4096, 2): LEFT_OUT,  # more of both than what ran out
        (8192, 1): OUT_OF_MEMORY,  # the model did not start
        (8192, 2): OUT_OF_MEMORY,
    }
    assert results[0]["engine"] == "none" and results[0]["points"][0]["tpot"] == pytest.approx(0.5)
    assert any("a: 4,096 tokens, 1 at once: out of memory" in line for line in said)
    broken = results[1]["points"]  # the run went on to the next model, whose failure is its own
    assert [point["status"] for point in broken] == [FAILED, FAILED, *[BEYOND] * 6]
    assert broken[0]["reason"] == "ValueError: this is no model"
    drawing = draw_latency({"models": results})
    assert drawing is not None and "a cross: out of memory" in drawing.svg
    assert draw_latency({"models": results[1:]}) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lengths", "4q"), "'4q' is no number of tokens"),
        (("--lengths", "1k,,2k"), "'' is no number of tokens"),
        (("--lengths", "16"), "leaves no prompt before 32 new tokens"),
        (("--concurrency", "0"), "--concurrency 0: write whole numbers above 0"),
        (("--repeats", "0"), "--repeats"),
        (("--new-tokens", "1"), "--new-tokens"),
    ],
)
def test_bad_options_are_one_line(tiny_base: Path, tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    done = hylo("bench", "generate", tiny_base, *options, "--out", tmp_path / "out")
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_directories_and_no_engine_are_one_line(
    tiny_base: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = ("--out", tmp_path / "out")
    monkeypatch.setattr("hylo.serve.versions.DISTRIBUTIONS", ("no-such-package",))
    mixed = tmp_path_factory.mktemp("other") / "mixed"
    shutil.copytree(tiny_base, mixed)
    config = json.loads((mixed / "config.json").read_text()) | {"head_dim": 12}
    (mixed / "config.json").write_text(json.dumps(config))
    for arguments, named in (
        (("generate", mixed, *out), "in another shape than config.json says"),
        (("generate", tiny_base, tmp_path / "nowhere", *out), "nowhere does not exist"),
        (("serve", tiny_base, tmp_path / "nowhere", *out), "nowhere does not exist"),
        (("serve", tiny_base, *out), "vLLM is not installed"),
        (("serve", tiny_base, "--cache-memory", "some", *out), "--cache-memory some: write a size"),
        (("generate", tiny_base, "--out", tmp_path), "exists already"),
    ):
        done = hylo("bench", *arguments)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
