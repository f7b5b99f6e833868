"""Attention over a cached latent (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are up-projections of one latent c per token, k_nope = W_k c and v = W_v c, beside one rotated key that
all heads share. Two orders of the same products: `expanded` makes keys and values (prefill, training); `absorbed`
carries the queries through W_k into the latent and the context through W_v out of it: a decoded token reads the latent.
In prefill and training no tensor grows with queries times tokens: masks are made for a few queries at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops.checks import check_multiple, check_tensors

MASK_BYTES = 1 << 26  # of the mask of one chunk of queries


def attend(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSV: Tensor,
    mask: Tensor | None,
    scale: float,
    lengths: list[int] | None = None,
    padding_BS: Tensor | None = None,
) -> Tensor:
    """Softmax attention of T queries, those of the last T of S tokens; K divides H. Returns (B,H,T,V).

    mask: what a query sees, (B,H,T,S) or what broadcasts to it, boolean or to be added; None: all up to its own token.
    padding (boolean, True on real tokens): hides the others as well; what a query that sees nothing gets is undefined,
    but finite. lengths: those of documents packed one after the other, each of which sees only itself; without a mask
    or padding. Raises ValueError for tensors that do not fit together.
    """
    tensors = {"q": (q_BHTD, "B H T D"), "k": (k_BKSD, "B K S D"), "v": (v_BKSV, "B K S V")}
    sizes = check_tensors("attend", **tensors)
    check_multiple("attend", sizes, "H", "K")
    mask = _check_visible("attend", sizes, q_BHTD, mask, padding_BS)
    _check_types("attend", q_BHTD, k=k_BKSD, v=v_BKSV)
    T, S = sizes["T"], sizes["S"]
    if lengths is not None:
        if mask is not None or padding_BS is not None:
            raise ValueError("attend: lengths go without mask and padding")
        if sum(lengths) != T or T != S:
            raise ValueError(f"attend: lengths add up to {sum(lengths)}, expected T={T} and S={S}, both")
        documents = zip(*(t.split(lengths, dim=2) for t in (q_BHTD, k_BKSD, v_BKSV)), strict=True)
        return torch.cat([_sdpa(q, k, v, None, scale) for q, k, v in documents], dim=2)
    if mask is None and padding_BS is None and (T == S or T == 1):
        return _sdpa(q_BHTD, k_BKSD, v_BKSV, None, scale)
    if mask is None and T > S:
        raise ValueError(f"attend: T={T}, expected at most S={S}")

    # The boolean mask and, inside scaled_dot_product_attention, the same to be added.
    rows = max(1 if padding_BS is None else sizes["B"], 1 if mask is None else mask.shape[:2].numel())
    chunk = max(1, MASK_BYTES // (rows * S * (1 + q_BHTD.element_size())))
    outputs = []
    for start in range(0, max(T, 1), chunk):
        end = min(start + chunk, T)
        if mask is not None:
            seen, here = S, mask if mask.shape[-2] == 1 else mask[..., start:end, :]
        else:
            seen, here = S - T + end, None
            if T > 1:
                tokens = torch.arange(seen, device=q_BHTD.device)
                here = tokens <= tokens[S - T + start :, None]
        if padding_BS is not None:
            here = _hide(here, padding_BS[:, :seen])
        outputs.append(_sdpa(q_BHTD[:, :, start:end], k_BKSD[:, :, :seen], v_BKSV[:, :, :seen], here, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
    padding_BS: Tensor | None = None,
) -> Tensor:
    """Returns (B,H,T,v).

    q: heads laid out [nope | rope], the rope part rotated. up_weight (K*(nope+v), R) and up_bias: per kv head
    [nope | v] rows.
    key_scale: a factor on a kv head's whole key at a token (1/rms of Qwen3's key norm). mask, lengths, padding: see
    `attend`. Raises ValueError for tensors that do not fit together.
    """
    tensors = q_BHTD, latent_BSR, key_rope_BSP, up_weight, up_bias, num_kv_heads, key_scale_BKS
    sizes = _check_latent("expanded_latent_attention", *tensors)
    up = F.linear(latent_BSR, up_weight, up_bias).view(sizes["B"], sizes["S"], num_kv_heads, -1).transpose(1, 2)
    nope = sizes["D"] - sizes["P"]
    k_nope, v = up[..., :nope], up[..., nope:]
    k = torch.cat((k_nope, key_rope_BSP[:, None].expand(-1, num_kv_heads, -1, -1)), dim=-1)
    if key_scale_BKS is not None:
        k = k * key_scale_BKS[..., None]
    return attend(q_BHTD, k, v, mask, scale, lengths, padding_BS)


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
    padding_BS: Tensor | None = None,
) -> Tensor:
    """The same for few queries, without expanding the latent. mask None: every query sees every token, or every real
    token of `padding`."""
    tensors = q_BHTD, latent_BSR, key_rope_BSP, up_weight, up_bias, num_kv_heads, key_scale_BKS
    sizes = _check_latent("absorbed_latent_attention", *tensors)
    mask = _check_visible("absorbed_latent_attention", sizes, q_BHTD, mask, padding_BS)
    B, H, T, D, R, K = *q_BHTD.shape, sizes["R"], num_kv_heads
    nope = D - sizes["P"]
    W_k, W_v = up_weight.view(K, -1, R).split([nope, sizes["E"] // K - nope], dim=1)
    b_k, b_v = (None, None) if up_bias is None else up_bias.view(K, 1, -1).split([W_k.shape[1], W_v.shape[1]], dim=2)
    if padding_BS is not None:
        mask = _hide(mask, padding_BS)
    q = q_BHTD.reshape(B, K, -1, D)  # the H/K heads of a kv head, and their tokens, as rows
    # All heads' rows go through the latent in one product: it is read once for the logits, once for the context.
    q_latent, q_rope = (q[..., :nope] @ W_k).flatten(1, 2), q[..., nope:].flatten(1, 2)
    offset = None
    if b_k is not None and key_scale_BKS is not None:  # without a scale it is one number for all tokens of a softmax
        offset = scale * (q[..., :nope] @ b_k.mT).flatten(1, 2)

    def read(b: int | slice) -> Tensor:
        """The context in the latent, of one row or of all."""
        logits = _logits(q_latent[b], q_rope[b], latent_BSR[b], key_rope_BSP[b], scale)
        if offset is not None:
            logits = logits + offset[b]
        if key_scale_BKS is not None:
            logits = (logits.unflatten(-2, (K, -1)) * key_scale_BKS[b].contiguous()[..., None, :]).flatten(-3, -2)
        if mask is not None:
            here = mask[b] if len(mask) == B else mask[0]
            logits = _masked(logits.unflatten(-2, (H, T)), here).flatten(-3, -2)
        return logits.softmax(-1).to(latent_BSR.dtype) @ latent_BSR[b]

    # A CPU multiplies matrices faster than batches of them (bf16: several times), and a row's logits fit in its cache.
    context = torch.stack([read(b) for b in range(B)]) if q.device.type == "cpu" else read(slice(None))
    values = context.unflatten(1, (K, -1)) @ W_v.mT
    return (values if b_v is None else values + b_v).reshape(B, H, T, -1)


def naive_attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSV: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v, written out. visible: boolean, broadcast to (B,H,T,S); None: causal, as in `attend`."""
    groups, T, S = q_BHTD.shape[1] // k_BKSD.shape[1], q_BHTD.shape[2], k_BKSD.shape[2]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k_BKSD, v_BKSV))
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril(S - T)
    logits = (scale * q_BHTD @ k.mT).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """mask None: causal (T = S) or everything (T = 1)."""
    width, gqa = v.shape[-1], k.shape[1] != q.shape[1]
    if width != k.shape[-1]:  # torch's kernels that make no matrix of queries by tokens want one width
        widest = max(width, k.shape[-1])
        q, k, v = (t if t.shape[-1] == widest else F.pad(t, (0, widest - t.shape[-1])) for t in (q, k, v))
    if gqa and q.is_cuda and (mask is not None or q.dtype == torch.float32):  # nor do those for masks share heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        gqa = False
    causal = mask is None and q.shape[2] > 1
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o[..., :width]


