"""What the plugin refuses, in one line each, and that it stays out of the way of everything else."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from serving import engine, write_hybrid
from transformers import AutoConfig

from hylo.errors import HyloError
from hylo.modeling import HyloConfig
from hylo.serve import plugin, versions


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(Exception) as refused, engine(directory, **options):  # noqa: B017, PT011  # of vLLM's classes
        pass
    return str(refused.value)


def test_vllm_finds_the_plugin_and_hylo_does_not_import_vllm() -> None:
    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "hylo"]
    assert found.load() is plugin.register
    code = "import sys, hylo, hylo.cli, hylo.serve.plugin; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exact_key_norms(tmp_path: Path) -> None:
    figures = {"base_model_type": "qwen3", "qk_norm": True, "mla_k_norm": "exact"}
    assert "convert with --k-norm folded" in refusal(write_hybrid(tmp_path / "model", "mg", **figures))


def test_latent_and_base_attention_in_one_model(tmp_path: Path) -> None:
    assert "cannot share vLLM's cache" in refusal(write_hybrid(tmp_path / "model", "mga"))


def test_rotated_linear_blocks(tmp_path: Path) -> None:
    assert "have no kernels in vLLM" in refusal(write_hybrid(tmp_path / "model", "mg", positions="hype"))


@pytest.mark.parametrize("name", ["model.layers.1.mixer.k_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor(name: str, tmp_path: Path) -> None:
    """One of several that the engine fuses into one."""
    directory = write_hybrid(tmp_path / "model", "mg")
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks {name}" in refusal(directory)


def test_an_unexpected_tensor(tmp_path: Path) -> None:
    directory = write_hybrid(tmp_path / "model", "mg")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mixer.z_proj.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "holds unexpected model.layers.1.mixer.z_proj.weight" in refusal(directory)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    directory = write_hybrid(tmp_path / "model", "mg")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mixer.g_proj.weight"] = tensors["model.layers.1.mixer.g_proj.weight"][:-1].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "g_proj.weight in another shape" in refusal(directory)


def test_too_little_cache_for_one_sequence(tmp_path: Path) -> None:
    assert "max seq len (512)" in refusal(write_hybrid(tmp_path / "model", "mg"), kv_cache_memory_bytes=1 << 17)


@pytest.fixture
def another_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(versions, "TESTED", SpecifierSet(">=9"))
    yield
    monkeypatch.undo()
    plugin.register()


def test_a_vllm_that_was_not_tested(another_vllm: None, tmp_path: Path) -> None:
    directory = write_hybrid(tmp_path / "model", "mg")
    with pytest.raises(HyloError, match=r"hylo serves with >=9; install"):
        versions.check_vllm()
    plugin.register()
    with pytest.raises(ValueError, match=r"hylo serves with >=9; install"):
        AutoConfig.from_pretrained(directory)
    assert "hylo serves with >=9; install" in refusal(directory)


def test_registering_again_changes_nothing(tmp_path: Path) -> None:
    plugin.register()
    plugin.register()
    assert isinstance(AutoConfig.from_pretrained(write_hybrid(tmp_path / "model", "g")), HyloConfig)
