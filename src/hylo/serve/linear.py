"""The linear blocks in vLLM: its own layers with their kernels on GPUs, hylo.ops between them on CPUs.

The recurrent states lie in vLLM's pages either way; on CPUs they are read in the order that hylo.ops has them.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator, is_conv_state_dim_first
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op
from vllm.v1.kv_cache_interface import KVCacheSpec

from hylo.geometry import geometry_in, mamba_channels
from hylo.modeling.configuration import HyloConfig
from hylo.ops.gated_delta import gated_delta_rule
from hylo.ops.short_conv import short_conv
from hylo.ops.ssd import ssd
from hylo.serve.weights import Loaded, part_loader

Shapes = tuple[tuple[int, ...], ...]


class GatedDeltaNet(QwenGatedDeltaNetAttention):
    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, prefix: str) -> None:
        self.biased = config.qkv_bias
        super().__init__(_as_qwen(config), vllm_config, prefix, gqa_interleaved_layout=False)
        self.conv1d.weight.weight_loader = part_loader([self.key_dim, self.key_dim, self.value_dim])

    def create_qkvz_proj(
        self, hidden_size: int, key_dim: int, value_dim: int, quant_config: Any, prefix: str
    ) -> MergedColumnParallelLinear:
        sizes = [key_dim, key_dim, value_dim, value_dim]
        projection = MergedColumnParallelLinear(hidden_size, sizes, bias=self.biased, prefix=prefix)
        if self.biased:
            projection.bias.data.zero_()  # the gate has none
        return projection

    def forward(self, x_TD: Tensor, rotary: Any = None) -> Tensor:
        return super().forward(x_TD)

    def forward_cpu(self, hidden_states: Tensor) -> Tensor:
        own_keys, own_values = self.key_dim // self.tp_size, self.value_dim // self.tp_size
        qkv, z = self.in_proj_qkvz(hidden_states)[0].split([2 * own_keys + own_values, own_values], dim=-1)
        b, a = self.in_proj_ba(hidden_states)[0].chunk(2, dim=-1)
        z = z.unflatten(-1, (-1, self.head_v_dim))
        o = torch.zeros_like(z)
        torch.ops.vllm.hylo_gated_delta(qkv, b, a, o, _encode_layer_name(self.prefix))
        return self.out_proj((self.norm.forward_native(o, z)).flatten(-2))[0]

    def recur(self, qkv_TC: Tensor, b_TH: Tensor, a_TH: Tensor, o_THV: Tensor) -> None:
        """The layer between its projections; writes o and the states of all sequences at hand."""
        own_keys = self.key_dim // self.tp_size
        g = -self.A_log.float().exp() * F.softplus(a_TH.float() + self.dt_bias.float())
        beta = b_TH.float().sigmoid()
        for run in runs(self):
            conv, state = run.read(self.kv_cache, (-1, self.head_k_dim, self.head_v_dim))
            qkv, conv = short_conv(run.rows(qkv_TC), self.conv_weight, None, conv, run.cu_seqlens)
            q, k, v = F.silu(qkv).split([own_keys, own_keys, qkv.shape[-1] - 2 * own_keys], dim=-1)
            q, k = (t.unflatten(-1, (-1, self.head_k_dim)) for t in (q, k))
            v = v.unflatten(-1, (-1, self.head_v_dim))
            o, after = gated_delta_rule(
                q,
                k,
                v,
                run.rows(g),
                run.rows(beta),
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm=True,
                cu_seqlens=run.cu_seqlens,
            )
            o_THV[run.tokens] = o.flatten(0, 1)
            run.write(self.kv_cache, conv, after)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    @staticmethod
    def state_shapes(config: HyloConfig, devices: int) -> Shapes:
        heads, width = config.gdn_num_heads, config.gdn_head_dim
        return MambaStateShapeCalculator.gated_delta_net_state_shape(
            devices, heads, heads, width, width * config.gdn_expand_v, config.conv_kernel_size
        )

    @staticmethod
    def translated(name: str, tensor: Tensor) -> Iterator[Loaded]:
        module, _, kind = name.partition(".")
        if module in ("q_proj", "k_proj", "v_proj", "g_proj"):
            yield f"in_proj_qkvz.{kind}", tensor, "qkvg".index(module[0])
        elif module in ("a_proj", "b_proj"):
            yield f"in_proj_ba.{kind}", tensor, "ba".index(module[0])
        elif module in ("q_conv1d", "k_conv1d", "v_conv1d"):
            yield "conv1d.weight", tensor, "qkv".index(module[0])
        else:
            yield name.replace("o_norm", "norm").replace("o_proj", "out_proj"), tensor, None

    def finish_loading(self) -> None:
        if current_platform.is_cpu():  # which repacks the layer's own
            self.conv_weight = self.conv1d.weight.detach().clone()


class Mamba2(MambaMixer2):
    """vLLM's layer convolves what all heads use; ours convolves x and B by kv head and repeats them behind, which is
    where its kernels split them."""

    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, prefix: str) -> None:
        heads, N = config.mamba_num_heads, config.mamba_d_state
        super().__init__(
            hidden_size=config.hidden_size,
            ssm_state_size=N,
            conv_kernel_size=config.conv_kernel_size,
            intermediate_size=config.mamba_d_inner,
            use_conv_bias=True,
            use_bias=False,
            n_groups=heads,
            num_heads=heads,
            head_dim=config.mamba_head_dim,
            rms_norm_eps=config.rms_norm_eps,
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self.config, groups = config, config.mamba_d_xb // config.mamba_head_dim
        channels = [config.mamba_d_xb, groups * N, heads * N]  # x, B, C
        self.in_parts = [config.mamba_d_inner, *channels, heads]  # z before, dt behind
        self.conv_parts, self.conv_dim = channels, sum(channels)
        self.tped_conv_size = self.conv_dim // self.tp_size
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size, self.in_parts, bias=config.qkv_bias, prefix=f"{prefix}.in_proj"
        )
        self.conv1d = MergedColumnParallelLinear(
            config.conv_kernel_size, channels, bias=True, prefix=f"{prefix}.conv1d"
        )
        self.conv1d.weight.data = self.conv1d.weight.data.unsqueeze(1)
        self.conv_weights = self.conv1d.weight[:, 0]
        for layer, parts in ((self.in_proj, self.in_parts), (self.conv1d, channels)):
            for parameter in layer.parameters():
                parameter.weight_loader = part_loader(parts)
        self.split_hidden_states_B_C_fn = self._split_and_repeat
        self.repeats = heads // groups

    def _split_and_repeat(self, xBC: Tensor) -> list[Tensor]:
        x, B, C = xBC.split([part // self.tp_size for part in self.conv_parts], dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim)).repeat_interleave(self.repeats, dim=-2).flatten(-2)
        B = B.unflatten(-1, (-1, self.ssm_state_size)).repeat_interleave(self.repeats, dim=-2).flatten(-2)
        return [x, B, C]

    def forward(self, x_TD: Tensor, rotary: Any = None) -> Tensor:
        return super().forward(x_TD)

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> None:
        if not current_platform.is_cpu():
            super().conv_ssm_forward(projected_states, output)
            return
        z_width = self.tped_intermediate_size
        xBC, dt = projected_states[..., z_width:].split([self.tped_conv_size, self.tped_dt_size], dim=-1)
        for run in runs(self):
            conv, state = run.read(self.kv_cache, (-1, self.head_dim, self.ssm_state_size))
            parts, conv = short_conv(run.rows(xBC), self.conv_weight, self.conv_bias, conv, run.cu_seqlens)
            x, B, C = F.silu(parts).split([part // self.tp_size for part in self.conv_parts], dim=-1)
            y, after = ssd(
                x.unflatten(-1, (-1, self.head_dim)),
                run.rows(dt),
                (-self.A).log(),
                B.unflatten(-1, (-1, self.ssm_state_size)),
                C.unflatten(-1, (-1, self.ssm_state_size)),
                self.D,
                self.dt_bias,
                initial_state=state,
                output_final_state=True,
                cu_seqlens=run.cu_seqlens,
            )
            output[run.tokens] = y.flatten(0, 1).flatten(1)
            run.write(self.kv_cache, conv, after)

    def get_state_shape(self) -> Shapes:
        return self.state_shapes(self.config, self.tp_size)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    @staticmethod
    def state_shapes(config: HyloConfig, devices: int) -> Shapes:
        channels = mamba_channels(geometry_in(config)) // devices
        columns = MambaStateShapeCalculator._orient_conv_shape(channels, config.conv_kernel_size - 1)
        return columns, (config.mamba_num_heads // devices, config.mamba_head_dim, config.mamba_d_state)

    def translated(self, name: str, tensor: Tensor) -> Iterator[Loaded]:
        parts = {"in_proj": self.in_parts, "conv1d": self.conv_parts}.get(name.partition(".")[0])
        if parts is None:
            yield name.replace("A_log", "A"), tensor, None
        else:
            for index, part in enumerate(tensor.split(parts)):
                yield name, part, index

    def finish_loading(self) -> None:
        if current_platform.is_cpu():
            self.conv_weight, self.conv_bias = self.conv1d.weight.detach().clone(), self.conv1d.bias.detach().clone()


class Run(NamedTuple):
    """Some sequences of a batch: tokens that continue one sequence each, or prompts packed one after the other."""

    tokens: slice
    slots: Tensor  # their pages
    fresh: Tensor | None  # of prompts: whether there is nothing before; None: one token each
    cu_seqlens: Tensor | None  # the bounds of several prompts

    def rows(self, x_TC: Tensor) -> Tensor:
        x = x_TC[self.tokens]
        return x[:, None] if self.fresh is None else x[None]

    def read(self, cache: tuple[Tensor, ...], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The convolution's columns (N,C,W-1) and the recurrent states (N,*shape)."""
        columns, states = (pages[self.slots] for pages in cache)
        if not is_conv_state_dim_first():
            columns = columns.transpose(1, 2)
        states = states.view(len(self.slots), *shape)
        if self.fresh is not None:
            columns = columns.masked_fill(self.fresh[:, None, None], 0)
            states = states.masked_fill(self.fresh[:, None, None, None], 0)
        return columns, states

    def write(self, cache: tuple[Tensor, ...], columns: Tensor, states: Tensor | None) -> None:
        assert states is not None
        if not is_conv_state_dim_first():
            columns = columns.transpose(1, 2)
        cache[0][self.slots] = columns.to(cache[0].dtype)
        cache[1][self.slots] = states.reshape(len(self.slots), *cache[1].shape[1:]).to(cache[1].dtype)