def _logits(q_latent: Tensor, q_rope: Tensor, latent: Tensor, key_rope: Tensor, scale: float) -> Tensor:
    """scale (q_latent latent^T + q_rope key_rope^T) in float32 or better, of matrices or batches of them."""
    add = torch.addmm if q_latent.ndim == 2 else torch.baddbmm
    if q_latent.dtype in (torch.float32, torch.float64):
        return add(q_rope @ key_rope.mT, q_latent, latent.mT, beta=scale, alpha=scale)

    def product(q: Tensor, keys: Tensor) -> Tensor:
        """What rounding takes from a product a second one gives back: products are summed in float32 inside."""
        rounded = q @ keys.mT
        return rounded.float().add_(add(rounded, q, keys.mT, beta=-1).float())

    return product(q_latent, latent).add_(product(q_rope, key_rope)).mul_(scale)


def _hide(mask: Tensor | None, padding_BS: Tensor) -> Tensor:
    """The mask, (B,1,1,S) at least, in which padding is not seen either."""
    real = padding_BS[:, None, None]
    if mask is None:
        return real
    return mask & real if mask.dtype == torch.bool else _masked(mask, real)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    # The least number rather than -inf: a padded query that sees nothing must not become NaN.
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask


def _check_latent(
    operation: str,
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_kv_heads: int,
    key_scale: Tensor | None,
) -> dict[str, int]:
    sizes = check_tensors(
        operation,
        q=(q, "B H T D"),
        latent=(latent, "B S R"),
        key_rope=(key_rope, "B S P"),
        up_weight=(up_weight, "E R"),
        up_bias=(up_bias, "E"),
        key_scale=(key_scale, f"B {num_kv_heads} S"),
    )
    sizes["num_kv_heads"] = num_kv_heads
    check_multiple(operation, sizes, "H", "num_kv_heads")
    nope = sizes["D"] - sizes["P"]
    if nope < 0:
        raise ValueError(f"{operation}: key_rope is {sizes['P']} wide, expected at most D={sizes['D']}")
    if sizes["E"] % num_kv_heads or sizes["E"] <= num_kv_heads * nope:
        expected = f"num_kv_heads={num_kv_heads} times nope={nope} and a value's width"
        raise ValueError(f"{operation}: up_weight has {sizes['E']} rows, expected {expected}")
    _check_types(
        operation, q, latent=latent, key_rope=key_rope, up_weight=up_weight, up_bias=up_bias, key_scale=key_scale
    )
    return sizes


def _check_visible(
    operation: str, sizes: dict[str, int], q: Tensor, mask: Tensor | None, padding: Tensor | None
) -> Tensor | None:
    """The mask with all of its four dimensions; padding is (B,S)."""
    expected = (*q.shape[:3], sizes["S"])
    for name, tensor, shape in (("mask", mask, expected), ("padding", padding, (expected[0], expected[3]))):
        if tensor is None:
            continue
        pairs = zip(tensor.shape[::-1], shape[::-1], strict=False)
        if tensor.ndim > len(shape) or any(
            size != wanted and (size != 1 or name == "padding") for size, wanted in pairs
        ):
            ones = " or ones there" if name == "mask" else ""
            raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {shape}{ones}")
        if tensor.device != q.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {q.device} as the first argument")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"{operation}: padding is {padding.dtype}, expected torch.bool")
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        _check_types(operation, q, mask=mask)
    return mask.view((1,) * (4 - mask.ndim) + mask.shape)


def _check_types(operation: str, q: Tensor, **tensors: Tensor | None) -> None:
    """All of q's type, unless autocast sees to that."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{operation}: {name} is {tensor.dtype}, expected {q.dtype} as q")
