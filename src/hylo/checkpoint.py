"""What a model directory in Hugging Face format holds, checked: a base's config.json, and safetensors, read lazily."""

import hashlib
import math
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

from hylo.errors import HyloError
from hylo.files import checksum, read_json
from hylo.modeling.configuration import RELEASED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BASES = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),  # Qwen2.5 too
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
}
CONVERTED = "dense Llama, Qwen2.5 and Qwen3 checkpoints are converted"
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_TYPES = ("default", "llama3")
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
                if name in self.shapes:
                    raise HyloError(f"tensor {name} is in two files of {self.directory}; remove one of them")
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                self._files[name] = file
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise HyloError(f"{path} is not a whole safetensors file ({reason}); copy or download it again") from error

    def __getitem__(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in. Raises HyloError if it holds NaN or infinity."""
        tensor = self._files[name].get_tensor(name)
        if tensor.numel() and not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN is both its bounds
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
        if not shard.endswith(".safetensors"):
            raise HyloError(f"weight index {directory / INDEX} names {shard}; only safetensors files are read")
        if not (directory / shard).is_file():
            raise HyloError(f"weight index {directory / INDEX} names {shard}, which is missing; copy it there")
    return [directory / shard for shard in sorted(set(shards.values()))]


def model_hash(directory: Path) -> str:
    """Of config.json and of every byte of the weights: models that differ anywhere are told apart.

    A process reads a file once for it, some seconds for every ten GB, unless the file changes.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        stat = path.stat()
        digest.update(_weights_hash(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


@lru_cache
def _weights_hash(path: Path, state: tuple[int, ...]) -> str:
    """`state` is there to tell a file from what it was before."""
    return checksum(path)


def refuse_released(directory: Path) -> None:
    """Its config.json is the base's, its tensors are a hybrid's."""
    if (directory / RELEASED).is_file():
        raise HyloError(f"{directory} is a released checkpoint; run `hylo import {directory} OUT` and use OUT")


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Raises HyloError where there is none that can be used."""
    if not directory.is_dir():
        raise HyloError(f"model directory {directory} does not exist; check the path")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise HyloError(f"{directory} has no usable tokenizer ({reason}); add the base's tokenizer files") from error


def read_base_config(directory: Path) -> PreTrainedConfig:
    """config.json of a base that can be converted (Llama, Qwen2.5, Qwen3), with a head_dim.

    Raises HyloError for any other, by name.
    """
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise HyloError(f"base directory {directory} {problem}; check the path")
    path = directory / "config.json"
    raw = read_json(path, "configuration")
    _refuse_unsupported(raw, path)
    if missing := [key for key in REQUIRED_KEYS if key not in raw]:
        raise HyloError(f"configuration {path} has no {', '.join(missing)}; restore the file")
    try:
        config = BASES[raw["model_type"]][0].from_dict(raw)
        if getattr(config, "head_dim", None) is None:  # Qwen2.5's have none
            config.head_dim = config.hidden_size // config.num_attention_heads
    except Exception as error:  # transformers validates with exceptions of many classes
        reason = " ".join(str(error).split())
        raise HyloError(f"configuration {path} is not valid ({reason}); restore the file") from error
    _check_figures(config, path)
    return config


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    """One line for each kind of model that conversion does not know."""
    model_type, listed = str(raw.get("model_type")), raw.get("architectures") or []
    architectures = [str(name) for name in listed] if isinstance(listed, list) else [str(listed)]
    what = architectures[0] if architectures else f"model_type {model_type}"
    experts = next((key for key in EXPERT_KEYS if raw.get(key)), None)
    if model_type not in BASES:
        moe = experts or "moe" in f"{model_type} {what}".lower() or model_type == "mixtral"
        kind = "a mixture of experts, which is not supported" if moe else "which is not supported"
        raise HyloError(f"base {path} is {what}, {kind}; {CONVERTED}")
    if architectures and BASES[model_type][1] not in architectures:
        raise HyloError(f"base {path} is {what}, not {BASES[model_type][1]}; {CONVERTED}")
    if raw.get("quantization_config"):
        quantised = raw["quantization_config"]
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise HyloError(f"base {path} is quantised ({method}); convert the unquantised checkpoint")
    if experts:
        raise HyloError(f"base {path} is a mixture of experts ({experts} {raw[experts]}); {CONVERTED}")
    # Qwen's configurations name a window that is off unless use_sliding_window says so
    window = raw.get("use_sliding_window", model_type == "llama" and raw.get("sliding_window"))
    if window or "sliding_attention" in str(raw.get("layer_types")):
        raise HyloError(f"base {path} has sliding-window attention, which is not supported; {CONVERTED}")
    if raw.get("attention_bias"):  # Qwen2.5's biases on queries, keys and values have no key
        raise HyloError(f"base {path} has attention_bias, which is not supported; {CONVERTED}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if rope_type not in ROPE_TYPES:
        raise HyloError(f"base {path} has rope_type {rope_type}; supported are {' and '.join(ROPE_TYPES)}")


def _check_figures(config: PreTrainedConfig, path: Path) -> None:
    positive = (*REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in positive:
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise HyloError(f"configuration {path} has {key} {value!r}; it must be a whole number of at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise HyloError(
            f"configuration {path} has {config.num_attention_heads} query heads, no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}; restore the file"
        )
    if config.head_dim % 2:
        raise HyloError(f"configuration {path} has head_dim {config.head_dim}; RoPE needs an even one")
    if config.hidden_act not in ACT2FN:
        raise HyloError(f"configuration {path} has hidden_act {config.hidden_act}, which transformers does not know")
    rope = config.rope_parameters
    for key in ("rope_theta", *(LLAMA3_KEYS if rope["rope_type"] == "llama3" else ())):
        value = rope.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise HyloError(f"configuration {path} has {key} {value!r}; it must be a number above 0")


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
