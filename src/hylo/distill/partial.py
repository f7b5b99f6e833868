"""Models in part: the layers of a student that are aligned at once, and as much of its base as they learn from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hylo.checkpoint import Weights
from hylo.modeling import HyloConfig, HyloForCausalLM


def differing_layers(student: Path, base: Path, config: HyloConfig) -> list[int]:
    """The student's layers that are not the base's own, weight for weight and with its positions."""
    ours, theirs = Weights(student), Weights(base)

    def same(a: dict[str, str], b: dict[str, str]) -> bool:
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)

    def equal(x: str, y: str) -> bool:
        return ours.shapes[x] == theirs.shapes[y] and torch.equal(ours[x].float(), theirs[y].float())

    other = _names_by_layer(theirs)
    unturned = [i for i, mixer in enumerate(config.mixers) if mixer == "attention" and config.positions != "rope"]
    return [i for i, names in _names_by_layer(ours).items() if i in unturned or not same(names, other[i])]


def load_layers(student: Path, config: HyloConfig, layers: Sequence[int]) -> HyloForCausalLM:
    """A student of which only these layers are there, in float32, and the final norm if the last layer is among them.

    What is not there is nn.Identity; names of weights are those of the whole model. `config` is the student's, or what
    is to become of it. Reads no other weights. Raises HyloError for weights that are missing or not finite.
    """
    with torch.device("meta"):
        model = HyloForCausalLM(config)
    last = config.num_hidden_layers - 1
    absent = ["lm_head", "model.embed_tokens", *(f"model.layers.{i}" for i in range(last + 1) if i not in layers)]
    for name in [*absent, *(["model.norm"] if last not in layers else [])]:
        model.set_submodule(name, nn.Identity())
    weights = Weights(student)
    # copied, as what is read may be a view of the file
    state = {name: weights[name].to(torch.float32, copy=True) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def cut_after(base: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The base up to a layer and without a head; its final norm goes too, unless the layer is the last one."""
    base.lm_head = nn.Identity()
    if layer < len(base.model.layers) - 1:
        base.model.layers = base.model.layers[: layer + 1]
        base.model.norm = nn.Identity()
    return base


def _names_by_layer(weights: Weights) -> dict[int, dict[str, str]]:
    """The tensors of every layer, in order, by their names in a base, which calls a mixer `self_attn`."""
    layers: dict[int, dict[str, str]] = {}
    for name in weights.shapes:
        if name.startswith("model.layers.") and not name.endswith(".rotary_emb.inv_freq"):
            index, own = name.removeprefix("model.layers.").split(".", 1)
            layers.setdefault(int(index), {})[own.replace("mixer.", "self_attn.")] = name
    return dict(sorted(layers.items()))