def runs(layer: Any) -> Iterator[Run]:
    """The batch that vLLM's metadata tells of, decoded tokens first; nothing while it measures its memory."""
    by_layer = get_forward_context().attn_metadata
    if by_layer is None:
        return
    batch = by_layer[layer.prefix]
    decodes, prefills = batch.num_decodes, batch.num_prefills
    if isinstance(layer, Mamba2):
        decode_slots, prefill_slots = batch.state_indices_tensor_d, batch.state_indices_tensor_p
        bounds, seen = batch.query_start_loc_p, batch.has_initial_states_p
    else:
        slots = batch.non_spec_state_indices_tensor
        decode_slots, prefill_slots = slots[:decodes], slots[decodes : decodes + prefills]
        bounds, seen = batch.prefill_query_start_loc, batch.prefill_has_initial_state
    if decodes:
        yield Run(slice(0, decodes), decode_slots.flatten()[:decodes].long(), None, None)
    if prefills:
        tokens = slice(decodes, decodes + batch.num_prefill_tokens)
        cu_seqlens = bounds[: prefills + 1].long() if prefills > 1 else None
        yield Run(tokens, prefill_slots.flatten()[:prefills].long(), ~seen[:prefills], cu_seqlens)


def _as_qwen(config: HyloConfig) -> Any:
    """The figures that vLLM's layer reads, under the names of the model that it was written for."""
    return SimpleNamespace(
        hidden_size=config.hidden_size,
        hidden_act="silu",
        rms_norm_eps=config.rms_norm_eps,
        linear_num_key_heads=config.gdn_num_heads,
        linear_num_value_heads=config.gdn_num_heads,
        linear_key_head_dim=config.gdn_head_dim,
        linear_value_head_dim=config.gdn_head_dim * config.gdn_expand_v,
        linear_conv_kernel_dim=config.conv_kernel_size,
    )


def _gated_delta(qkv: Tensor, b: Tensor, a: Tensor, o: Tensor, layer_name: LayerNameType) -> None:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.recur(qkv, b, a, o)


direct_register_custom_op("hylo_gated_delta", _gated_delta, mutates_args=["o"])
