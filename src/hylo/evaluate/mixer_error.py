"""How far each mixer's output is from that of the attention it stands in for, both fed what the teacher's layer is fed.

It is the mixer's term of stage 1's loss (hylo.distill.align), ||a_s - a_t|| averaged over tokens, divided by the same
average of ||a_t||: 0 for the attention itself, 1 for a mixer that says nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hylo.distill.align import l2_distance
from hylo.evaluate.perplexity import Estimate, mean_of
from hylo.evaluate.rows import Record
from hylo.modeling import HyloConfig, HyloForCausalLM


def has_mixers(config: PreTrainedConfig) -> bool:
    """Whether a model is a hybrid, and not one of attention alone."""
    return config.model_type == HyloConfig.model_type


def no_correspondence(student: PreTrainedConfig, teacher: PreTrainedConfig) -> str | None:
    """Why the layers of the two cannot be compared one by one, in words; None where they can."""
    shapes = [(config.num_hidden_layers, config.hidden_size) for config in (student, teacher)]
    if shapes[0] != shapes[1]:
        said = [f"{layers} layers of width {width}" for layers, width in shapes]
        return f"the teacher has {said[1]}, the model {said[0]}; give the base it was converted from as the teacher"
    return None


@torch.no_grad()
def mixer_distances(student: HyloForCausalLM, teacher: PreTrainedModel, ids: Tensor) -> list[Record]:
    """Of every row of (B, T), layer by layer, means over tokens: {"distance": ||a_s - a_t||, "size": ||a_t||}.

    The student's mixers run inside the teacher's one forward pass, so that no layer's states wait for another's.
    """
    distances, sizes = [], []
    shared: dict[str, Any] = {}

    def compare(index: int) -> Callable[..., None]:
        ours = student.model.layers[index]
        norm, mixer = ours.get_submodule("input_layernorm"), ours.get_submodule("mixer")

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not shared:
                shared.update(student.model.layer_inputs(args[0]))
            mask = shared["attention_mask"][ours.layer_type]
            heard = mixer(norm(args[0]), mask, shared["rotary"])
            said = attended.pop()
            distances.append([l2_distance(a, b).item() for a, b in zip(heard, said, strict=True)])
            sizes.append([l2_distance(torch.zeros_like(b), b).item() for b in said])

        return hook

    attended: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        attended.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for index, layer in enumerate(teacher.model.layers):
        mixer = layer.mixer if hasattr(layer, "mixer") else layer.self_attn
        hooks += [mixer.register_forward_hook(keep), layer.register_forward_hook(compare(index))]
    try:
        teacher.base_model(input_ids=ids.to(teacher.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not np.isfinite(distances).all():
        raise ValueError("the mixers' outputs are not finite")
    by_row = zip(zip(*distances, strict=True), zip(*sizes, strict=True), strict=True)
    return [{"distance": list(distance), "size": list(size)} for distance, size in by_row]


def mixer_summary(distances: Sequence[Record], mixers: Sequence[str]) -> list[dict[str, Any]]:
    """Of what `mixer_distances` found: {"layer", "mixer", "error", "error_se", "distance"} of every layer."""
    distance = np.array([record["distance"] for record in distances])
    size = np.array([record["size"] for record in distances])
    layers = []
    for i, mixer in enumerate(mixers):
        ratio = _ratio(distance[:, i], size[:, i])
        layers.append(
            {
                "layer": i,
                "mixer": mixer,
                "error": ratio.value,
                "error_se": ratio.error,
                "distance": float(distance[:, i].mean()),
            }
        )
    return layers


def _ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """A ratio of two means over rows; its standard error is that of the rows' residuals (the delta method)."""
    ratio = float(above.mean() / below.mean())
    return Estimate(ratio, mean_of((above - ratio * below) / below.mean()).error)
