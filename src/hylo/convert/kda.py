"""Attention into Kimi Delta Attention: whole heads, as for Gated DeltaNet (linear.py), one student head per base head.

Two things differ. The output's gate is a sigmoid without a bias: at weights of zero it is open by half for every token,
and learns fastest there, so that the output is closed by its norm's weight instead. And the decay has a channel for
every channel of a key: to begin with all of a head's are alike.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo.convert.base import BaseAttention
from hylo.convert.linear import BETA, CLOSED, VALUE_RMS
from hylo.convert.linear_fit import (
    FitResult,
    fit,
    look_back,
    scale_heads,
    set_output_norm,
    steady_direction,
    step_for,
)
from hylo.convert.rows import copy_heads, copy_overlap, copy_rows, projection_rows, value_rms, with_bias
from hylo.modeling.kda import KimiDeltaAttention
from hylo.modeling.model import inverse_softplus

if TYPE_CHECKING:
    from hylo.convert.calibration import LayerSample


@torch.no_grad()
def fill_kda(
    mixer: KimiDeltaAttention,
    base: BaseAttention,
    linear_init: str,
    layer: "LayerSample | None",
    norm_D: Tensor,
    fraction: float | None = CLOSED,
    steps: int = 0,
) -> FitResult | None:
    """Arguments and result as of fill_gated_deltanet."""
    heads = len(base.q)
    q, k, v = (with_bias(*rows).repeat_interleave(heads // len(rows[0]), dim=0) for rows in projection_rows(base))
    if linear_init == "recipe":
        for projection, source in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, v)):
            copy_rows(projection, source.flatten(0, 1))
        copy_overlap(mixer.o_proj.weight, base.o.flatten(1))
        return None

    rms_H = value_rms(v, norm_D)
    out = base.o * rms_H[:, None] if linear_init == "aligned" else base.o
    keys_of, values_of = copy_heads(mixer, q, k, v * (VALUE_RMS / rms_H)[:, None, None], out)
    mixer.g_b_proj.weight.zero_()  # sigmoid(0) for every token; the rows still get gradients, as those of f_b_proj
    if linear_init == "aligned":
        # The normalised output, of rms 1, times 1/2 and the value's rms, which the output's columns have taken up.
        mixer.o_norm.weight.fill_(2 * (CLOSED if fraction is None else fraction))
        return None

    assert layer is not None
    mean_H = look_back(layer)
    mean = torch.stack([mean_H[taken].mean() if taken else mean_H.mean() for taken in keys_of])
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(step_for(mean)).repeat_interleave(mixer.head_dim))
    mixer.f_b_proj.weight.zero_()  # the bias alone decides
    u = steady_direction(layer)
    mixer.b_proj.weight.copy_(torch.tensor(BETA).logit() * u.expand_as(mixer.b_proj.weight))
    scale_heads(mixer, layer, values_of)
    set_output_norm(mixer, mixer.o_norm.weight, layer, fraction)
    return fit(mixer, layer, steps)
