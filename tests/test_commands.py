"""`hylo convert` and `hylo import` as a user calls them: what they print and write, and what bad input gets."""

import json
from pathlib import Path

import pytest
import torch
from command import hylo
from safetensors.torch import load_file, save_file

from hylo.modeling.loading import load_model

GEOMETRY = ("--set", "q_lora_rank=16", "--set", "qk_rope_head_dim=4", "--rank", "8")


def test_every_option_of_convert_writes_a_model(tiny_base: Path, text_file: Path, tmp_path: Path) -> None:
    calibrate = ("--calibrate", text_file, "--calibration-tokens", 256, "--calibration-length", 64)
    linear = ("--linear-steps", 2, "--linear-fraction", 0.1)
    weights = {}
    for name, layout, options in (
        ("plain", "1MLA2GDN", ()),
        ("recipe", "1MLA2GDN", ("--init", "recipe", "--linear-init", "recipe")),
        ("mean", "1MLA2M2", ("--init", "pairs-stride", "--rope-key", "mean", "--linear-init", "aligned")),
        ("calibrated", "1MLA2GDN", (*calibrate, *linear, "--rank-report")),
        ("best", "1MLA2M2", (*calibrate, *linear, "--init", "pairs-best", "--dtype", "bfloat16", "--shard-gib", 0.001)),
        ("energy", "2MLA1GDN", ("--rank", "energy=0.7")),
    ):
        done = hylo("convert", tiny_base, tmp_path / name, "--layout", layout, *GEOMETRY, *options)
        assert done.returncode == 0, done.stderr
        model = load_model(tmp_path / name)
        assert model(torch.arange(9)[None]).logits.isfinite().all()
        weights[name] = dict(model.named_parameters())
        assert ("energy kept" in done.stdout) == (name == "calibrated")
    key = "model.layers.1.mixer.kv_a_proj_with_mqa.weight"
    for name in ("recipe", "mean", "calibrated", "best"):
        assert not torch.equal(weights[name][key], weights["plain"][key])
    ranks = json.loads((tmp_path / "energy" / "config.json").read_text())["kv_lora_ranks"]
    assert len(ranks) == 3 and ranks[0] > 8


def test_a_rank_report_needs_no_conversion(tiny_base: Path, tmp_path: Path) -> None:
    arguments = ("convert", tiny_base, tmp_path / "out", "--layout", "3MLA", *GEOMETRY, "--rank-report", "--dry-run")
    done = hylo(*arguments)
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    rows = [line.split("│")[1:-1] for line in done.stdout.split("energy kept")[1].splitlines() if line.startswith("│")]
    assert [int(cells[0]) for cells in rows] == [0, 1, 2]
    assert all(int(cells[1]) == 8 and 0.2 < float(cells[2]) < 1 for cells in rows)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rank", "half"), "rank half is not understood"),
        (("--rank", "energy=2"), "rank energy=2 is no share"),
        (("--linear-init", "calibrated"), "give calibration text"),
        (("--k-norm", "folded"), "llama has no key norm to fold"),
        (("--init", "slow"), "--init"),
        (("--calibrate", "nowhere"), "text nowhere does not exist"),
        (("--calibrate", "python-stdlib", "--calibration-length", "0"), "--calibration-length"),
        (("--shard-gib", "0"), "--shard-gib"),
    ],
)
def test_bad_options_are_named(tiny_base: Path, tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    done = hylo("convert", tiny_base, tmp_path / "out", "--layout", "1MLA2GDN", *options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_damaged_bases_leave_nothing(tiny_base: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    whole = (tiny_base / "model.safetensors").read_bytes()
    tensors = load_file(tiny_base / "model.safetensors")
    nan = tensors | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], torch.nan)}
    save_file(nan, tmp_path / "nan.safetensors")
    for damaged, named in (
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        (whole[:8] + b"?" + whole[9:], "not a whole safetensors file"),
        ((tmp_path / "nan.safetensors").read_bytes(), "NaN"),
    ):
        (base / "model.safetensors").write_bytes(damaged)
        done = hylo("convert", base, out, "--layout", "1MLA2GDN")
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists()
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04")
    done = hylo("convert", base, out, "--layout", "1MLA2GDN")
    assert done.returncode == 2 and "pytorch_model.bin" in done.stderr


def test_what_is_no_release_is_not_imported(tiny_base: Path, tmp_path: Path) -> None:
    done = hylo("import", tiny_base, tmp_path / "out")
    assert done.returncode == 2 and "no released checkpoint" in done.stderr and not (tmp_path / "out").exists()
    done = hylo("import", tiny_base, tmp_path / "out", "--map", "q_norm")
    assert done.returncode == 2 and "write OLD=NEW" in done.stderr


def test_env_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(hylo("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__ and found["forced"] is None
    if not torch.cuda.is_available():
        assert set(found["kernels"].values()) == {"torch"} and found["devices"] == ["cpu"]
    assert "gated_delta_rule" in hylo("env").stdout
    monkeypatch.setattr("hylo.ops.kernels.FORCED", "mamba")  # read at import
    done = hylo("env")
    assert done.returncode == 2 and "HYLO_KERNELS=mamba is unknown; set it to torch or fla" in done.stderr


def test_kernels_that_cannot_be_are_one_line(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = tmp_path / "hybrid"
    assert hylo("convert", tiny_base, hybrid, "--layout", "1MLA2GDN").returncode == 0
    monkeypatch.setattr("hylo.ops.kernels.FORCED", "triton")
    text = tmp_path / "text.txt"
    text.write_text("a short text " * 200)
    done = hylo("evaluate", hybrid, "--lengths", "256", "--answers", "1", "--tokens", "256", "--text", text)
    assert done.returncode == 2 and done.stderr.startswith("hylo: HYLO_KERNELS=triton is unknown")
    assert len(done.stderr.splitlines()) == 1
