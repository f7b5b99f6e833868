"""What a model directory in Hugging Face format holds, checked: a base's config.json, and safetensors, read lazily."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from hylo.errors import HyloError
from hylo.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BASES = {"llama": (LlamaConfig, "LlamaForCausalLM"), "qwen3": (Qwen3Config, "Qwen3ForCausalLM")}
REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_TYPES = ("default", "llama3")


class Weights:
    """The tensors of a directory by name, read one at a time; only headers are read up front.

    Raises HyloError for a directory without safetensors, for an index that names what is not there, for truncated or
    damaged files and for tensors of another kind than float32, bfloat16 and float16.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        for path in weight_files(directory):
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise HyloError(
                        f"tensor {name} in {path} is {part.get_dtype()}; "
                        "only float32, bfloat16 and float16 weights are read"
                    )
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                self._files[name] = file
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise HyloError(f"{path} is not a whole safetensors file ({reason}); copy or download it again") from error

    def __getitem__(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in. Raises HyloError if it holds NaN or infinity."""
        tensor = self._files[name].get_tensor(name)
        # in parts, because torch casts all that it sums before it sums
        if not all(math.isfinite(part.sum(dtype=torch.float32)) for part in tensor.flatten().split(1 << 22)):
            raise HyloError(f"tensor {name} in {self.directory} holds NaN or infinite values; restore the checkpoint")
        return tensor


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory. Raises HyloError if there are none or the index does not fit."""
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise HyloError(f"model directory {directory} {problem}; check the path")
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        if pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
            raise HyloError(f"{directory} holds pickled weights ({pickles[0].name}); convert them to safetensors first")
        raise HyloError(f"{directory} holds no {WEIGHTS} and no {INDEX}; copy the weights there")
    index = read_json(directory / INDEX, "weight index")
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise HyloError(f"weight index {directory / INDEX} has no weight_map of tensor names to files; restore it")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard:
            raise HyloError(
                f"weight index {directory / INDEX} names {shard}, outside its own directory; restore the index"
            )
        if not (directory / shard).is_file():
            raise HyloError(f"weight index {directory / INDEX} names {shard}, which is missing; copy it there")
    return [directory / shard for shard in sorted(set(shards.values()))]


def read_base_config(directory: Path) -> PreTrainedConfig:
    """config.json of a base that can be converted (Llama-3.x or Qwen3). Raises HyloError for any other, by name."""
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise HyloError(f"base directory {directory} {problem}; check the path")
    path = directory / "config.json"
    raw = read_json(path, "configuration")
    model_type = raw.get("model_type")
    _refuse_unsupported(raw, path)
    if missing := [key for key in REQUIRED_KEYS if key not in raw]:
        raise HyloError(f"configuration {path} has no {', '.join(missing)}; restore the file")
    try:
        config = BASES[str(model_type)][0].from_dict(raw)
    except Exception as error:  # transformers validates with exceptions of many classes
        reason = " ".join(str(error).split())
        raise HyloError(f"configuration {path} is not valid ({reason}); restore the file") from error
    _check_figures(config, path)
    return config


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    """One line for each kind of model that conversion does not know."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    supported = "Llama-3.x and Qwen3 dense checkpoints are converted"
    if model_type not in BASES:
        what = architectures[0] if architectures else f"model_type {model_type}"
        kind = "a mixture of experts" if "moe" in f"{model_type} {what}".lower() else "not supported"
        raise HyloError(f"base {path} is {what}, which is {kind}; {supported}")
    if architectures and BASES[model_type][1] not in architectures:
        raise HyloError(f"base {path} is {architectures[0]}, no causal language model; {supported}")
    if raw.get("quantization_config"):
        quantised = raw["quantization_config"]
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise HyloError(f"base {path} is quantised ({method}); convert the unquantised checkpoint")
    if experts := next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)), None):
        raise HyloError(f"base {path} is a mixture of experts ({experts} {raw[experts]}); {supported}")
    sliding = "sliding_attention" in (raw.get("layer_types") or [])
    if sliding or raw.get("use_sliding_window") or (raw.get("sliding_window") and "use_sliding_window" not in raw):
        raise HyloError(f"base {path} has sliding-window attention, which is not supported; {supported}")
    if raw.get("attention_bias"):
        raise HyloError(f"base {path} has attention_bias, which is not supported; {supported}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if rope_type not in ROPE_TYPES:
        raise HyloError(f"base {path} has rope_type {rope_type}; supported are {' and '.join(ROPE_TYPES)}")


def _check_figures(config: PreTrainedConfig, path: Path) -> None:
    positive = (*REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in positive:
        if getattr(config, key) < 1:
            raise HyloError(f"configuration {path} has {key} {getattr(config, key)}; it must be at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise HyloError(
            f"configuration {path} has {config.num_attention_heads} query heads, no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}; restore the file"
        )
    if config.head_dim % 2:
        raise HyloError(f"configuration {path} has head_dim {config.head_dim}; RoPE needs an even one")


def dtype_of(config: PreTrainedConfig) -> str:
    """The dtype that the configuration states, float32 if it states none."""
    stated = str(config.dtype or "float32").removeprefix("torch.")
    return stated if stated in DTYPE_NAMES else "float32"


def check_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as a torch.dtype. Raises HyloError for others."""
    if name not in DTYPE_NAMES:
        raise HyloError(f"dtype {name} is not known; choose one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def names(items: list[str], at_most: int = 4) -> str:
    """A list of tensor names short enough for one line."""
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more


COMPANIONS = (  # what a model directory holds beside configuration and weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer's files and generation_config.json, whichever exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
