"""Conversion: a base directory and a plan in, a hybrid directory out, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from hylo.checkpoint import check_dtype, copy_companions
from hylo.convert.base import BaseCheckpoint, read_base
from hylo.convert.linear import fill_gated_deltanet, fill_mamba2
from hylo.convert.mla import fill_mla, rope_theta, split_rows
from hylo.convert.write import SHARD_BYTES, ShardWriter
from hylo.errors import HyloError
from hylo.files import complete_directory
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.mamba2 import Mamba2
from hylo.modeling.mla import MultiHeadLatentAttention
from hylo.plan import Plan

INITS = ("recipe", "pairs-stride", "pairs-fast", "random")
LINEAR_INITS = ("recipe", "aligned")


def convert(
    base: Path,
    out: Path,
    plan: Plan,
    init: str = "pairs-fast",
    seed: int = 0,
    dtype: str | None = None,
    linear_init: str = "aligned",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the hybrid that `plan` describes, initialised from the base, to the new directory `out`.

    `init`: one of INITS, how MLA layers start; `random` starts every mixer afresh and takes the rest from the base.
    `linear_init`: one of LINEAR_INITS, how linear layers start. `seed` decides what is left to chance, layer by layer.
    `dtype` of the written weights (default: the plan's); `progress(layers done, layers)` is called after every layer.
    Raises HyloError for a base that cannot be read and an `out` that exists or cannot be written.
    """
    check_init(plan, init, linear_init)
    checkpoint = read_base(base)
    if checkpoint.config.to_dict() != plan.base_config.to_dict():
        raise HyloError(f"the plan was made for another base than {base}; plan again")
    config = hylo_config(checkpoint.config, plan.mixers, plan.geometry, init)
    config.dtype = check_dtype(dtype or plan.dtype)
    config.architectures = [HyloForCausalLM.__name__]
    with torch.device("meta"):
        model = HyloForCausalLM(config)
    with complete_directory(out) as partial:
        writer = ShardWriter(partial, config.dtype, shard_bytes)
        writer.add("model.embed_tokens.weight", checkpoint["model.embed_tokens.weight"])
        for i in range(config.num_hidden_layers):
            _write_layer(writer, checkpoint, model, i, init, linear_init, seed)
            if progress is not None:
                progress(i + 1, config.num_hidden_layers)
        writer.add("model.norm.weight", checkpoint["model.norm.weight"])
        if not config.tie_word_embeddings:
            writer.add("lm_head.weight", checkpoint["lm_head.weight"])
        writer.finish()
        config.save_pretrained(partial)
        copy_companions(base, partial)


def _write_layer(
    writer: ShardWriter,
    checkpoint: BaseCheckpoint,
    model: HyloForCausalLM,
    index: int,
    init: str,
    linear_init: str,
    seed: int,
) -> None:
    """The base's norms and MLP as they are, and the mixer."""
    kind = model.config.mixers[index]
    verbatim = kind == "attention" and init != "random"
    prefix = f"model.layers.{index}."
    for name in checkpoint.layer_names():
        if verbatim or not name.startswith("self_attn."):
            writer.add(prefix + name.replace("self_attn.", "mixer."), checkpoint[prefix + name])
    if verbatim:
        return
    layer = model.model.layers[index]
    mixer = fresh_mixer(model, index, seed)
    if init != "random":
        attention = checkpoint.attention(index)
        if isinstance(mixer, MultiHeadLatentAttention):
            fill_mla(mixer, attention, init)
        elif isinstance(mixer, GatedDeltaNet):
            fill_gated_deltanet(mixer, attention, linear_init)
        elif isinstance(mixer, Mamba2):
            fill_mamba2(mixer, attention, linear_init)
    for name, tensor in mixer.state_dict().items():
        writer.add(f"{prefix}mixer.{name}", tensor)
    layer.mixer = mixer.to("meta")


def fresh_mixer(model: HyloForCausalLM, index: int, seed: int) -> nn.Module:
    """The mixer of one layer of a model on the meta device, on the CPU in float32 and randomly initialised."""
    mixer = model.model.layers[index].get_submodule("mixer")
    mixer.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + index)
        mixer.apply(model._init_weights)
    return mixer


def hylo_config(
    base_config: PreTrainedConfig, mixers: Sequence[str], geometry: Mapping[str, int], init: str
) -> HyloConfig:
    """The hybrid's configuration. MLA starts from plain RoPE with the theta that goes with `init`'s rotated rows."""
    theta = base_config.rope_parameters["rope_theta"]
    theta = rope_theta(theta, base_config.head_dim, geometry["qk_rope_head_dim"], init)
    return HyloConfig(
        **{key: getattr(base_config, key) for key in _SHARED_KEYS},
        mlp_bias=getattr(base_config, "mlp_bias", False),
        base_model_type=base_config.model_type,
        qk_norm=base_config.model_type == "qwen3",
        qkv_bias=base_config.model_type == "qwen2",
        rope_parameters=dict(base_config.rope_parameters),
        mla_rope_parameters={"rope_type": "default", "rope_theta": theta},
        mixers=list(mixers),
        **geometry,
    )


_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def check_init(plan: Plan, init: str, linear_init: str = "aligned") -> None:
    """Raises HyloError for an initialisation that does not exist or does not fit the plan. Reads no weight."""
    if init not in INITS:
        raise HyloError(f"init {init} is not known; choose one of {', '.join(INITS)}")
    if linear_init not in LINEAR_INITS:
        raise HyloError(f"linear init {linear_init} is not known; choose one of {', '.join(LINEAR_INITS)}")
    if "mla" in plan.mixers:
        split_rows(plan.base_config.head_dim, plan.geometry["qk_rope_head_dim"], init)
