"""Two students of one base in one model: any layer from the one or the other, and no weight is copied."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hylo.convert.assemble import LINEAR_KEYS, hybrid_config
from hylo.errors import HyloError
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.loading import load_model


class Students:
    """The decoder layers of an all-attention (MLA or the base's own) and of an all-linear student of one base.

    `model` is one hybrid that `arrange` makes of them; `attention` and `linear` list their HyloDecoderLayers, norms and
    MLPs included, as alignment trains whole layers.
    """

    def __init__(self, all_attention: HyloForCausalLM, all_linear: HyloForCausalLM) -> None:
        self.model = all_attention.requires_grad_(False).eval()
        all_linear.requires_grad_(False).eval()
        self.attention, self.linear = list(all_attention.model.layers), list(all_linear.model.layers)
        self.kinds = all_attention.config.mixers, all_linear.config.mixers
        self.norms = all_attention.model.norm, all_linear.model.norm  # belong to the last layer
        for key in LINEAR_KEYS:
            setattr(self.model.config, key, getattr(all_linear.config, key))

    def arrange(self, attention_layers: Sequence[int]) -> HyloForCausalLM:
        """The hybrid whose `attention_layers` are attention-like; the same model object every time."""
        body = self.model.model
        picked = [i in attention_layers for i in range(len(self.attention))]
        for i, attends in enumerate(picked):
            body.layers[i] = (self.attention if attends else self.linear)[i]
        body.norm = self.norms[0 if picked[-1] else 1]
        growing, linear = self.kinds
        self.model.config.mixers = [growing[i] if attends else linear[i] for i, attends in enumerate(picked)]
        return self.model


def check_students(all_attention: Path, all_linear: Path) -> HyloConfig:
    """The configuration of the all-attention one. Reads no weight.

    Raises HyloError, as `assemble`, for what is no hylo directory, for two that do not come from one base in one way,
    and where a layer is of the wrong kind.
    """
    config = hybrid_config(all_attention, all_linear, [])
    return hybrid_config(all_attention, all_linear, range(config.num_hidden_layers))


def load_students(all_attention: Path, all_linear: Path, dtype: torch.dtype, device: str) -> Students:
    """Both directories in one model. Raises HyloError as `check_students`, and where embeddings or heads differ."""
    check_students(all_attention, all_linear)
    growing, linear = (load_model(directory, dtype, device) for directory in (all_attention, all_linear))
    assert isinstance(growing, HyloForCausalLM) and isinstance(linear, HyloForCausalLM)
    for ours, theirs in ((growing.model.embed_tokens, linear.model.embed_tokens), (growing.lm_head, linear.lm_head)):
        if not torch.equal(ours.weight, theirs.weight):
            raise HyloError(
                f"{all_attention} and {all_linear} differ in embedding or head, which alignment leaves as they are; "
                "align two students of one base"
            )
    return Students(growing, linear)
