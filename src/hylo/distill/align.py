"""Stage 1, Enhanced intermediate-layer distillation: every new layer learns to stand in for the base's layer.

Every layer of the student is fed the *teacher's* hidden state, so the layers are independent of each other, and with
gradients clipped per layer each of them trains exactly as it would alone. A layer's loss is

    mean over tokens of ||h_s - h_t|| + ||a_s - a_t||

with h the layer's output, a the mixer's output before the residual, and the L2 norm, unsquared, over the hidden width;
the last layer's h is compared after the final norm (arXiv 2604.24715; X-EcoMLA 2503.11132; Zebra-Llama 2505.17272).
`layer_loss` keeps one of the two terms, for who wants to know what each is worth.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hylo.checkpoint import model_hash
from hylo.convert.assemble import complete_config
from hylo.distill.align_groups import LayerStage
from hylo.distill.batch import model_inputs
from hylo.distill.metrics import StepMetrics
from hylo.distill.partial import cut_after, differing_layers, load_layers
from hylo.distill.settings import LayerLoss, Training
from hylo.distill.student import check_pair
from hylo.distill.trainer import Rows, StageTrainer, stage_identity
from hylo.errors import HyloError
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.loading import load_model, read_configuration


def align(base: Path, student: Path, out: Path, rows: Rows, training: Training, console: Console | None = None) -> None:
    """Aligns the layers of the model in `student` with those of `base`, its origin, and saves it as `out`.

    Everything but the embedding and the head trains; layers that are the base's own, weight for weight, are left alone.
    `rows(length, count)` gives the training rows. With `training.layers_at_once` the layers train that many at a time,
    each group over all rows; the result is the same, to the last bit. The saved configuration supports
    `training.length` tokens, without YaRN.
    Raises HyloError if the two do not belong together, if nothing is left to align, or if losses are not finite.
    """
    config = _checked_config(student, base, training)
    layers = differing_layers(student, base, config)
    if not layers:
        raise HyloError(f"every layer of {student} is that of {base}: there is nothing to align; go on with extend")
    config.extend_context(training.length, training.length)
    config.trained_at(training.length)

    def train(layers: Sequence[int], work: Path, metrics: StepMetrics) -> HyloForCausalLM:
        model = load_layers(student, config, layers)
        teacher = cut_after(load_model(base).requires_grad_(False), layers[-1])
        AlignTrainer(LayerAlignment(model, layers, training.layer_loss), teacher, rows, training, work, metrics).train()
        return model

    identity = stage_identity("align", training, student)
    identity |= {"teacher": model_hash(base), "rows": getattr(rows, "identity", None)}
    LayerStage(student, config, training, identity, console or Console(), train).run(layers, out)


class LayerStates(NamedTuple):
    """What the teacher computed at one layer, each (B, T, D); the last `output` is that after the final norm."""

    input: Tensor
    output: Tensor
    mixer_output: Tensor


class LayerAlignment(nn.Module):
    """The student as stage 1 sees it: `layers` are those to align, and calling it gives one layer's loss."""

    def __init__(self, student: HyloForCausalLM, layers: Sequence[int], layer_loss: LayerLoss = "hidden+mixer") -> None:
        super().__init__()
        self.student, self.layers, self.terms = student, list(layers), layer_loss.split("+")
        student.requires_grad_(False)
        for i in self.layers:
            for parameter in self.parameters_of(i):
                parameter.requires_grad_()

    def parameters_of(self, index: int) -> list[nn.Parameter]:
        """A layer's parameters; the final norm belongs to the last layer."""
        model = self.student.model
        norm = list(model.norm.parameters()) if index == len(model.layers) - 1 else []
        return [*model.layers[index].parameters(), *norm]

    def forward(self, index: int, teacher: LayerStates, position_ids_BT: Tensor | None = None) -> Tensor:
        """`position_ids_BT` as hylo.distill.batch.model_inputs has them."""
        model = self.student.model
        layer = model.layers[index]
        mixer_outputs: list[Tensor] = []
        hook = layer.get_submodule("mixer").register_forward_hook(
            lambda module, args, output: mixer_outputs.append(output)
        )
        hidden = layer(teacher.input, **model.layer_inputs(teacher.input, position_ids=position_ids_BT))
        hook.remove()
        if index == len(model.layers) - 1:
            hidden = model.norm(hidden)
        distances = {"hidden": (hidden, teacher.output), "mixer": (mixer_outputs[0], teacher.mixer_output)}
        return torch.stack([l2_distance(*distances[term]) for term in self.terms]).sum()


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
        given = model_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            states = self.teacher_layers(given)
        losses = torch.zeros(len(self.layers), device=self.args.device)
        # One backward a layer, not the Trainer's single one: a layer's activations are gone before the next one's come.
        for group, i in enumerate(self.layers):
            if only is None or group == only:
                loss = model(i, states[i], given.get("position_ids"))
                if backward:
                    self.backward(loss)
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

    def __call__(self, inputs: dict[str, Tensor]) -> list[LayerStates]:
        """`inputs` as hylo.distill.batch.model_inputs gives them."""
        self.inputs, self.mixer_outputs = [], []
        last = self.model(**inputs, use_cache=False).last_hidden_state
        outputs = [*self.inputs[1:], last]
        return [LayerStates(*states) for states in zip(self.inputs, outputs, self.mixer_outputs, strict=True)]


def l2_distance(ours_BTD: Tensor, teachers_BTD: Tensor) -> Tensor:
    """Mean over tokens of ||ours - teachers||, in float32 or better; where they are equal, the gradient is zero."""
    dtype = torch.promote_types(torch.promote_types(ours_BTD.dtype, teachers_BTD.dtype), torch.float32)
    return torch.linalg.vector_norm(ours_BTD.to(dtype) - teachers_BTD.to(dtype), dim=-1).mean()


def _checked_config(student: Path, base: Path, training: Training) -> HyloConfig:
    read_configuration(base)
    config = complete_config(student)
    check_pair(student, base, training.length)
    theirs = AutoConfig.from_pretrained(base, local_files_only=True)
    for key in ("num_hidden_layers", "hidden_size"):
        if (ours := getattr(config, key)) != getattr(theirs, key):
            raise HyloError(
                f"{student} was not converted from {base}: its {key} is {ours}, not {getattr(theirs, key)}; "
                "give its own base"
            )
    return config
