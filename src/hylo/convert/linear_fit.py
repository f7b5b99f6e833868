"""What linear blocks take from a sample of the attention they replace: decay, gate, scales, and then a fit.

After Taylor-Calibrate (arXiv 2606.16429), with one difference: its gate projection is a small multiple of the value
projection, so that the gate's sign changes with every token's value and the output is nearly noise. Here the gate is
steady: linear in the input, hence without a bias to add, but as close to a constant as the sample allows.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hylo.convert.svd import DAMPING
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention

if TYPE_CHECKING:
    from hylo.convert.calibration import LayerSample

BATCH_TOKENS = 512  # of a fitting step, in whole sequences
PROJECTION_RATE, GATE_RATE = 1e-4, 1e-3
_PROJECTIONS = ("q_proj.", "k_proj.", "v_proj.")


class FitResult(NamedTuple):
    """Mean squared error of a block's output, from its attention's over the sample: untrained, and after the fit."""

    before: float
    after: float


def look_back(layer: "LayerSample") -> Tensor:
    """(H,): how many tokens back each head looks, mean over t of sum_j A_tj (t - j), at least 0.5."""
    B, T, H, _ = layer.q_BTHd.shape
    position = torch.arange(T, device=layer.q_BTHd.device)
    distance_TT = (position[:, None] - position).float()
    total = layer.q_BTHd.new_zeros(H)
    for q_THd, k_TKd in zip(layer.q_BTHd, layer.k_BTKd, strict=True):
        for head in range(H):
            logits_TT = q_THd[:, head] @ k_TKd[:, head * k_TKd.shape[1] // H].T * layer.scale
            weights_TT = logits_TT.masked_fill(distance_TT < 0, float("-inf")).softmax(-1)
            total[head] += (weights_TT * distance_TT).sum()
    return (total / (B * T)).clamp(min=0.5)


def step_for(look_back_H: Tensor) -> Tensor:
    """The step dt for which exp(-dt) halves a state in as many tokens as a head looks back; between 1e-3 and 5."""
    return (math.log(2) / look_back_H).clamp(1e-3, 5)


def steady_direction(layer: "LayerSample") -> Tensor:
    """u (D,) for which u.x is as near to 1 as it gets over the inputs, by ridge regression, and 1 on average.

    It gives projections without bias a constant. Inputs without a mean leave only a noisy one.
    """
    covariance, mean = layer.covariance(), layer.inputs_BTD.flatten(0, 1).mean(0)
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
    u = torch.linalg.solve(covariance, mean)
    return u / (u @ mean)


def inputs_of(module: nn.Module, mixer: nn.Module, layer: "LayerSample") -> Tensor:
    """What one of the mixer's modules is given over the sample, (B,T,...)."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs_of(mixer, layer)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def outputs_of(mixer: nn.Module, layer: "LayerSample") -> Tensor:
    """(B,T,D), a sequence at a time."""
    return torch.cat([mixer(x_1TD, rotary=layer.rotary) for x_1TD in layer.inputs_BTD.split(1)])


def value_scale(context: Tensor, output: Tensor) -> Tensor:
    """The factor that brings a head's output nearest to the attention's, by least squares, in [0.1, 10]."""
    return ((context * output).sum() / output.square().sum()).clamp(0.1, 10)


def scale_heads(mixer: GatedDeltaNet | KimiDeltaAttention, layer: "LayerSample", values_of: list[list[int]]) -> None:
    """Scales the output's columns head by head (an output norm's one weight is shared by all): see `value_scale`."""
    gated = inputs_of(mixer.o_proj, mixer, layer).unflatten(-1, (mixer.num_heads, -1))
    out = mixer.o_proj.weight.unflatten(1, (mixer.num_heads, -1))
    head_dim, width = layer.context_BTHd.shape[-1], gated.shape[-1]
    for head, value_heads in enumerate(values_of):
        for i, value_head in enumerate(value_heads):
            block = slice(i * head_dim, min((i + 1) * head_dim, width))
            context = layer.context_BTHd[:, :, value_head, : block.stop - block.start]
            out[:, head, block] *= value_scale(context, gated[:, :, head, block])


def set_output_norm(mixer: nn.Module, norm_weight: Tensor, layer: "LayerSample", fraction: float | None) -> None:
    """Scales the output norm's weight: the mixer's output over the sample gets `fraction` of the attention's norm.

    None: the fraction with the least squared error, which is the cosine between the two; 0.01 at least.
    """
    output, target = outputs_of(mixer, layer), layer.outputs_BTD
    if fraction is None:
        fraction = max(0.01, torch.cosine_similarity(output.flatten(), target.flatten(), dim=0).item())
    norm_weight *= fraction * target.norm() / output.norm()


def fit(
    mixer: nn.Module, layer: "LayerSample", steps: int, split_rows: dict[str, list[int]] | None = None
) -> FitResult:
    """`steps` AdamW steps on the mean squared error to the attention's output; the output projection stays.

    Queries, keys and values learn at 1e-4, everything else at 1e-3. `split_rows` splits parameters whose rows are
    some of one and some of the other kind into [gate, projection, gate] rows.
    """
    before = _error(mixer, layer)
    if steps == 0:
        return FitResult(before, before)
    frozen = {name: p.detach() for name, p in mixer.named_parameters() if name.startswith(("o_proj.", "out_proj."))}
    parts: dict[str, list[Tensor]] = {}
    groups: dict[float, list[Tensor]] = {PROJECTION_RATE: [], GATE_RATE: []}
    for name, parameter in mixer.named_parameters():
        if name in frozen:
            continue
        split = parameter.detach().split((split_rows or {}).get(name, len(parameter)))
        parts[name] = [part.clone().requires_grad_() for part in split]
        for i, part in enumerate(parts[name]):
            groups[PROJECTION_RATE if name.startswith(_PROJECTIONS) or i == 1 else GATE_RATE].append(part)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()], weight_decay=0.0
    )
    sequences, length, _ = layer.inputs_BTD.shape
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(sequences, (max(1, BATCH_TOKENS // length),))
            weights = frozen | {name: torch.cat(pieces) for name, pieces in parts.items()}
            given = {"rotary": layer.rotary}
            output = torch.func.functional_call(mixer, weights, (layer.inputs_BTD[rows],), given)
            loss = F.mse_loss(output, layer.outputs_BTD[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for name, pieces in parts.items():
            mixer.get_parameter(name).copy_(torch.cat(pieces))
    return FitResult(before, _error(mixer, layer))


def _error(mixer: nn.Module, layer: "LayerSample") -> float:
    return F.mse_loss(outputs_of(mixer, layer), layer.outputs_BTD).item()
