"""Training under positions that are not RoPE: layers are aligned at their documents' positions, contexts grow."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.distill.align import LayerAlignment, TeacherLayers, align, l2_distance
from hylo.distill.extend import extend
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model

BuildStudent = Callable[[PreTrainedModel, list[str]], HyloForCausalLM]
MakeTraining = Callable[..., Training]
MIXERS = ["gated_deltanet", "mla", "attention"]


def as_positions(directory: Path, positions: str) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"positions": positions}))
    return directory


def test_one_step_of_a_packed_row(base: LlamaForCausalLM, build_student: BuildStudent) -> None:
    """A layer's loss is that of its documents run apart, and unlike that of a row that is one document."""
    student = build_student(base, MIXERS)
    student.config.positions = "hype"
    student = HyloForCausalLM(student.config).train()
    alignment, ids = LayerAlignment(student, range(3)), torch.randint(0, 64, (1, 14))
    positions = torch.cat((torch.arange(5), torch.arange(9)))[None]
    with torch.no_grad():
        states = TeacherLayers(base)({"input_ids": ids})
    for index, state in enumerate(states):
        loss = alignment(index, state, positions)
        layer, mixed = student.model.layers[index], []
        hook = layer.mixer.register_forward_hook(lambda module, args, output, mixed=mixed: mixed.append(output))
        parts = [layer(part, **student.model.layer_inputs(part)) for part in state.input.split([5, 9], dim=1)]
        hook.remove()
        hidden = torch.cat(parts, dim=1)
        hidden = student.model.norm(hidden) if index == 2 else hidden
        apart = l2_distance(hidden, state.output) + l2_distance(torch.cat(mixed, dim=1), state.mixer_output)
        torch.testing.assert_close(loss, apart)
        assert (alignment(index, state) - loss).abs() > 1e-4
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("positions", ["none", "hype"])
def test_attention_that_lost_its_positions_is_aligned(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining, positions: str
) -> None:
    """Its weights are the base's, its outputs are not."""
    out = tmp_path / "aligned"
    align(base_directory, as_positions(student_directory, positions), out, rows, training())
    before, after = load_model(student_directory), load_model(out)
    assert not torch.equal(after.model.layers[2].mixer.q_proj.weight, before.model.layers[2].mixer.q_proj.weight)
    assert after.config.positions == positions
    assert after.config.hype_scale == (16 if positions == "hype" else None)


def test_extending_stretches_nothing(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    student, out = as_positions(student_directory, "hype"), tmp_path / "extended"
    extend(student, base_directory, out, rows, training(length=32, tokens=4 * 32 * 2), yarn_original=16)
    config = load_model(out).config
    assert (config.max_position_embeddings, config.hype_scale) == (32, 32)
    assert config.mla_rope_parameters["rope_type"] == "default"
    with pytest.raises(HyloError, match="positions hype of .* have nothing to stretch"):
        extend(student, base_directory, tmp_path / "no", rows, training(length=32, yarn_factor=2.0), yarn_original=16)
