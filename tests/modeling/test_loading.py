"""Loading complete directories, and one line for those that are not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from hylo.errors import HyloError
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.loading import load_model

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def build(family: str) -> PreTrainedModel:
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    mla = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 16}
    return HyloForCausalLM(HyloConfig(**SIZES, **mla, mixers=["mla", "gated_deltanet"])).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    logging.disable_progress_bar()
    build("hylo").save_pretrained(tmp_path / "hylo")
    return tmp_path / "hylo"


def refused(directory: Path, *named: str) -> None:
    with pytest.raises(HyloError) as error:
        load_model(directory)
    message = str(error.value)
    assert "\n" not in message
    for part in (*named, str(directory)):
        assert part in message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "hylo"])
def test_models_load_as_they_were(tmp_path: Path, family: str) -> None:
    model, tokens = build(family), torch.arange(9)[None]
    logging.disable_progress_bar()
    model.save_pretrained(tmp_path / family, max_shard_size="20KB")
    loaded = load_model(tmp_path / family)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert load_model(tmp_path / family, torch.bfloat16).dtype == torch.bfloat16


def test_missing_directories_and_files_are_named(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    (saved / "model.safetensors").rename(saved / "aside")
    refused(saved, "model.safetensors", "copy the weights")
    (saved / "config.json").unlink()
    refused(saved, "config.json", "does not exist")


def test_other_models_are_named(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused(saved, "gpt2")
    (saved / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (saved / "hybrid_config.json").write_text("{}")
    refused(saved, f"hylo import {saved} OUT")


def test_configurations_that_do_not_fit_are_named(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"mixers": ["mla", "lstm"]}))
    refused(saved, "lstm")


def test_tensors_that_do_not_fit_are_listed(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = load_file(saved / "model.safetensors")
    name = "model.layers.1.mixer.dt_bias"
    save_file({k: v for k, v in whole.items() if k != name}, saved / "model.safetensors", {"format": "pt"})
    refused(saved, "lacks", name)
    save_file(whole | {"model.extra": torch.ones(1)}, saved / "model.safetensors", {"format": "pt"})
    refused(saved, "unexpected", "model.extra")
    save_file(whole | {name: torch.ones(5)}, saved / "model.safetensors", {"format": "pt"})
    refused(saved, name, "shape")
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-9])
    refused(saved, "model.safetensors", "copy or download it again")
    assert capfd.readouterr().err == ""
