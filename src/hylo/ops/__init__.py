"""The mathematics: plain functions of tensors, each with a naive reference beside it; they know nothing of models."""

from hylo.ops.cross_entropy import hidden_state_cross_entropy, naive_cross_entropy
from hylo.ops.divergence import cached_divergence, hidden_state_divergence, naive_divergence, teacher_vectors
from hylo.ops.gated_delta import gated_delta_rule, naive_gated_delta_rule
from hylo.ops.kda import kimi_delta_rule, naive_kimi_delta_rule
from hylo.ops.latent_attention import absorbed_latent_attention, expanded_latent_attention
from hylo.ops.short_conv import naive_short_conv, short_conv
from hylo.ops.ssd import naive_ssd, ssd

__all__ = [
    "absorbed_latent_attention",
    "cached_divergence",
    "expanded_latent_attention",
    "gated_delta_rule",
    "hidden_state_cross_entropy",
    "hidden_state_divergence",
    "kimi_delta_rule",
    "naive_cross_entropy",
    "naive_divergence",
    "naive_gated_delta_rule",
    "naive_kimi_delta_rule",
    "naive_short_conv",
    "naive_ssd",
    "short_conv",
    "ssd",
    "teacher_vectors",
]
