"""The hybrid's configuration, from the base's and the plan."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

from hylo.convert.mla import rope_theta
from hylo.modeling import HyloConfig
from hylo.plan import Plan


def planned_config(plan: Plan, init: str) -> HyloConfig:
    """The configuration of the hybrid that `convert` writes; `pairs-best` fills in `mla_inv_freq` as it goes."""
    config = hylo_config(plan.base_config, plan.mixers, plan.geometry, init)
    config.mla_k_norm, config.kv_lora_ranks = plan.k_norm, plan.kv_lora_ranks
    config.positions, config.attention_gate = plan.positions, plan.attention_gate
    if init == "pairs-best":
        config.mla_inv_freq = [None] * len(plan.mixers)
    return config


def hylo_config(
    base_config: PreTrainedConfig, mixers: Sequence[str], geometry: Mapping[str, int], init: str
) -> HyloConfig:
    """The hybrid's configuration. MLA starts from plain RoPE with the theta that goes with `init`'s rotated rows."""
    theta = base_config.rope_parameters["rope_theta"]
    theta = rope_theta(theta, base_config.head_dim, geometry["qk_rope_head_dim"], init)
    return HyloConfig(
        **{key: getattr(base_config, key) for key in _SHARED_KEYS},
        base_max_position_embeddings=base_config.max_position_embeddings,
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
