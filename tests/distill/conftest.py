"""A tiny Llama and a hybrid made of it: GDN, MLA, and an attention layer that is the base's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from window_rows import WindowRows

from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.modeling import HyloConfig, HyloForCausalLM

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
MIXERS = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
MIXERS |= {"gdn_num_heads": 2, "gdn_head_dim": 8, "mamba_d_state": 8, "mamba_head_dim": 8}
MIXERS |= {"mamba_num_heads": 4, "mamba_d_inner": 32, "mamba_d_xb": 16}


def make_base(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def make_student(base: PreTrainedModel, mixers: list[str]) -> HyloForCausalLM:
    """The base with the mixers of some layers drawn afresh."""
    torch.manual_seed(2)
    shape = {key: getattr(base.config, key) for key in SHAPE}
    shape["base_max_position_embeddings"] = base.config.max_position_embeddings
    student = HyloForCausalLM(HyloConfig(**shape, **MIXERS, mixers=mixers, rms_norm_eps=base.config.rms_norm_eps))
    known = student.state_dict()
    for name, tensor in base.state_dict().items():
        name = name.replace(".self_attn.", ".mixer.")
        if ".mixer." not in name or mixers[int(name.split(".")[2])] == "attention":
            known[name].copy_(tensor)
    return student.eval()


@pytest.fixture
def base() -> LlamaForCausalLM:
    return make_base()


@pytest.fixture
def base_directory(tmp_path: Path, base: LlamaForCausalLM) -> Path:
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def student_directory(tmp_path: Path, base: LlamaForCausalLM) -> Path:
    """With tokenizer files, as convert leaves them."""
    directory = tmp_path / "student"
    make_student(base, ["gated_deltanet", "mla", "attention"]).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("hi")
    return directory


@pytest.fixture
def rows() -> Rows:
    stream = np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.int32)
    return lambda length, count: WindowRows(stream, length, count, seed=0)


@pytest.fixture
def training() -> Callable[..., Training]:
    def make(**changes: object) -> Training:
        values = {"tokens": 12 * 4 * 16, "length": 16, "rows": 4, "learning_rate": 5e-3, "warmup": 0.1} | changes
        return Training.model_validate(values)

    return make


@pytest.fixture
def build_student() -> Callable[[PreTrainedModel, list[str]], HyloForCausalLM]:
    return make_student


@pytest.fixture
def build_base() -> Callable[..., LlamaForCausalLM]:
    return make_base
