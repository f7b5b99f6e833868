"""Stage 1, Enhanced intermediate-layer distillation: every new layer learns to stand in for the base's layer.

Every layer of the student is fed the *teacher's* hidden state, so the layers are independent of each other, and with
gradients clipped per layer each of them trains exactly as it would alone. A layer's loss is

    mean over tokens of ||h_s - h_t|| + ||a_s - a_t||

with h the layer's output, a the mixer's output before the residual, and the L2 norm, unsquared, over the hidden width;
the last layer's h is compared after the final norm (arXiv 2604.24715; X-EcoMLA 2503.11132; Zebra-Llama 2505.17272).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.student import load_pair
from hylo.distill.trainer import Rows, StageTrainer, stage_output
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM


def align(base: Path, student: Path, out: Path, rows: Rows, training: Training, console: Console | None = None) -> None:
    """Aligns the layers of the model in `student` with those of `base`, its origin, and saves it as `out`.

    Everything but the embedding and the head trains; layers that are the base's own, weight for weight, are left alone.
    `rows(length, count)` gives the training rows. The saved configuration supports `training.length` tokens, without
    YaRN. Raises HyloError if the two do not belong together, if nothing is left to align, or if a loss is not finite.
    """
    model, teacher = load_pair(student, base, training)
    _check_geometry(model, teacher, student, base)
    model.config.extend_context(training.length, training.length)
    alignment = LayerAlignment(model, teacher)
    if not alignment.layers:
        raise HyloError(f"every layer of {student} is that of {base}: there is nothing to align; go on with extend")
    with stage_output(model, student, out, "align", training, console) as (work, metrics):
        AlignTrainer(alignment, teacher, rows, training, work, metrics).train()


class LayerStates(NamedTuple):
    """What the teacher computed at one layer, each (B, T, D); the last `output` is that after the final norm."""

    input: Tensor
    output: Tensor
    mixer_output: Tensor


class LayerAlignment(nn.Module):
    """The student as stage 1 sees it: `layers` are those to align, and calling it gives one layer's loss."""

    def __init__(self, student: HyloForCausalLM, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        pairs = zip(student.model.layers, teacher.model.layers, strict=True)
        # Adam would turn the rounding noise of a layer that is the base's own into steps of full size.
        self.layers = [i for i, (ours, theirs) in enumerate(pairs) if not same_weights(ours, theirs)]
        student.requires_grad_(False)
        for i in self.layers:
            for parameter in self.parameters_of(i):
                parameter.requires_grad_()

    def parameters_of(self, index: int) -> list[nn.Parameter]:
        """A layer's parameters; the final norm belongs to the last layer."""
        norm = [self.student.model.norm.weight] if index == len(self.student.model.layers) - 1 else []
        return [*self.student.model.layers[index].parameters(), *norm]

    def forward(self, index: int, teacher: LayerStates) -> Tensor:
        model = self.student.model
        layer = model.layers[index]
        mixer_outputs: list[Tensor] = []
        hook = layer.get_submodule("mixer").register_forward_hook(
            lambda module, args, output: mixer_outputs.append(output)
        )
        hidden = layer(teacher.input, **model.layer_inputs(teacher.input))
        hook.remove()
        if index == len(model.layers) - 1:
            hidden = model.norm(hidden)
        return l2_distance(hidden, teacher.output) + l2_distance(mixer_outputs[0], teacher.mixer_output)


class AlignTrainer(StageTrainer):
    """Takes the layers one after the other, each forward and backward."""

    def __init__(
        self,
        alignment: LayerAlignment,
        teacher: PreTrainedModel,
        rows: Rows,
        training: Training,
        work: Path,
        metrics: StepMetrics,
    ) -> None:
        groups = [alignment.parameters_of(i) for i in alignment.layers]
        super().__init__(alignment, teacher, rows, training, work, metrics, groups, alignment.layers)
        self.teacher_layers = TeacherLayers(teacher)

    def forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Tensor], backward: bool = True, only: int | None = None
    ) -> Tensor:
        assert self.layers is not None
        with torch.no_grad(), self.accelerator.autocast():
            states = self.teacher_layers(inputs["input_ids"])
        losses = torch.zeros(len(self.layers), device=self.args.device)
        # One backward a layer, not the Trainer's single one: a layer's activations are gone before the next one's come.
        for group, i in enumerate(self.layers):
            if only is None or group == only:
                loss = model(i, states[i])
                if backward:
                    self.accelerator.backward(loss)
                losses[group] = loss.detach()
        return losses


class TeacherLayers:
    """Runs a teacher (Llama, Qwen, hylo) and keeps what went into and came out of every layer and its mixer."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.model = teacher.model
        self.inputs: list[Tensor] = []
        self.mixer_outputs: list[Tensor] = []
        for layer in self.model.layers:
            layer.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0]))
            mixer = layer.mixer if hasattr(layer, "mixer") else layer.self_attn
            mixer.register_forward_hook(
                lambda module, args, output: self.mixer_outputs.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )

    def __call__(self, input_ids_BT: Tensor) -> list[LayerStates]:
        self.inputs, self.mixer_outputs = [], []
        last = self.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        outputs = [*self.inputs[1:], last]
        return [LayerStates(*states) for states in zip(self.inputs, outputs, self.mixer_outputs, strict=True)]


def l2_distance(ours_BTD: Tensor, teachers_BTD: Tensor) -> Tensor:
    """Mean over tokens of ||ours - teachers||, in float32 or better; where they are equal, the gradient is zero."""
    dtype = torch.promote_types(torch.promote_types(ours_BTD.dtype, teachers_BTD.dtype), torch.float32)
    return torch.linalg.vector_norm(ours_BTD.to(dtype) - teachers_BTD.to(dtype), dim=-1).mean()


def same_weights(ours: nn.Module, teachers: nn.Module) -> bool:
    """Whether a student's layer is its teacher's, weight for weight; a base calls its mixer `self_attn`."""
    a = {name.replace("mixer.", "self_attn."): tensor for name, tensor in ours.state_dict().items()}
    b = {name.replace("mixer.", "self_attn."): tensor for name, tensor in teachers.state_dict().items()}
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _check_geometry(model: PreTrainedModel, teacher: PreTrainedModel, student: Path, base: Path) -> None:
    for key in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(model.config, key), getattr(teacher.config, key)
        if ours != theirs:
            raise HyloError(
                f"{student} was not converted from {base}: its {key} is {ours}, not {theirs}; give its own base"
            )
