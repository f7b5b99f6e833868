"""Which tensor went wrong: when a loss or a gradient is NaN or infinite, its step is run once more, under watch.

Several processes, each with its own rows and its own part of the weights, look together and find the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention
from hylo.modeling.mamba2 import Mamba2
from hylo.parallel import first

ROLES = {  # of the tensors of linear blocks, by the part of the name that tells
    "A_log": "the decay",
    "dt_bias": "the decay",
    "a_proj": "the decay gate",
    "f_a_proj": "the decay gate",
    "f_b_proj": "the decay gate",
    "b_proj": "the write gate",
    "g_proj": "the output gate",
    "g_a_proj": "the output gate",
    "g_b_proj": "the output gate",
    "in_proj": "the gates, keys and values",
}


def find_culprit(
    student: nn.Module,
    teacher: nn.Module | None,
    replay: Callable[[bool], None],
    among: Iterable[nn.Parameter] | None = None,
) -> str:
    """Says which tensor is the first not to be finite: a weight, what a module gives, a decay, or a gradient.

    `replay(backward)` runs the step again, without or with its backward pass. Weights are looked for in `among`, or in
    the whole student. Gradients are spoiled, weights are not touched.
    """
    if found := bad_weight(student, among):
        return found
    if teacher is not None and (found := bad_weight(teacher)):
        return f"the teacher's {found}"
    with torch.no_grad(), watch_outputs(student, "") as ours, watch_outputs(teacher, "the teacher's ") as theirs:
        replay(False)
    if found := first(next(iter([*theirs, *ours]), None)):  # the teacher runs first, and alignment feeds on it
        return found
    student.zero_grad(set_to_none=True)
    with watch_gradients(student) as found_gradients:
        replay(True)
    if found := first(next(iter(found_gradients), None)):
        return found
    gradients = {name: own_part(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    reached = {name: grad.abs().max().item() for name, grad in gradients.items() if grad.numel()}
    name = max(reached, key=lambda name: reached[name])
    largest = f"the largest gradient is that of {described(name)}, which reaches {reached[name]:.3g}"
    return f"a sum overflows; {first(largest)}"


def bad_weight(model: nn.Module, among: Iterable[nn.Parameter] | None = None) -> str | None:
    """The first weight that holds NaN or infinity, in words."""
    chosen = None if among is None else {id(parameter) for parameter in among}
    for name, parameter in model.named_parameters():
        if (chosen is None or id(parameter) in chosen) and not is_finite(parameter):
            return first(f"{described(name)} holds {what_is_wrong(parameter)}")
    return first(None)


@contextmanager
def watch_outputs(model: nn.Module | None, whose: str) -> Iterator[list[str]]:
    """While it lasts, modules whose output is not finite are listed, in the order in which they ran."""
    found: list[str] = []
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and not is_finite(tensor):
                    found.append(f"what {whose}{described(name)} gives is {what_is_wrong(tensor)}")

        return hook

    def note_decay(mixer: GatedDeltaNet | Mamba2 | KimiDeltaAttention, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if not is_finite(output):
                return  # `note` has that
            steps = len(mixer.dt_bias)
            step = F.softplus(output[..., -steps:].float() + mixer.dt_bias)  # Mamba-2's dt is in_proj's end
            A = mixer.A_log.float().exp().repeat_interleave(steps // mixer.num_heads)  # KDA: of a head's channels
            if not is_finite(decay := -A * step):
                reached = f"A_log reaches {mixer.A_log.max().item():.4g}, its step {step.max().item():.4g}"
                found.append(f"the decay of {whose}{name} is {what_is_wrong(decay)} ({reached})")

        return hook

    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, GatedDeltaNet | Mamba2 | KimiDeltaAttention):
            gates = {GatedDeltaNet: "a_proj", Mamba2: "in_proj", KimiDeltaAttention: "f_b_proj"}
            gate = module.get_submodule(gates[type(module)])
            handles.append(gate.register_forward_hook(note_decay(module, name)))
        handles.append(module.register_forward_hook(note(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_gradients(model: nn.Module) -> Iterator[list[str]]:
    """While it lasts, weights whose gradient is not finite are listed, the one nearest to the loss first.

    FSDP puts gradients where they belong by itself and calls no hooks: those of its weights come last.
    """
    found: list[str] = []

    def note(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and not is_finite(parameter.grad):
                found.append(f"the gradient of {described(name)} is {what_is_wrong(parameter.grad)}")

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(note(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in reversed(list(model.named_parameters())):
        if isinstance(parameter, DTensor):
            note(name)(parameter)


def described(name: str) -> str:
    """A tensor's or a module's name with what it does, where that is a gate or a decay."""
    role = next((ROLES[part] for part in name.split(".") if part in ROLES), None)
    return f"{name} ({role})" if role else name


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    return bool(own_part(tensor).isfinite().all())


def what_is_wrong(tensor: Tensor) -> str:
    """nan, inf or -inf: the first of these that a tensor holds."""
    tensor = own_part(tensor)
    if tensor.isnan().any():
        return "nan"
    return "inf" if tensor.isposinf().any() else "-inf"
