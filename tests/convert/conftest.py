"""Tiny bases on disk, with weights large enough that every row of a projection shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def build_base(family: str, **changes: Any) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    figures = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen2":  # whose heads always share the hidden width
        figures["hidden_size"] = 64
    model = model_class(config_class(**figures | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., Path]:
    """Writes a base directory; `dtype` is what its weights are stored in, `shard` the size of a shard."""

    def write(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
        directory = tmp_path / f"{family}-base"
        logging.disable_progress_bar()
        build_base(family, **changes).to(dtype).save_pretrained(directory, max_shard_size=shard)
        return directory

    return write
