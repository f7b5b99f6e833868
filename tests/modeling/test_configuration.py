"""The configuration, and the parameter counts of the three published geometries."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hylo
from hylo.modeling import HyloConfig, HyloDecoderLayer

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "kv_lora_rank": 128,
    "q_lora_rank": 1344,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "gdn_num_heads": 6,
    "gdn_head_dim": 256,
    "mamba_d_state": 64,
    "mamba_head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_d_inner": 2048,
    "mamba_d_xb": 512,
}
LLAMA_3B = LLAMA_1B | {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "head_dim": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "gdn_num_heads": 9,
    "mamba_d_state": 128,
    "mamba_head_dim": 128,
    "mamba_num_heads": 24,
    "mamba_d_inner": 3072,
    "mamba_d_xb": 1024,
}
QWEN_1_7B = LLAMA_3B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "kv_lora_rank": 256,
    "q_lora_rank": 1344,
    "gdn_num_heads": 6,
    "mamba_num_heads": 16,
    "mamba_d_inner": 2048,
    "base_model_type": "qwen3",
    "qk_norm": True,
}
PUBLISHED = [
    (LLAMA_1B, "mla", 10_125_312, 50_335_744),
    (LLAMA_1B, "gated_deltanet", 25_215_500, 50_335_744),
    (LLAMA_1B, "mamba2", 14_763_104, 50_335_744),
    (LLAMA_3B, "mla", 19_660_800, 75_503_616),
    (LLAMA_3B, "gated_deltanet", 56_715_794, 75_503_616),
    (LLAMA_3B, "mamba2", 34_705_480, 75_503_616),
    (QWEN_1_7B, "mla", 10_748_160, 37_752_832),
    (QWEN_1_7B, "gated_deltanet", 25_215_500, 37_752_832),
    (QWEN_1_7B, "mamba2", 16_832_560, 37_752_832),
]


@pytest.mark.parametrize(("geometry", "mixer", "mixer_parameters", "other_parameters"), PUBLISHED)
def test_parameters_of_the_published_models(
    geometry: dict[str, Any], mixer: str, mixer_parameters: int, other_parameters: int
) -> None:
    config = HyloConfig(num_hidden_layers=1, mixers=[mixer], **geometry)
    with torch.device("meta"):
        layer = HyloDecoderLayer(config, 0)
    counted = sum(parameter.numel() for parameter in layer.mixer.parameters())
    assert counted == mixer_parameters
    assert sum(parameter.numel() for parameter in layer.parameters()) - counted == other_parameters


def test_layer_types_follow_the_mixers(make_config: Callable[..., HyloConfig]) -> None:
    config = make_config(["attention", "mla", "gated_deltanet", "mamba2", "kda"])
    assert config.layer_types == ["full_attention"] * 2 + ["linear_attention"] * 3
    assert HyloConfig(num_hidden_layers=2).mixers == ["attention", "attention"]
    assert HyloConfig(**config.to_dict(), layer_types=["full_attention"] * 5).layer_types == config.layer_types


@pytest.mark.parametrize("mixers", [["mla"], ["mla", "retention"]])
def test_mixers_that_do_not_fit(mixers: list[str]) -> None:
    with pytest.raises(ValueError, match="mixers"):
        HyloConfig(num_hidden_layers=2, mixers=mixers)


def test_saving_a_length_below_the_base_is_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    warnings: list[str] = []
    monkeypatch.setattr("transformers.modeling_rope_utils.logger.warning", warnings.append)
    config = HyloConfig(rope_parameters=rope, mla_rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config.extend_context(2048, 2048)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
    assert warnings == []


def test_what_is_saved_names_the_classes_and_imports_them_from_the_package(tmp_path: Path) -> None:
    HyloConfig.register_for_auto_class()  # what transformers does with classes that a directory named
    HyloConfig().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "modeling_hylo.py"]
    auto_map = AutoConfig.from_pretrained(tmp_path).auto_map
    assert sorted(auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    for reference in auto_map.values():
        module, name = reference.split(".")
        found = get_class_from_dynamic_module(reference, tmp_path)
        assert (module, found) == ("modeling_hylo", getattr(hylo, name))


def test_extend_context() -> None:
    config = HyloConfig(mla_rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config.extend_context(65536, 2048)
    assert config.max_position_embeddings == 65536
    assert config.mla_rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 32.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.1 * math.log(32) + 1,
    }
    config.extend_context(1024, 2048)
    assert config.mla_rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert config.max_position_embeddings == 1024


def test_yarn_begins_where_the_base_ends() -> None:
    config = HyloConfig(max_position_embeddings=2048, base_max_position_embeddings=2048)
    for length, rope_type in ((1024, "default"), (2048, "default"), (8192, "yarn"), (2048, "default")):
        config.extend_context(length)
        assert (config.max_position_embeddings, config.mla_rope_parameters["rope_type"]) == (length, rope_type)
    config.extend_context(8192)
    rope = config.mla_rope_parameters
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (4, 2048)
