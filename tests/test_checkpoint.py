"""What tells one model from another."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hylo.checkpoint import model_hash


def test_models_that_differ_anywhere_are_told_apart(tmp_path: Path) -> None:
    one, other, copy = tmp_path / "one", tmp_path / "other", tmp_path / "copy"
    one.mkdir()
    (one / "config.json").write_text("{}")
    weights = {f"model.layers.{i}.weight": torch.randn(512, 1024) for i in range(6)}  # 2 MiB each
    save_file(weights, one / "model.safetensors")
    shutil.copytree(one, copy)
    shutil.copytree(one, other)
    weights["model.layers.3.weight"][100, 100] += 1
    save_file(weights, other / "model.safetensors")
    assert model_hash(one) == model_hash(copy) != model_hash(other)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    before = model_hash(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file({"a": weights["a"] + 1}, tmp_path / "model.safetensors")
    assert model_hash(tmp_path) != before
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert len({before, model_hash(tmp_path)}) == 2
