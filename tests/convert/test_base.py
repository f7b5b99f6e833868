"""Reading a base: what is refused, and that the line says what, where and how to mend it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo.checkpoint import INDEX, WEIGHTS, read_base_config
from hylo.convert import read_base
from hylo.errors import HyloError

WriteBase = Callable[..., Path]


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)
    return directory


def refused(directory: Path, *named: str) -> None:
    with pytest.raises(HyloError) as error:
        read_base(directory)
    message = str(error.value)
    assert "\n" not in message
    for part in (*named, str(directory)):
        assert part in message


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_as_stored_and_attention_by_heads(write_base: WriteBase, dtype: torch.dtype, shard: str) -> None:
    base = read_base(write_base("qwen3", dtype, shard))
    assert (len(list(base.directory.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert base["model.norm.weight"].dtype == dtype
    attention = base.attention(1)
    assert attention.q.dtype == torch.float32
    assert (attention.q.shape, attention.k.shape, attention.o.shape) == ((4, 16, 48), (2, 16, 48), (48, 4, 16))
    stored = base["model.layers.1.self_attn.v_proj.weight"].float()
    assert torch.equal(attention.v[1, 3], stored[16 + 3])
    assert attention.q_norm is not None and attention.q_norm.shape == (16,)


def test_a_legacy_frequency_buffer_and_a_copy_of_a_tied_head_are_let_be(write_base: WriteBase) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    read_base(edit_weights(write_base(tie_word_embeddings=True), add))


def test_another_head_than_the_tied_one_is_refused(write_base: WriteBase) -> None:
    directory = write_base(tie_word_embeddings=True)
    edit_weights(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(61, 48)}))
    refused(directory, "lm_head.weight", "tie_word_embeddings")


def test_missing_paths_are_named(write_base: WriteBase, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", "does not exist")
    directory = write_base()
    (directory / WEIGHTS).unlink()
    refused(directory, WEIGHTS, "copy the weights")
    (directory / "pytorch_model.bin").write_bytes(b"")
    refused(directory, "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize(
    "text, named", [("{", "JSON"), ("[]", "no JSON object"), ('{"model_type": "llama"}', "vocab_size")]
)
def test_damaged_configurations_are_named(write_base: WriteBase, text: str, named: str) -> None:
    directory = write_base()
    (directory / "config.json").write_text(text)
    refused(directory, "config.json", named)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "qwen2", "architectures": None}, "qwen2"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding-window"),
        ({"sliding_window": 128}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type yarn"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_unsupported_bases_are_named(write_base: WriteBase, changes: dict[str, Any], named: str) -> None:
    refused(edit_config(write_base(), **changes), named)


def test_qwen3_lists_no_window_by_default(write_base: WriteBase) -> None:
    directory = edit_config(write_base("qwen3"), use_sliding_window=False, sliding_window=4096)
    assert read_base_config(directory).model_type == "qwen3"


def test_truncated_weights_are_named(write_base: WriteBase) -> None:
    directory = write_base()
    whole = (directory / WEIGHTS).read_bytes()
    for part in (whole[:-100], whole[:40], b""):
        (directory / WEIGHTS).write_bytes(part)
        refused(directory, WEIGHTS, "copy or download it again")


def test_indices_are_held_to_the_directory(write_base: WriteBase) -> None:
    directory = write_base(shard="20KB")
    index = json.loads((directory / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    (directory / shards[1]).rename(directory / "aside")
    refused(directory, INDEX, shards[1], "missing")
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, "../elsewhere.safetensors", "outside")
    (directory / INDEX).write_text("{}")
    refused(directory, INDEX, "weight_map")


def test_tensors_are_held_to_the_configuration(write_base: WriteBase) -> None:
    directory = write_base()
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.zeros(16, 48)}))
    refused(directory, name, "[16, 48]", "[32, 48]")
    edit_weights(directory, lambda tensors: tensors.pop(name))
    refused(directory, "lacks", name)
    edit_weights(directory, lambda tensors: tensors.update({name: torch.zeros(32, 48), "model.extra": torch.zeros(1)}))
    refused(directory, "model.extra")


def test_other_number_formats_are_refused(write_base: WriteBase) -> None:
    directory = write_base()
    edit_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    refused(directory, "model.norm.weight", "I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named_when_read(write_base: WriteBase, value: float) -> None:
    directory = write_base()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    base = read_base(directory)
    with pytest.raises(HyloError, match=name):
        base[name]
