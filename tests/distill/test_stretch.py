"""A model for another length, untrained: the same weights, YaRN's factor, and bad input."""

import os
from pathlib import Path

import pytest
import torch

from hylo.commands.training import yarn_from
from hylo.distill.stretch import stretch
from hylo.errors import HyloError
from hylo.modeling import HyloConfig
from hylo.modeling.loading import load_model


def test_weights_stay_and_positions_stretch(student_directory: Path, tmp_path: Path) -> None:
    stretch(student_directory, tmp_path / "out", 128, 16)
    before, after = load_model(student_directory), load_model(tmp_path / "out")
    assert after.config.max_position_embeddings == 128
    assert after.config.mla_rope_parameters["factor"] == 8
    assert before.config.mla_rope_parameters["rope_type"] == "default"
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    ids = torch.arange(16)[None]
    assert not torch.equal(before(ids).logits, after(ids).logits)


def test_the_length_of_the_base_needs_no_yarn(student_directory: Path, tmp_path: Path) -> None:
    stretch(student_directory, tmp_path / "within", 32, None)
    stretch(tmp_path / "within", tmp_path / "beyond", 128, None)
    within, beyond = (load_model(tmp_path / name).config.mla_rope_parameters for name in ("within", "beyond"))
    assert within["rope_type"] == "default"
    assert (beyond["factor"], beyond["original_max_position_embeddings"]) == (2, 64)


def test_the_weights_take_no_room_again(student_directory: Path, tmp_path: Path) -> None:
    stretch(student_directory, tmp_path / "out", 128, 16)
    assert os.path.samefile(tmp_path / "out" / "model.safetensors", student_directory / "model.safetensors")
    assert not os.path.samefile(tmp_path / "out" / "config.json", student_directory / "config.json")


def test_bad_input(base_directory: Path, student_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="base_model_type"):
        stretch(base_directory, tmp_path / "out", 128, 16)
    (tmp_path / "out").mkdir()
    with pytest.raises(HyloError, match="exists already"):
        stretch(student_directory, tmp_path / "out", 128, 16)


def test_as_published_yarn_begins_where_the_released_models_have_it(tmp_path: Path) -> None:
    for family, length in (("llama", 2048), ("qwen3", 32768), ("qwen2", None)):
        HyloConfig(base_model_type=family).save_pretrained(tmp_path / family)
        assert yarn_from(tmp_path / family, as_published=True) == length
        assert yarn_from(tmp_path / family, as_published=False) is None
