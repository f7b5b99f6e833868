"""NaN and infinity: training stops before the optimizer moves, and names layer and tensor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.distill.align import AlignTrainer, LayerAlignment
from hylo.distill.extend import ExtendTrainer
from hylo.distill.metrics import StepMetrics
from hylo.distill.objectives import LongDistillation
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM

MakeTraining = Callable[..., Training]
Train = Callable[[str, HyloForCausalLM], None]
MIXERS = ["gated_deltanet", "mla", "mamba2"]
PLANTED = [  # tensor, what conversion or training could leave there
    ("model.layers.0.mixer.A_log", math.nan),
    ("model.layers.0.mixer.A_log", math.inf),
    ("model.layers.0.mixer.A_log", -math.inf),
    ("model.layers.0.mixer.dt_bias", math.nan),
    ("model.layers.0.mixer.dt_bias", math.inf),
    ("model.layers.0.mixer.a_proj.weight", math.nan),
    ("model.layers.0.mixer.b_proj.weight", math.inf),
    ("model.layers.0.mixer.k_conv1d.weight", math.nan),
    ("model.layers.0.mixer.g_proj.weight", math.inf),
    ("model.layers.1.mixer.kv_a_proj_with_mqa.weight", math.nan),
    ("model.layers.1.mixer.kv_b_proj.weight", math.inf),
    ("model.layers.1.mixer.q_b_proj.weight", -math.inf),
    ("model.layers.2.mixer.A_log", math.inf),
    ("model.layers.2.mixer.dt_bias", math.nan),
    ("model.layers.2.mixer.D", math.inf),
    ("model.layers.2.mixer.in_proj.weight", math.nan),
    ("model.layers.2.mixer.conv1d.weight", math.inf),
    ("model.layers.2.mixer.conv1d.bias", math.nan),
]


@pytest.fixture
def student(base: LlamaForCausalLM, build_student: Any) -> HyloForCausalLM:
    return build_student(base, MIXERS)


@pytest.fixture(params=["align", "extend"])
def train(
    request: pytest.FixtureRequest, base: LlamaForCausalLM, tmp_path: Path, rows: Rows, training: MakeTraining
) -> Train:
    """Runs one of the stages on a student in memory; whatever goes wrong, its weights must stay as they were."""

    def run(stage: str, student: HyloForCausalLM, teacher: PreTrainedModel = base) -> None:
        settings = training(tokens=2 * 64, bad_batches=0)
        with StepMetrics(tmp_path, stage, settings, Console(quiet=True)) as metrics:
            arguments = (teacher, rows, settings, tmp_path / "work", metrics)
            if stage == "align":
                AlignTrainer(LayerAlignment(student, range(3)), *arguments).train()
            else:
                ExtendTrainer(LongDistillation(student), *arguments).train()

    run.stage = request.param  # type: ignore[attr-defined]
    return run


def refused(train: Any, student: HyloForCausalLM, **arguments: Any) -> str:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(HyloError) as error:
        train(train.stage, student, **arguments)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor.nan_to_num(1e9), before[name].nan_to_num(1e9)), name
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), PLANTED)
def test_a_weight_that_is_not_finite_is_named(train: Any, student: HyloForCausalLM, name: str, value: float) -> None:
    parameter = student.get_parameter(name)
    parameter.data.view(-1)[1] = value
    message = refused(train, student)
    assert name in message and f"holds {value}" in message and "at step 1" in message and "restore the" in message
    if train.stage == "align" and "the loss" in message:
        assert f"of layer {name.split('.')[2]} " in message


@pytest.mark.parametrize(("layer", "kind"), [(0, "Gated DeltaNet"), (2, "Mamba-2")])
def test_a_decay_that_overflows_is_named(train: Any, student: HyloForCausalLM, layer: int, kind: str) -> None:
    student.model.layers[layer].mixer.A_log.data[1] = 200.0  # exp(200) is infinite in float32
    message = refused(train, student)
    assert f"model.layers.{layer}.mixer" in message and "A_log" in message, kind


def test_a_decay_of_kda_s_that_overflows_is_named(train: Any, base: LlamaForCausalLM, build_student: Any) -> None:
    student = build_student(base, ["mla", "kda", "mla"])
    student.model.layers[1].mixer.A_log.data[1] = 200.0
    message = refused(train, student)
    assert "the decay of model.layers.1.mixer is" in message and "A_log reaches 200" in message


@pytest.mark.parametrize("part", ["a_proj", "b_proj"])
def test_a_gate_that_overflows_is_named(train: Any, student: HyloForCausalLM, part: str) -> None:
    student.model.layers[0].mixer.get_submodule(part).weight.data.fill_(3e38)
    message = refused(train, student)
    assert f"what model.layers.0.mixer.{part} (the {'decay' if part == 'a_proj' else 'write'} gate) gives is" in message


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves(train: Any, student: HyloForCausalLM) -> None:
    """The loss is finite: sqrt at zero has an infinite slope, which a factor of zero turns into NaN."""
    norm = student.model.layers[2].post_attention_layernorm

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = norm.weight

        def forward(self, x: Tensor) -> Tensor:
            return norm(x) + (self.weight * 0).sqrt().sum() * 0

    student.model.layers[2].post_attention_layernorm = Broken()
    message = refused(train, student)
    assert "the gradient norm" in message and "is nan at step 1" in message
    assert "the gradient of model.layers.2.post_attention_layernorm.weight is nan" in message


def test_a_teacher_that_is_not_finite_is_named(train: Any, student: HyloForCausalLM, base: LlamaForCausalLM) -> None:
    base.model.layers[1].self_attn.k_proj.weight.data[0, 0] = math.nan
    assert "the teacher's model.layers.1.self_attn.k_proj.weight holds nan" in refused(train, student)
    base.model.layers[1].self_attn.k_proj.weight.data.fill_(3e38)
    assert "what the teacher's model.layers.1.self_attn.k_proj gives is" in refused(train, student)


def test_a_later_step_is_told_by_its_number(train: Any, student: HyloForCausalLM, rows: Rows) -> None:
    mlp, calls = student.model.layers[1].mlp, []

    def spoil(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * math.inf if len(calls) > 1 else output

    mlp.down_proj.register_forward_hook(spoil)
    with pytest.raises(
        HyloError,
        match=r"at step 2 \(rows 4 to 7 of the stage\): what model.layers.1.mlp.down_proj gives is .*; lower learn",
    ):
        train(train.stage, student)


def test_a_gradient_whose_norm_overflows_is_named(student: HyloForCausalLM, train: Any) -> None:
    """Every entry is finite, their squares are not."""
    student.model.layers[1].mlp.gate_proj.weight.register_hook(lambda gradient: gradient.fill_(1e25))
    message = refused(train, student)
    assert "the largest gradient is that of model.layers.1.mlp.gate_proj.weight, which reaches 1e+25" in message
