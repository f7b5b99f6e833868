"""Attention into linear blocks: the base's q, k, v and output projections, copied where the student has room for them.

- `recipe`: as published (HyLo, arXiv 2604.24715; Mamba-in-Llama, arXiv 2408.15237): overlapping top-left submatrices,
  kv heads repeated for Gated DeltaNet; convolutions and everything else keep their random values.
- `aligned`: whole heads. A student head takes queries and keys of the same base heads, none of them split across
  student heads; convolutions start as the identity; the output is nearly closed, by the weights alone.
- `calibrated`: the same, with decay, gate and scales from a sample of the attention's activations (linear_fit.py), and
  then fitted to it.

Linear blocks have no place for Qwen3's per-head norms, so the norms' weights are multiplied into the rows they scale.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo.convert.base import BaseAttention
from hylo.convert.linear_fit import (
    FitResult,
    fit,
    inputs_of,
    look_back,
    scale_heads,
    set_output_norm,
    steady_direction,
    step_for,
    value_scale,
)
from hylo.convert.rows import (
    copy_heads,
    copy_overlap,
    copy_rows,
    identity,
    projection_rows,
    value_rms,
    with_bias,
)
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.mamba2 import Mamba2
from hylo.modeling.model import inverse_softplus

if TYPE_CHECKING:
    from hylo.convert.calibration import LayerSample

# silu follows both blocks' values. At this rms it is nearly linear, and their output norm takes any scale away again.
VALUE_RMS = 0.2
CLOSED = 0.1  # of the attention's output; Taylor-Calibrate closes to 0.01, which gains less and learns more slowly
GATE = 2.0  # a gate's projection where it is to stay open and even: silu(2) = 1.76
# Attention sums its values. The delta rule overwrites instead, the more so the larger beta is (and 0 never writes).
BETA = 0.2


@torch.no_grad()
def fill_gated_deltanet(
    mixer: GatedDeltaNet,
    base: BaseAttention,
    linear_init: str,
    layer: "LayerSample | None",
    norm_D: Tensor,
    fraction: float | None = CLOSED,
    steps: int = 0,
) -> FitResult | None:
    """Overwrites what `linear_init` copies; the rest of the freshly initialised `mixer` stays.

    norm_D: weight of the norm that precedes the attention. `calibrated` needs `layer`, fits for `steps` steps and says
    how far it came; untrained, its output over the sample has `fraction` of the norm of the attention's (None: the one
    with the least squared error). `aligned` estimates that from the weights; None is CLOSED there.
    """
    heads = len(base.q)
    q, k, v = (with_bias(*rows).repeat_interleave(heads // len(rows[0]), dim=0) for rows in projection_rows(base))
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    if linear_init == "recipe":
        for projection, source in zip(projections, (q, k, v), strict=True):
            copy_rows(projection, source.flatten(0, 1))
        copy_overlap(mixer.o_proj.weight, base.o.flatten(1))
        return None

    scale_H = VALUE_RMS / value_rms(v, norm_D)
    keys_of, values_of = copy_heads(mixer, q, k, v * scale_H[:, None, None], base.o)
    alpha = 2 * (CLOSED if fraction is None else fraction)
    gate = mixer.g_proj.weight.unflatten(0, (mixer.num_heads, -1))
    for head, value_heads in enumerate(values_of):
        # The normalised output, of rms 1, times silu(g), about g/2: `fraction` of the value's rms.
        copy_overlap(gate[head], alpha * v[value_heads, :, :-1].flatten(0, 1))
    if linear_init == "aligned":
        return None

    assert layer is not None
    u = steady_direction(layer)
    mean_H = look_back(layer)
    mean = torch.stack([mean_H[taken].mean() if taken else mean_H.mean() for taken in keys_of])
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(step_for(mean)))
    mixer.a_proj.weight.zero_()  # the bias alone decides; the rows still get gradients
    mixer.b_proj.weight.copy_(torch.tensor(BETA).logit() * u.expand_as(mixer.b_proj.weight))
    mixer.g_proj.weight.copy_(GATE * u.expand_as(mixer.g_proj.weight))
    scale_heads(mixer, layer, values_of)
    set_output_norm(mixer, mixer.o_norm.weight, layer, fraction)
    return fit(mixer, layer, steps)


@torch.no_grad()
def fill_mamba2(
    mixer: Mamba2,
    base: BaseAttention,
    linear_init: str,
    layer: "LayerSample | None",
    norm_D: Tensor,
    fraction: float | None = CLOSED,
    steps: int = 0,
) -> FitResult | None:
    """x <- v, B <- k, C <- q, out_proj <- o; arguments and result as of fill_gated_deltanet.

    The norm behind the gate takes away every scale of z, so the output is closed by the norm's weight. It takes away dt
    and the values' scale too: a division of the value rows by dt would only drive silu out of its linear range.
    """
    q, k, v = (with_bias(*rows) for rows in projection_rows(base))
    heads, head_dim = q.shape[:2]
    z_rows, x_rows, B_rows, *_ = mixer.widths
    blocks = ((v, mixer.head_dim), (k, mixer.d_state), (q, mixer.d_state))
    starts = (z_rows, z_rows + x_rows, z_rows + x_rows + B_rows)
    rms_K = value_rms(v, norm_D)
    if linear_init == "recipe":
        for (source, _), start, rows in zip(blocks, starts, mixer.widths[1:4], strict=True):
            copy_rows(mixer.in_proj, source.flatten(0, 1)[:rows], start)
        copy_overlap(mixer.out_proj.weight, base.o.flatten(1))
        return None

    identity(mixer.conv1d)
    for (source, width), start, rows in zip(blocks, starts, mixer.widths[1:4], strict=True):
        scale = VALUE_RMS / rms_K[:, None, None] if source is v else 1.0
        for i, head in enumerate((source * scale)[: rows // width, :width]):
            copy_rows(mixer.in_proj, head, start + i * width)
    copy_overlap(mixer.out_proj.weight.unflatten(1, (-1, mixer.head_dim)), base.o)
    z = mixer.in_proj.weight[:z_rows].unflatten(0, (mixer.num_heads, -1))
    norm_weight = mixer.norm.weight.unflatten(0, (mixer.num_heads, -1))
    group_of = torch.arange(heads) // (heads // len(v))  # the kv head of every base head
    # The gate follows the value, as in Gated DeltaNet: a random one only adds noise.
    copy_overlap(z, v[group_of, :, :-1])
    rms = rms_K.new_full((mixer.num_heads,), rms_K.mean().item())
    copy_overlap(rms, rms_K[group_of])
    if linear_init == "aligned":
        norm_weight *= (CLOSED if fraction is None else fraction) * rms[:, None]
        return None

    assert layer is not None
    z.copy_((GATE * steady_direction(layer)).expand_as(z))
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias[:z_rows] = 0
    mixer.in_proj.weight[-mixer.num_heads :] = 0  # dt: the bias alone decides
    mean_H = look_back(layer)
    mean = mean_H.new_full((mixer.num_heads,), mean_H.mean().item())
    copy_overlap(mean, mean_H)
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(step_for(mean)))
    mixer.D.zero_()  # attention has no such shortcut
    gated = inputs_of(mixer.out_proj, mixer, layer).unflatten(-1, (mixer.num_heads, -1))
    width = min(head_dim, mixer.head_dim)
    for head in range(min(heads, mixer.num_heads)):
        context = layer.context_BTHd[:, :, head, :width]
        norm_weight[head] *= value_scale(context, gated[:, :, head, :width])
    set_output_norm(mixer, mixer.norm.weight, layer, fraction)
    z_xBC_dt = [z_rows, sum(mixer.widths[1:4]), mixer.num_heads]
    return fit(mixer, layer, steps, {"in_proj.weight": z_xBC_dt, "in_proj.bias": z_xBC_dt})
