"""Reading a base: what is refused, and that the line says what, where and how to mend it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo.checkpoint import INDEX, WEIGHTS, read_base_config, weight_files
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


def test_biases_of_queries_keys_and_values_come_by_heads(write_base: WriteBase) -> None:
    directory = write_base("qwen2")
    figures = json.loads((directory / "config.json").read_text())
    figures.pop("head_dim", None)  # as released configurations have it
    (directory / "config.json").write_text(json.dumps(figures))
    base = read_base(directory)
    attention = base.attention(2)
    biases = (("q", attention.q_bias, 4), ("k", attention.k_bias, 2), ("v", attention.v_bias, 2))
    for name, bias, heads in biases:
        assert bias is not None and bias.shape == (heads, 16)
        assert torch.equal(bias.flatten(), base[f"model.layers.2.self_attn.{name}_proj.bias"])
    assert attention.q_norm is None and attention.k_norm is None
    plain = read_base(write_base("llama")).attention(0)
    assert plain.q_bias is None and plain.k_bias is None and plain.v_bias is None


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
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "Llama, Qwen2.5 and Qwen3"),
        ({"model_type": "gemma3_text", "architectures": None}, "model_type gemma3_text, which is not supported"),
        ({"model_type": None, "architectures": None}, "model_type None"),
        ({"model_type": "qwen2_moe", "architectures": None}, "mixture of experts"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "MixtralForCausalLM, a mixture of experts",
        ),
        ({"model_type": "deepseek_v3", "architectures": None, "n_routed_experts": 256}, "mixture of experts"),
        ({"architectures": 7}, "7, not LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding-window"),
        ({"sliding_window": 128}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "fast"}}, "rope_theta 'fast'"),
        ({"hidden_act": "unheard"}, "hidden_act unheard"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_unsupported_bases_are_named(write_base: WriteBase, changes: dict[str, Any], named: str) -> None:
    refused(edit_config(write_base(), **changes), named)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_off_is_let_be(write_base: WriteBase, family: str) -> None:
    directory = edit_config(write_base(family), use_sliding_window=False, sliding_window=4096)
    assert read_base_config(directory).model_type == family
    refused(edit_config(directory, use_sliding_window=True), "sliding-window", "Llama, Qwen2.5 and Qwen3")


def test_truncated_weights_are_named(write_base: WriteBase) -> None:
    directory = write_base()
    whole = (directory / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for end in (0, 1, 7, 8, 9, 40, header - 1, header, header + 1, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (directory / WEIGHTS).write_bytes(whole[:end])
        refused(directory, WEIGHTS, "copy or download it again")


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_impossible_header_lengths_are_named(write_base: WriteBase, length: int) -> None:
    directory = write_base()
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", length) + whole[8:])
    refused(directory, WEIGHTS, "copy or download it again")


def test_a_damaged_byte_is_named_or_changes_no_tensor_but_its_values(write_base: WriteBase) -> None:
    directory = write_base("qwen2", num_hidden_layers=1)
    whole, shapes = (directory / WEIGHTS).read_bytes(), read_base(directory).weights.shapes
    harmless = 0
    for i in range(400):
        for flip in (0x01, 0x80):
            (directory / WEIGHTS).write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
            try:
                base = read_base(directory)
                assert base.weights.shapes == shapes
                assert all(base[name].shape == shape for name, shape in shapes.items())
                harmless += 1
            except HyloError as error:
                assert str(directory) in str(error) and "\n" not in str(error)
    assert harmless < 40  # the file's own metadata


def test_pickles_beside_safetensors_are_not_read(write_base: WriteBase) -> None:
    directory = write_base()
    (directory / "pytorch_model.bin").write_bytes(b"no pickle")
    assert weight_files(directory) == [directory / WEIGHTS]
    read_base(directory)


def test_a_released_checkpoint_is_to_be_imported(write_base: WriteBase) -> None:
    base = write_base()
    (base / "hybrid_config.json").write_text("{}")
    with pytest.raises(HyloError, match=f"hylo import {base} OUT"):
        read_base(base)


def test_a_tensor_in_two_shards_is_refused(write_base: WriteBase) -> None:
    directory = write_base(shard="20KB")
    shard = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(tensors | {"model.norm.weight": torch.zeros(48)}, shard)
    refused(directory, "model.norm.weight", "two files")


def test_indices_are_held_to_the_directory(write_base: WriteBase) -> None:
    directory = write_base(shard="20KB")
    index = json.loads((directory / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    (directory / shards[1]).rename(directory / "aside")
    refused(directory, INDEX, shards[1], "missing")
    (directory / "aside").rename(directory / shards[1])
    outside = ("../elsewhere.safetensors", "/elsewhere.safetensors", "a/b.safetensors", "..\\c.safetensors", ".")
    for elsewhere in outside:
        index["weight_map"]["model.norm.weight"] = elsewhere
        (directory / INDEX).write_text(json.dumps(index))
        refused(directory, elsewhere, "outside")
    index["weight_map"]["model.norm.weight"] = "pytorch_model.bin"
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, "pytorch_model.bin", "only safetensors")
    for damaged in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'):
        (directory / INDEX).write_text(damaged)
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
