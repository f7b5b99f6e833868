"""Conversions that must not change the function, against transformers' own Llama and Qwen3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from hylo.convert import Initialisation, convert
from hylo.modeling.loading import load_model
from hylo.plan import make_plan

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def base_logits(directory: Path, family: str, kv_heads: int, rope: dict[str, Any], tokens: Tensor) -> Tensor:
    """Writes a random base to `directory`, with attention sharp enough to depend on every rotation, and runs it."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters=rope,
        initializer_range=0.1,
        tie_word_embeddings=family == "llama",
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    with torch.no_grad():
        return model(tokens).logits


def student_logits(
    base: Path, layout: str, how: str | Initialisation, geometry: dict[str, int], tokens: Tensor
) -> Tensor:
    out = base.parent / "student"
    convert(base, out, make_plan(base, layout, geometry=geometry), Initialisation(how) if isinstance(how, str) else how)
    with torch.no_grad():
        return load_model(out)(tokens).logits


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 97, (2, 80))


@pytest.mark.parametrize("family, rope", [("llama", LLAMA3), ("llama", PLAIN), ("qwen2", PLAIN), ("qwen3", PLAIN)])
def test_attention_alone_is_the_base(tmp_path: Path, tokens: Tensor, family: str, rope: dict[str, Any]) -> None:
    expected = base_logits(tmp_path / "base", family, 2, rope, tokens)
    actual = student_logits(tmp_path / "base", "3A", "pairs-fast", {}, tokens)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


FULL = {"qk_rope_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 64}


@pytest.mark.parametrize("init", ["pairs-fast", "pairs-stride", "pairs-best"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_latent_attention_at_full_rank_and_one_kv_head_is_the_base(
    tmp_path: Path, tokens: Tensor, family: str, init: str
) -> None:
    expected = base_logits(tmp_path / "base", family, 1, PLAIN, tokens)
    actual = student_logits(tmp_path / "base", "3MLA", init, FULL, tokens)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_best_pairs_keep_scaled_frequencies(tmp_path: Path, tokens: Tensor) -> None:
    """Those of Llama 3 are no geometric sequence: a list in the configuration holds them, one theta cannot."""
    expected = base_logits(tmp_path / "base", "llama", 1, LLAMA3, tokens)
    actual = student_logits(tmp_path / "base", "3MLA", "pairs-best", FULL, tokens)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_calibration_costs_nothing_at_full_rank(tmp_path: Path, tokens: Tensor, family: str) -> None:
    expected = base_logits(tmp_path / "base", family, 1, PLAIN, tokens)
    how = Initialisation("pairs-best", calibration_BT=tokens)
    actual = student_logits(tmp_path / "base", "3MLA", how, FULL, tokens)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_pca_keeps_heads_that_are_multiples_of_one(
    tmp_path: Path, tokens: Tensor, family: str, calibrated: bool
) -> None:
    """One rotated key can then stand for both kv heads, if queries take up the factor; their mean cannot."""
    base_logits(tmp_path / "base", family, 2, PLAIN, tokens)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in weights.items():
        if "k_proj" in name:
            tensor[16:] = -0.7 * tensor[:16]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = load_model(tmp_path / "base")(tokens).logits
    geometry = FULL | {"kv_lora_rank": 32}
    errors = {}
    for rope_key in ("pca", "mean"):
        how = Initialisation(rope_key=rope_key, calibration_BT=tokens if calibrated else None)
        errors[rope_key] = (student_logits(tmp_path / "base", "3MLA", how, geometry, tokens) - expected).abs().max()
        (tmp_path / "student").rename(tmp_path / rope_key)
    assert errors["pca"] < 2e-4 and errors["mean"] > 0.1, errors


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_recipes_slice_is_not_the_base(tmp_path: Path, tokens: Tensor, family: str) -> None:
    """It breaks the pairs that the base was trained with, so that nothing is exact even at full rank."""
    expected = base_logits(tmp_path / "base", family, 1, PLAIN, tokens)
    actual = student_logits(tmp_path / "base", "3MLA", "recipe", FULL, tokens)
    assert (actual - expected).abs().mean() > 0.1 * expected.std()


def test_whole_pairs_come_closer_than_the_recipes_slice(tmp_path: Path, tokens: Tensor) -> None:
    """Half of every head rotated, full rank, one kv head: fast pairs first, then pairs at a stride, then the slice."""
    expected = base_logits(tmp_path / "base", "llama", 1, PLAIN | {"rope_theta": 500000.0}, tokens)
    errors = {}
    for init in ("pairs-fast", "pairs-stride", "recipe"):
        geometry = {"qk_rope_head_dim": 8, "kv_lora_rank": 24, "q_lora_rank": 64}
        plan = make_plan(tmp_path / "base", "3MLA", geometry=geometry)
        convert(tmp_path / "base", tmp_path / init, plan, Initialisation(init))
        with torch.no_grad():
            errors[init] = (load_model(tmp_path / init)(tokens).logits - expected).square().mean().item()
    assert errors["pairs-fast"] < errors["pairs-stride"] < errors["recipe"], errors
