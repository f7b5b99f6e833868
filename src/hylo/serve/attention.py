"""The attention layers in vLLM: the base's own, and MLA around vLLM's `MLAAttention`.

vLLM has the tokens of all requests in one row: heads are (T,H,d), cos and sin (T,d).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from hylo.modeling.configuration import HyloConfig
from hylo.modeling.rope import Rotary, rotary_key, turned
from hylo.serve.latent import latent_backend
from hylo.serve.supported import served_rank
from hylo.serve.weights import Loaded


class BaseAttention(nn.Module):
    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        devices, self.head_dim = get_tensor_model_parallel_world_size(), config.head_dim
        self.rotary_key = rotary_key(config, "attention", layer_of(prefix))
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, kv_heads, bias=config.qkv_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        own_heads, own_kv_heads = heads // devices, max(1, kv_heads // devices)
        self.widths = [own_heads * self.head_dim, own_kv_heads * self.head_dim, own_kv_heads * self.head_dim]
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.attn = Attention(
            own_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=own_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x_TD: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = self.qkv_proj(x_TD)[0].split(self.widths, dim=-1)
        q = turned(self.q_norm(_heads(q, self.head_dim)), rotary, self.rotary_key).flatten(1)
        k = turned(self.k_norm(_heads(k, self.head_dim)), rotary, self.rotary_key).flatten(1)
        return self.o_proj(self.attn(q, k, v))[0]

    @staticmethod
    def translated(name: str, tensor: Tensor) -> Iterator[Loaded]:
        module, _, kind = name.partition(".")
        if module in ("q_proj", "k_proj", "v_proj"):
            yield f"qkv_proj.{kind}", tensor, module[0]
        else:
            yield name, tensor, None


class LatentAttention(nn.Module):
    """vLLM wants an up-projection for every query head: a kv head's is repeated. Its bias (Qwen2.5) adds one number to
    all logits of a softmax, which changes nothing, and one vector to the values, which is added behind."""

    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        devices = get_tensor_model_parallel_world_size()
        hidden, heads, self.v_head_dim = config.hidden_size, config.num_attention_heads, config.v_head_dim
        self.rank, self.nope, self.rope = served_rank(config), config.qk_nope_head_dim, config.qk_rope_head_dim
        self.qk_head_dim = self.nope + self.rope
        self.groups = heads // config.num_key_value_heads
        self.rotary_key = rotary_key(config, "mla", layer_of(prefix))
        own_heads = heads // devices
        self.q_a_proj = ReplicatedLinear(hidden, config.q_lora_rank, bias=False, prefix=f"{prefix}.q_a_proj")
        self.q_b_proj = ColumnParallelLinear(
            config.q_lora_rank, heads * self.qk_head_dim, bias=config.qkv_bias, prefix=f"{prefix}.q_b_proj"
        )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden, self.rank + self.rope, bias=config.qkv_bias, prefix=f"{prefix}.kv_a_proj_with_mqa"
        )
        self.kv_b_proj = ColumnParallelLinear(
            self.rank, heads * (self.nope + self.v_head_dim), bias=config.qkv_bias, prefix=f"{prefix}.kv_b_proj"
        )
        self.o_proj = RowParallelLinear(heads * self.v_head_dim, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.gated = config.attention_gate
        if self.gated:
            self.g_proj = ColumnParallelLinear(hidden, heads * self.v_head_dim, bias=False, prefix=f"{prefix}.g_proj")
        self.q_norm = RMSNorm(self.qk_head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        own = {"kv_heads": _different(own_heads, self.groups)} if current_platform.is_cpu() else {}
        self.attn = MLAAttention(
            num_heads=own_heads,
            scale=self.qk_head_dim**-0.5,
            qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=self.rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=latent_backend(),
            **own,
        )

    def forward(self, x_TD: Tensor, rotary: Rotary) -> Tensor:
        q = self.q_b_proj(self.q_a_proj(x_TD)[0])[0]
        q_nope, q_rope = self.q_norm(_heads(q, self.qk_head_dim)).split([self.nope, self.rope], dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(x_TD)[0].split([self.rank, self.rope], dim=-1)
        q = torch.cat((q_nope, turned(q_rope, rotary, self.rotary_key)), dim=-1)
        key_rope = turned(key_rope[:, None], rotary, self.rotary_key)
        shape = torch.Size((x_TD.shape[0], q.shape[1] * self.v_head_dim))
        o = self.attn(q, latent.contiguous(), key_rope, output_shape=shape)
        if self.kv_b_proj.bias is not None:
            o = o + _heads(self.kv_b_proj.bias, self.nope + self.v_head_dim, 0)[:, self.nope :].flatten()
        if self.gated:
            o = o * self.g_proj(x_TD)[0].sigmoid()
        return self.o_proj(o)[0]

    def translated(self, name: str, tensor: Tensor) -> Iterator[Loaded]:
        """A layer's own rank is padded to the engine's, kv heads' up-projections are repeated to all heads."""
        if name.startswith("kv_a_proj_with_mqa"):
            latent, key_rope = tensor.split([len(tensor) - self.rope, self.rope])
            padding = latent.new_zeros(self.rank - len(latent), *latent.shape[1:])
            tensor = torch.cat((latent, padding, key_rope))
        elif name.startswith("kv_b_proj"):
            heads = _heads(tensor, self.nope + self.v_head_dim, 0)
            tensor = heads.repeat_interleave(self.groups, dim=0).flatten(0, 1)
            if tensor.ndim == 2:
                tensor = nn.functional.pad(tensor, (0, self.rank - tensor.shape[1]))
        yield name, tensor, None


def _different(own_heads: int, groups: int) -> int:
    """Of how many kv heads a device's heads are, if they share them evenly; else each has one of its own."""
    if groups % own_heads == 0:
        return 1
    return own_heads // groups if own_heads % groups == 0 else own_heads


def _heads(x: Tensor, width: int, dim: int = -1) -> Tensor:
    return x.unflatten(dim, (-1, width))


def layer_of(prefix: str) -> int:
    """Of a mixer's prefix, model.layers.3.mixer."""
    return int(prefix.split(".")[-2])
