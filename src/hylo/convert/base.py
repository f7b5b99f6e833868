"""A base checkpoint: its configuration, and its tensors held to what that configuration says, read one at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hylo.checkpoint import Weights, names, read_base_config, refuse_released
from hylo.errors import HyloError


@dataclass(frozen=True)
class BaseAttention:
    """One layer's attention in float32, by heads: q (H,d,D), k, v (K,d,D), o (D,H,d); or None: Qwen3's norms (d,) and
    Qwen2.5's biases (H,d), (K,d), (K,d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None


class BaseCheckpoint:
    """Raises HyloError if tensors are missing, unexpected or of another shape than `config` says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: PreTrainedConfig = read_base_config(directory)
        self.weights = Weights(directory)
        self._check_tensors()

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def layer_names(self) -> list[str]:
        """Names of a layer's tensors, in the order of the model, without the `model.layers.{i}.` prefix."""
        return list(_layer_shapes(self.config))

    def attention(self, index: int) -> BaseAttention:
        prefix = f"model.layers.{index}.self_attn."
        head_dim, model_type = self.config.head_dim, self.config.model_type

        def rows(name: str) -> Tensor:
            return self[f"{prefix}{name}_proj.weight"].float().unflatten(0, (-1, head_dim))

        def norm(name: str) -> Tensor | None:
            return self[f"{prefix}{name}.weight"].float() if model_type == "qwen3" else None

        def bias(name: str) -> Tensor | None:
            if model_type != "qwen2":
                return None
            return self[f"{prefix}{name}_proj.bias"].float().unflatten(0, (-1, head_dim))

        o = self[f"{prefix}o_proj.weight"].float().unflatten(1, (-1, head_dim))
        norms, biases = (norm("q_norm"), norm("k_norm")), (bias("q"), bias("k"), bias("v"))
        return BaseAttention(rows("q"), rows("k"), rows("v"), o, *norms, *biases)

    def _check_tensors(self) -> None:
        expected, found = _shapes(self.config), self.weights.shapes
        where = self.directory
        if missing := [name for name in expected if name not in found]:
            raise HyloError(
                f"base {where} lacks {names(missing)}; its config.json asks for them, restore the checkpoint"
            )
        tied_head = "lm_head.weight" if self.config.tie_word_embeddings else ""
        ignored = (tied_head, "model.rotary_emb.inv_freq")
        if unexpected := [
            name
            for name in found
            if name not in expected and name not in ignored and not name.endswith(".self_attn.rotary_emb.inv_freq")
        ]:
            raise HyloError(
                f"base {where} holds {names(unexpected)}, which its config.json does not account for; mend either"
            )
        if wrong := [name for name in expected if found[name] != expected[name]]:
            shapes = f"{list(found[wrong[0]])} where config.json says {list(expected[wrong[0]])}"
            raise HyloError(f"base {where} has tensors of another shape: {names(wrong)} ({shapes}); mend either")
        if tied_head in found and not torch.equal(self[tied_head], self["model.embed_tokens.weight"]):
            raise HyloError(
                f"base {where} says tie_word_embeddings but stores a different lm_head.weight; "
                "set tie_word_embeddings to false in config.json to keep that head"
            )


def read_base(directory: Path) -> BaseCheckpoint:
    """Opens a Llama, Qwen2.5 or Qwen3 directory in Hugging Face format. Raises HyloError for anything else or less."""
    refuse_released(directory)
    return BaseCheckpoint(directory)


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding}
    for i in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = embedding
    return shapes


def _layer_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }
    if config.model_type == "qwen3":
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    if config.model_type == "qwen2":
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"self_attn.{name}_proj.bias"] = (width,)
    if getattr(config, "mlp_bias", False):
        for name, width in (("gate", intermediate), ("up", intermediate), ("down", hidden)):
            shapes[f"mlp.{name}_proj.bias"] = (width,)
    return shapes
