import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from window_rows import WindowRows

from hylo.distill.align import AlignTrainer, LayerAlignment, TeacherLayers, align, l2_distance
from hylo.distill.checkpoints import training_directory
from hylo.distill.metrics import StepMetrics
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model

MakeTraining = Callable[..., Training]
BuildStudent = Callable[[PreTrainedModel, list[str]], HyloForCausalLM]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(alignment: LayerAlignment, teacher: PreTrainedModel, rows: Rows, training: Training, folder: Path) -> None:
    folder.mkdir()
    with StepMetrics(folder, "align", training, Console(quiet=True)) as metrics:
        AlignTrainer(alignment, teacher, rows, training, folder / "work", metrics).train()


def test_lowers_every_new_layers_loss_and_saves_a_whole_directory(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    out = tmp_path / "aligned"
    align(base_directory, student_directory, out, rows, training(tokens=40 * 4 * 16))
    steps = read_metrics(out)
    assert [step["step"] for step in steps] == list(range(1, 41))
    first, last = steps[0]["layer_loss"], steps[-1]["layer_loss"]
    assert last[0] < 0.9 * first[0] and last[1] < 0.9 * first[1]
    assert first[2] == last[2] == 0.0  # the base's own attention
    for step in steps:
        assert step["loss"] == pytest.approx(sum(step["layer_loss"]), rel=1e-5)
        assert step["tokens"] == step["step"] * 64 and step["tokens_per_second"] > 0 and step["seconds"] > 0
    assert steps[4]["learning_rate"] == pytest.approx(5e-3)  # warmed up over four steps
    assert steps[-1]["learning_rate"] < 1e-4

    before, after = load_model(student_directory), load_model(out)
    assert after.config.max_position_embeddings == 16
    assert after.config.mla_rope_parameters["rope_type"] == "default"
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {name for name in after.state_dict() if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert (out / "chat_template.jinja").read_text() == "hi"
    assert list((out / "logs").glob("events*"))
    assert not (out / "trainer").exists()
    assert not list(tmp_path.glob(".aligned*"))


def test_the_final_norm_trains_with_the_last_layer(
    base: LlamaForCausalLM, build_student: BuildStudent, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    student = build_student(base, ["attention", "attention", "mamba2"])
    train(LayerAlignment(student, [2]), base, rows, training(), tmp_path / "run")
    assert not torch.equal(student.model.norm.weight, base.model.norm.weight)
    assert torch.equal(student.lm_head.weight, base.lm_head.weight)


def test_layers_are_independent(
    base: LlamaForCausalLM, build_student: BuildStudent, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    mixers = ["gated_deltanet", "mla", "mamba2"]
    settings = training(clip=0.05)  # small enough to bite at every step: a norm over all layers would couple them
    together = build_student(base, mixers)
    train(LayerAlignment(together, range(3)), base, rows, settings, tmp_path / "together")
    for i in range(3):
        alone = build_student(base, mixers)
        train(LayerAlignment(alone, [i]), base, rows, settings, tmp_path / f"alone-{i}")
        for name, tensor in alone.model.layers[i].state_dict().items():
            assert torch.equal(tensor, together.model.layers[i].state_dict()[name]), (i, name)
            assert name.endswith(("A_log", "D")) or not torch.equal(
                tensor, build_student(base, mixers).model.layers[i].state_dict()[name]
            )
    assert torch.equal(alone.model.norm.weight, together.model.norm.weight)


def test_losses_equal_those_of_one_backward_over_all_layers(
    base: LlamaForCausalLM, build_student: BuildStudent
) -> None:
    """The plain reading of the recipe: run everything with hooks, add up, one backward."""
    student = build_student(base, ["gated_deltanet", "mla", "mamba2"])
    ids = torch.randint(0, 64, (2, 16))
    hidden = base(ids, output_hidden_states=True).hidden_states  # the last one is after the final norm
    mixer_outputs: dict[str, Tensor] = {}
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.register_forward_hook(lambda m, a, output, i=i: mixer_outputs.update({f"t{i}": output[0]}))
    for i, layer in enumerate(student.model.layers):
        layer.mixer.register_forward_hook(lambda m, a, output, i=i: mixer_outputs.update({f"s{i}": output}))
    base(ids)
    want = torch.zeros(())
    for i, layer in enumerate(student.model.layers):
        output = layer(hidden[i].detach(), **student.model.layer_inputs(hidden[i]))
        output = student.model.norm(output) if i == 2 else output
        want = want + (output - hidden[i + 1].detach()).norm(dim=-1).mean()
        want = want + (mixer_outputs[f"s{i}"] - mixer_outputs[f"t{i}"].detach()).norm(dim=-1).mean()

    alignment = LayerAlignment(student, range(3))
    with torch.no_grad():
        states = TeacherLayers(base)({"input_ids": ids})
    losses = [alignment(i, states[i]) for i in alignment.layers]
    torch.testing.assert_close(sum(losses, torch.zeros(())), want)


def test_layers_that_are_the_bases_own_have_no_loss_and_a_finite_gradient(
    base: LlamaForCausalLM, build_student: BuildStudent
) -> None:
    student = build_student(base, ["attention"] * 3)
    alignment = LayerAlignment(student, [])
    student.requires_grad_()
    with torch.no_grad():
        states = TeacherLayers(base)({"input_ids": torch.randint(0, 64, (2, 16))})
    for i in range(3):
        loss = alignment(i, states[i])
        loss.backward()
        assert loss < 1e-5
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_the_distance_has_a_zero_gradient_at_zero() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    l2_distance(x, x.detach().clone()).backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(l2_distance, (y, torch.randn(2, 3, 4, dtype=torch.float64)))


def test_teachers_of_other_kinds_are_read_alike(build_student: BuildStudent) -> None:
    torch.manual_seed(3)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    qwen = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        states = TeacherLayers(qwen)({"input_ids": ids})
        want = qwen(ids, output_hidden_states=True).hidden_states
    assert all(
        torch.equal(s.input, h) and torch.equal(s.output, n) for s, h, n in zip(states, want, want[1:], strict=False)
    )


def test_a_hylo_model_can_be_the_teacher(base: LlamaForCausalLM, build_student: BuildStudent) -> None:
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        ours = TeacherLayers(build_student(base, ["attention"] * 3))({"input_ids": ids})
        bases = TeacherLayers(base)({"input_ids": ids})
    for a, b in zip(ours, bases, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_give_the_same_weights(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    for name in ("a", "b"):
        align(base_directory, student_directory, tmp_path / name, rows, training())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_bf16_trains_float32_weights(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    align(base_directory, student_directory, tmp_path / "a", rows, training(precision="bf16", tokens=20 * 64))
    steps = read_metrics(tmp_path / "a")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_model(tmp_path / "a").config.dtype == torch.float32


STREAM = np.random.default_rng(0).integers(0, 64, 4000).astype(np.int32)  # as in `rows`


def broken_rows(length: int, count: int) -> WindowRows:
    class Broken(WindowRows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if index == 9:
                raise RuntimeError("boom")
            return super().__getitem__(index)

    return Broken(STREAM, length, count, seed=0)


def test_an_interrupted_run_goes_on(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    settings, out = training(save_every=1), tmp_path / "out"
    align(base_directory, student_directory, tmp_path / "whole", rows, settings)
    before = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="boom"):
        align(base_directory, student_directory, out, broken_rows, settings)
    assert set(tmp_path.iterdir()) - before == {training_directory(out)}
    align(base_directory, student_directory, out, rows, settings)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_weight_that_is_not_finite_is_named_before_training(
    base_directory: Path,
    base: LlamaForCausalLM,
    build_student: BuildStudent,
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
) -> None:
    student = build_student(base, ["gated_deltanet", "mla", "attention"])
    nn.init.constant_(student.model.layers[1].mlp.up_proj.weight, float("nan"))
    student.save_pretrained(tmp_path / "broken")
    with pytest.raises(HyloError, match="model.layers.1.mlp.up_proj.weight in .*broken holds NaN"):
        align(base_directory, tmp_path / "broken", tmp_path / "out", rows, training())
    assert not (tmp_path / "out").exists()


def test_bad_inputs_are_named(
    base_directory: Path,
    student_directory: Path,
    base: LlamaForCausalLM,
    build_student: BuildStudent,
    build_base: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
) -> None:
    def fails(match: str, *, base: Path = base_directory, student: Path = student_directory, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match):
            align(base, student, tmp_path / "out", rows, training(**changes))
        assert not (tmp_path / "out").exists()

    fails("exceed the 64", length=65)
    fails("convert it first", student=base_directory)
    fails("does not exist", student=tmp_path / "nowhere")
    build_student(base, ["attention"] * 3).save_pretrained(tmp_path / "same")
    fails("nothing to align", student=tmp_path / "same")
    build_base(num_hidden_layers=4).save_pretrained(tmp_path / "deeper")
    fails("num_hidden_layers is 3, not 4", base=tmp_path / "deeper")
    build_base(vocab_size=65).save_pretrained(tmp_path / "other")
    fails("vocabulary of 65", base=tmp_path / "other")

    (tmp_path / "there").mkdir()
    with pytest.raises(HyloError, match="exists already"):
        align(base_directory, student_directory, tmp_path / "there", rows, training())


def test_each_term_of_the_loss_alone(
    base: LlamaForCausalLM, build_student: BuildStudent, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    """The mixer's term reaches the mixer and the norm before it, the hidden one the MLP too; together they add up."""
    student = build_student(base, ["gated_deltanet", "mla", "mamba2"])
    with torch.no_grad():
        states = TeacherLayers(base)({"input_ids": torch.randint(0, 64, (2, 16))})
    losses = {terms: LayerAlignment(student, range(3), terms)(1, states[1]) for terms in ("hidden", "mixer")}
    both = LayerAlignment(student, range(3))(1, states[1])
    torch.testing.assert_close(both, losses["hidden"] + losses["mixer"])
    losses["mixer"].backward()
    layer = student.model.layers[1]
    assert layer.mlp.up_proj.weight.grad is None and layer.mixer.o_proj.weight.grad is not None
    losses["hidden"].backward()
    assert layer.mlp.up_proj.weight.grad is not None

    alone = build_student(base, ["gated_deltanet", "mla", "mamba2"])
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    train(LayerAlignment(alone, range(3), "mixer"), base, rows, training(), tmp_path / "run")
    changed = {name for name, tensor in alone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("mixer." in name or "input_layernorm" in name for name in changed)
