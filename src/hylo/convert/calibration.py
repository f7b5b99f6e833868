"""The base run over a few thousand tokens, one layer in memory at a time: what every layer's attention saw and did.

Conversion needs activations for its second moments (CARE), for the key norm's mean and for linear blocks. The layers
are read from disk as conversion reaches them, so that memory holds one layer and the hidden states of the sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hylo.convert.base import BaseCheckpoint
from hylo.data.retrieval import Stream
from hylo.errors import HyloError
from hylo.modeling import HyloConfig, HyloDecoderLayer
from hylo.modeling.attention import Attention
from hylo.modeling.rope import LINEAR_WIDTHS, Rotary, base_frequencies, cos_sin, linear_frequencies
from hylo.ops.latent_attention import attend


@dataclass(frozen=True)
class LayerSample:
    """One attention layer of the base over B sequences of T tokens, float32.

    inputs (B,T,D): what the mixer is given; outputs (B,T,D): what it returns; context (B,T,H,d): its heads before the
    output projection; q (B,T,H,d) and k (B,T,K,d) as they enter the softmax, which multiplies by `scale`;
    rotary: cos and sin (1,T,width) of the hybrid's linear blocks, where they rotate (positions hype).
    """

    inputs_BTD: Tensor
    outputs_BTD: Tensor
    context_BTHd: Tensor
    q_BTHd: Tensor
    k_BTKd: Tensor
    scale: float
    rotary: Rotary = field(default_factory=dict)

    def covariance(self) -> Tensor:
        """Mean of x x^T over the tokens, (D,D)."""
        x_ND = self.inputs_BTD.flatten(0, 1)
        return x_ND.T @ x_ND / len(x_ND)


def calibration_rows(stream: Stream, tokens: int, length: int) -> Tensor:
    """About `tokens` tokens as rows of `length`, evenly spread over the stream: (rows, length).

    Raises HyloError if the stream is shorter than one row.
    """
    if len(stream) < length:
        raise HyloError(f"the calibration text has {len(stream)} tokens, below one row of {length}; give more")
    rows = max(1, min(tokens, len(stream)) // length)
    starts = np.linspace(0, len(stream) - length, rows).astype(int)
    return torch.from_numpy(np.stack([stream[start : start + length] for start in starts])).long()


def samples_of(
    checkpoint: BaseCheckpoint, config: HyloConfig, ids_BT: Tensor | None, layers: Sequence[int]
) -> Iterator[LayerSample | None]:
    """The samples of some layers, in order; None for each without token ids.

    `config` is a hybrid's of this base, of which only the base's part is read.
    """
    if ids_BT is None:
        yield from [None] * len(layers)
        return
    hidden_BTD = checkpoint["model.embed_tokens.weight"][ids_BT].float()
    for index in range(max(layers, default=-1) + 1):
        with torch.no_grad():
            layer = _read_layer(checkpoint, config, index)
            sample = _attention_sample(layer, config, hidden_BTD)
        if index in layers:
            yield sample
        with torch.no_grad():
            _finish_layer(layer, hidden_BTD, sample.outputs_BTD)
        del layer, sample


def linear_rotary(config: HyloConfig, position_ids_BT: Tensor, dtype: torch.dtype) -> Rotary:
    """What the linear blocks of a hybrid are called with."""
    kinds = set(config.mixers) & LINEAR_WIDTHS.keys() if config.positions == "hype" else set()
    return {kind: cos_sin(*linear_frequencies(config, kind), position_ids_BT, dtype) for kind in sorted(kinds)}


def _finish_layer(layer: HyloDecoderLayer, hidden_BTD: Tensor, mixed_BTD: Tensor) -> None:
    hidden_BTD += mixed_BTD
    for row in hidden_BTD:  # a sequence at a time: the MLP's inner activations are wide
        row += layer.mlp(layer.post_attention_layernorm(row))


def _read_layer(checkpoint: BaseCheckpoint, config: HyloConfig, index: int) -> HyloDecoderLayer:
    theirs = {"mixers": ["attention"] * config.num_hidden_layers, "positions": "rope"}
    base_config = HyloConfig(**(config.to_dict() | theirs))
    with torch.device("meta"):
        layer = HyloDecoderLayer(base_config, index)
    weights = {
        name.replace("self_attn.", "mixer."): checkpoint[f"model.layers.{index}.{name}"].float()
        for name in checkpoint.layer_names()
    }
    layer.load_state_dict(weights, assign=True)
    return layer.eval()


def _attention_sample(layer: HyloDecoderLayer, config: HyloConfig, hidden_BTD: Tensor) -> LayerSample:
    mixer = layer.mixer
    assert isinstance(mixer, Attention)
    x = layer.input_layernorm(hidden_BTD)
    position_ids = torch.arange(x.shape[1])[None]
    q, k, v = mixer.project(x, {"attention": cos_sin(*base_frequencies(config), position_ids, x.dtype)})
    scale, rotary = config.head_dim**-0.5, linear_rotary(config, position_ids, x.dtype)
    context = attend(q, k, v, None, scale).transpose(1, 2)
    output, q, k = mixer.o_proj(context.flatten(2)), q.transpose(1, 2), k.transpose(1, 2)
    return LayerSample(x, output, context, q, k, scale, rotary)
