"""The mixer of Kimi Linear (Kimi Team, arXiv 2510.26692): the delta rule with a decay for every channel of a key.

Parameters are named, shaped and used as in Kimi-Linear checkpoints. transformers' `kimi_linear` has one convolution for
the three, and A_log with dimensions of one around the heads'; flash-linear-attention gives g_b_proj a
bias, which checkpoints do not have. Queries, keys and values have biases where the base's have.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from hylo.modeling.attention import RMSNorm, ShortConv
from hylo.modeling.cache import read_states, write_states
from hylo.modeling.configuration import HyloConfig
from hylo.modeling.documents import Documents, pack, unpack
from hylo.modeling.rope import Rotary, rotary_key, turned
from hylo.ops.kda import kimi_delta_rule
from hylo.ops.short_conv import short_conv


class KimiDeltaAttention(nn.Module):
    """out = o_proj(RMSNorm(o) * sigmoid(g_b_proj g_a_proj x)), o from the Kimi delta rule over convolved q, k, v."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, config.kda_num_heads, config.kda_head_dim
        self.rotary_key = rotary_key(config, "kda", layer_idx)
        self.width = self.num_heads * self.head_dim  # of keys and of values
        hidden, taps = config.hidden_size, config.conv_kernel_size
        self.q_proj = nn.Linear(hidden, self.width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.width, bias=config.qkv_bias)
        self.q_conv1d = ShortConv(self.width, self.width, taps, groups=self.width, bias=False)
        self.k_conv1d = ShortConv(self.width, self.width, taps, groups=self.width, bias=False)
        self.v_conv1d = ShortConv(self.width, self.width, taps, groups=self.width, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.width))
        self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, self.width, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, self.width, bias=False)
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(self.width, hidden, bias=False)

    def forward(
        self,
        hidden_states_BTD: Tensor,
        documents: Documents | None = None,
        rotary: Rotary | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """documents: where rows are padded or packed; padding gives zeros. `rotary`: read under positions hype."""
        x, core = pack(hidden_states_BTD, documents), torch.promote_types(hidden_states_BTD.dtype, torch.float32)
        cu_seqlens = None if documents is None else documents.cu_seqlens
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        beta = self.b_proj(x).to(core).sigmoid()
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)).to(core) + self.dt_bias).unflatten(-1, (self.num_heads, -1))
        g = -self.A_log.to(core).exp()[:, None] * step

        conv_state, state = read_states(past_key_values, self.layer_idx)
        weight = torch.cat([conv()[0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        qkv, conv_state = short_conv(qkv, weight, state_NCS=conv_state, cu_seqlens=cu_seqlens)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in F.silu(qkv).chunk(3, dim=-1))
        q, k = (turned(t, rotary, self.rotary_key, heads=2) for t in (q, k))
        o, state = kimi_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=past_key_values is not None,
            use_qk_l2norm=True,
            cu_seqlens=cu_seqlens,
        )
        write_states(past_key_values, self.layer_idx, conv_state, state)
        gate = self.g_b_proj(self.g_a_proj(x)).sigmoid()
        return unpack(self.o_proj(self.o_norm(o).flatten(2) * gate), documents)
