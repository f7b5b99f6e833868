"""The benchmarks' own code, on models small enough for a test."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hylo.convert import Initialisation, convert
from hylo.demo import TEACHER
from hylo.plan import make_plan

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def conversion() -> ModuleType:
    return script("conversion")


@reads_proc
def test_a_case_is_made_measured_and_reported(
    conversion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(command: list[str], threads: int) -> Any:
        """The conversion alone, without the seconds that a fresh process takes to import."""
        if "convert" in command and "--dry-run" not in command:
            base, out, _, layout = command[command.index("convert") + 1 :]
            convert(Path(base), Path(out), make_plan(Path(base), layout))
        return conversion.Run(1.0, 1.0, 0.0, 1 << 20)

    monkeypatch.setattr(conversion, "watch", in_this_process)
    config = conversion.qwen3(64, 2, 96, 4) | {"head_dim": 16, "vocab_size": 128, "num_key_value_heads": 2}
    case = conversion.Case("tiny", config, "1MLA1GDN", target_seconds=1e9, target_gib=0)
    result = conversion.measure(case, tmp_path, threads=1, say=lambda _: None)
    assert [target["reached"] for target in result["targets"]] == [True, False, True]
    assert result["conversion"]["peak_bytes"] > 0 and result["written_bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # only the checkpoint stays

    text = io.StringIO()
    conversion.report(Console(file=text, width=120), [result], conversion.machine(1))
    assert "1MLA1GDN" in text.getvalue() and "missed" in text.getvalue()
    json.dumps(result)


@reads_proc
def test_making_a_checkpoint_goes_on_where_it_stopped(conversion: ModuleType, tmp_path: Path) -> None:
    case = conversion.Case("tiny", conversion.llama(32, 3, 48, 8, 8) | {"vocab_size": 64}, "1MLA2GDN")
    conversion.make_base(case, tmp_path, shard_bytes=8192)
    shards = sorted(tmp_path.glob("*.safetensors"))
    first, last = shards[0].stat().st_mtime_ns, shards[-1].read_bytes()
    shards[-1].unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    conversion.make_base(case, tmp_path, shard_bytes=8192)
    assert len(shards) > 1 and shards[-1].read_bytes() == last and shards[0].stat().st_mtime_ns == first


@reads_proc
def test_memory_of_children_counts_and_mapped_files_do_not(conversion: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(80 << 20))
    child = "import time; x = bytearray(b'x') * (60 << 20); time.sleep(0.5)"
    code = (
        "import mmap, subprocess, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(mapped[::4096])\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    )
    run = conversion.watch([sys.executable, "-c", code, str(tmp_path / "file")], threads=1)
    assert 60 << 20 < run.peak_bytes < 100 << 20
    with pytest.raises(RuntimeError, match="no such thing"):
        conversion.watch([sys.executable, "-c", "raise SystemExit('no such thing')"], threads=1)


def test_every_row_of_the_initialisation_benchmark_can_be_converted() -> None:
    initialisation = script("initialisation")
    for qwen3 in (False, True):
        rows = list(initialisation.rows(qwen3))
        assert len(set(rows)) == len(rows)
        for layout in initialisation.LAYOUTS:
            first = next(row for row in rows if row.layout == layout)
            assert (first.init, first.rope_key, first.calibrated, first.linear_init) == (
                "recipe",
                "mean",
                False,
                "recipe",
            )
        assert {row.rope_key for row in rows} == ({"mean"} if qwen3 else {"mean", "pca"})
        assert {row.k_norm for row in rows} == ({"exact", "folded"} if qwen3 else {"exact"})
    plan = make_plan(TEACHER, "6MLA", None, initialisation.GEOMETRY | {"kv_lora_rank": 48}, "float32")
    ranks = initialisation.most_energy(plan, Initialisation(), 48).kv_lora_ranks
    assert 40 * 6 < sum(ranks) <= 48 * 6


@torch.no_grad()
def test_the_qwen3_teacher_is_written_as_a_qwen3(tmp_path: Path) -> None:
    qwen3_teacher = script("qwen3_teacher")
    ids = torch.randint(5, 2560, (4, 32))
    model = qwen3_teacher.starting_point(ids).eval()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "start")
    convert(tmp_path / "start", tmp_path / "hybrid", make_plan(tmp_path / "start", "6A"))
    qwen3_teacher.write_as_qwen3(tmp_path / "hybrid", tmp_path / "start", tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert written.config.model_type == "qwen3"
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    torch.testing.assert_close(written(ids).logits, expected, atol=0.1, rtol=0.05)  # norms rounded to bfloat16
    divergence = torch.nn.functional.kl_div(expected.log_softmax(-1), teacher(ids).logits.softmax(-1), reduction="sum")
    assert 0 < divergence / ids.numel() < 1
