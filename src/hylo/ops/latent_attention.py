"""Attention over a cached latent (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are up-projections of one latent c per token, k_nope = W_k c and v = W_v c, beside one rotated key that
all heads share. Two orders of the same products: `expanded` makes keys and values (prefill, training); `absorbed`
carries the queries through W_k into the latent and the context through W_v out of it: a decoded token reads the latent.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSV: Tensor,
    mask: Tensor | None,
    scale: float,
    lengths: list[int] | None = None,
) -> Tensor:
    """Softmax attention; K divides H; mask boolean or additive, None: causal (T = S) or everything (T = 1).

    lengths: those of documents packed one after the other, each of which sees only itself; without a mask.
    """
    if lengths is not None:
        documents = zip(*(t.split(lengths, dim=2) for t in (q_BHTD, k_BKSD, v_BKSV)), strict=True)
        return torch.cat([attend(q, k, v, mask, scale) for q, k, v in documents], dim=2)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSV,
        attn_mask=mask,
        is_causal=mask is None and q_BHTD.shape[2] > 1,
        scale=scale,
        enable_gqa=k_BKSD.shape[1] != q_BHTD.shape[1],
    )


def expanded_latent_attention(
    q_BHTD: Tensor,
    latent_BSR: Tensor,
    key_rope_BSP: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_kv_heads: int,
    scale: float,
    mask: Tensor | None = None,
    key_scale_BKS: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """Returns (B,H,T,v).

    q: heads laid out [nope | rope], the rope part rotated. up_weight (K*(nope+v), R) and up_bias: per kv head
    [nope | v] rows.
    key_scale: a factor on a kv head's whole key at a token (1/rms of Qwen3's key norm). mask, lengths: see `attend`.
    """
    B, S, _ = latent_BSR.shape
    nope = q_BHTD.shape[-1] - key_rope_BSP.shape[-1]
    up = F.linear(latent_BSR, up_weight, up_bias).view(B, S, num_kv_heads, -1).transpose(1, 2)
    k_nope, v = up[..., :nope], up[..., nope:]
    k = torch.cat((k_nope, key_rope_BSP[:, None].expand(-1, num_kv_heads, -1, -1)), dim=-1)
    if key_scale_BKS is not None:
        k = k * key_scale_BKS[..., None]
    return attend(q_BHTD, k, v, mask, scale, lengths)


def absorbed_latent_attention(
    q_BHTD: Tensor,
    latent_BSR: Tensor,
    key_rope_BSP: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_kv_heads: int,
    scale: float,
    mask: Tensor | None = None,
    key_scale_BKS: Tensor | None = None,
) -> Tensor:
    """The same for few queries (mask None: every query sees every token), without expanding the latent."""
    B, H, T, D = q_BHTD.shape
    K, S, R = num_kv_heads, latent_BSR.shape[1], latent_BSR.shape[2]
    nope = D - key_rope_BSP.shape[-1]
    W_k, W_v = up_weight.view(K, -1, R).split([nope, up_weight.shape[0] // K - nope], dim=1)
    q = q_BHTD.reshape(B, K, -1, D)  # the H/K heads of a kv head, and their tokens, as rows
    q_latent = q[..., :nope] @ W_k
    logits = q_latent @ latent_BSR.transpose(1, 2)[:, None] + q[..., nope:] @ key_rope_BSP.transpose(1, 2)[:, None]
    b_k, b_v = (None, None) if up_bias is None else up_bias.view(K, 1, -1).split(W_k.shape[1:2] + W_v.shape[1:2], dim=2)
    if b_k is not None:
        logits = logits + q[..., :nope] @ b_k.transpose(1, 2)
    logits = logits * scale if key_scale_BKS is None else logits * (scale * key_scale_BKS)[:, :, None]
    logits = logits.view(B, H, T, S)
    if mask is not None:
        # The least number rather than -inf: a padded query that sees nothing must not become NaN.
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32).to(q.dtype)
    context = weights.view(B, K, -1, S) @ latent_BSR[:, None]
    values = context @ W_v.transpose(1, 2)
    return (values if b_v is None else values + b_v).reshape(B, H, T, -1)
