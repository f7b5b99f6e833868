"""Kimi Delta Attention in vLLM: its own layer and kernels on GPUs, hylo.ops between the projections on CPUs.

vLLM's layer is Kimi Linear's, whose model is not compiled: one op keeps what reads the batch out of the compiled graph.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from hylo.modeling.configuration import HyloConfig
from hylo.ops.kda import kimi_delta_rule
from hylo.ops.short_conv import short_conv
from hylo.serve.linear import Shapes, runs
from hylo.serve.weights import Loaded

STACKED = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")  # as vLLM's layer stacks them


class KimiDeltaAttention(KimiGatedDeltaNetAttention):
    in_proj_qkvgfab: Any

    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(_as_kimi(config), vllm_config, prefix)
        self.o_norm.eps = config.rms_norm_eps
        self.conv1d.weight.data = self.conv1d.weight.data.to(vllm_config.model_config.dtype)
        if config.qkv_bias:
            sizes = [self.projection_size] * 3 + [self.num_heads, self.head_dim]
            self.in_proj_qkvgfab = type(self.in_proj_qkvgfab)(
                config.hidden_size,
                sizes,
                replicated_shard_id=4,
                tp_size=self.tp_size,
                bias=True,
                prefix=f"{prefix}.in_proj_qkvgfab",
            )
            self.in_proj_qkvgfab.bias.data.zero_()  # only q, k and v have one
        splitting = vllm_config.compilation_config.splitting_ops
        if not current_platform.is_cpu() and splitting is not None and OP not in splitting:
            splitting.append(OP)

    def forward(self, x_TD: Tensor, rotary: Any = None) -> Tensor:
        sizes = [3 * self.local_projection_size, self.local_num_heads, self.head_dim]
        qkv, b, f = self.in_proj_qkvgfab(x_TD)[0].split(sizes, dim=-1)
        f, gate = self.f_b_proj(f)[0], self.g_b_proj(self.g_a_proj(x_TD)[0])[0]
        f, gate = (t.unflatten(-1, (-1, self.head_dim)) for t in (f, gate))
        o = torch.zeros_like(gate)
        torch.ops.vllm.hylo_kimi_delta(qkv, b, f, gate, o, _encode_layer_name(self.prefix))
        return self.o_proj(o.flatten(-2))[0]

    def recur(self, qkv_TC: Tensor, b_TH: Tensor, f_THd: Tensor, gate_THd: Tensor, o_THd: Tensor) -> None:
        """The layer between its projections; writes o, gated, and the states of all sequences at hand."""
        if not current_platform.is_cpu():
            self._forward(mixed_qkv=qkv_TC, g1=f_THd[None], g2=gate_THd, beta=b_TH[None], core_attn_out=o_THd[None])
            return
        step = F.softplus(f_THd.float() + self.dt_bias.float().view(-1, self.head_dim))
        g, beta = -self.A_log.float().exp()[:, None] * step, b_TH.float().sigmoid()
        for run in runs(self):
            conv, state = run.read(self.kv_cache, (-1, self.head_dim, self.head_dim))
            qkv, conv = short_conv(run.rows(qkv_TC), self.conv_weight, None, conv, run.cu_seqlens)
            q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in F.silu(qkv).chunk(3, dim=-1))
            o, after = kimi_delta_rule(
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
            o_THd[run.tokens] = o.flatten(0, 1)
            run.write(self.kv_cache, conv, after)
        o_THd.copy_(self.o_norm.forward_native(o_THd, gate_THd))

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return GatedDeltaNetAttention.get_state_dtype(self)  # the layer's own knows no --state-dtype

    @staticmethod
    def state_shapes(config: HyloConfig, devices: int) -> Shapes:
        heads, width = config.kda_num_heads, config.kda_head_dim
        return MambaStateShapeCalculator.kda_state_shape(
            devices, heads, width, conv_kernel_size=config.conv_kernel_size
        )

    @staticmethod
    def translated(name: str, tensor: Tensor) -> Iterator[Loaded]:
        module, _, kind = name.partition(".")
        if module in STACKED:
            yield f"in_proj_qkvgfab.{kind}", tensor, STACKED.index(module)
        elif module in ("q_conv1d", "k_conv1d", "v_conv1d"):
            yield "conv1d.weight", tensor, "qkv".index(module[0])
        else:
            yield name, tensor, None

    def finish_loading(self) -> None:
        if current_platform.is_cpu():  # which repacks the layer's own
            self.conv_weight = self.conv1d.weight.detach().clone()


def _as_kimi(config: HyloConfig) -> Any:
    """The figures that vLLM's layer reads, under the names of the model that it was written for."""
    return SimpleNamespace(
        hidden_size=config.hidden_size,
        hidden_act="silu",
        rms_norm_eps=config.rms_norm_eps,
        linear_attn_config={
            "head_dim": config.kda_head_dim,
            "num_heads": config.kda_num_heads,
            "short_conv_kernel_size": config.conv_kernel_size,
        },
    )


def _kimi_delta(qkv: Tensor, b: Tensor, f: Tensor, gate: Tensor, o: Tensor, layer_name: LayerNameType) -> None:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.recur(qkv, b, f, gate, o)


OP = "vllm::hylo_kimi_delta"  # vLLM cuts its graphs at such ops
direct_register_custom_op("hylo_kimi_delta", _kimi_delta, mutates_args=["o"])
