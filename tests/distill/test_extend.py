import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.distill.extend import extend
from hylo.distill.objectives import LongDistillation, TeacherStates
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model

MakeTraining = Callable[..., Training]


@pytest.fixture
def training(training: MakeTraining) -> MakeTraining:
    return lambda **changes: training(**{"save_every": 100} | changes)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def kl(student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        s, t = (torch.log_softmax(model(ids).logits, -1) for model in (student, teacher))
        return torch.nn.functional.kl_div(
            s.flatten(0, 1), t.flatten(0, 1), log_target=True, reduction="batchmean"
        ).item()


def test_lowers_the_divergence_at_its_length_and_saves_yarn(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    out = tmp_path / "extended"
    extend(student_directory, base_directory, out, rows, training(length=32, tokens=30 * 128), yarn_original=16)
    steps = read_metrics(out)
    assert [step["step"] for step in steps] == list(range(1, 31)) and "layer_loss" not in steps[0]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]

    student, base, after = (load_model(directory) for directory in (student_directory, base_directory, out))
    assert after.config.max_position_embeddings == 32
    rope = after.config.mla_rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.0, 16)
    ids = torch.randint(0, 64, (4, 32))
    assert kl(after, base, ids) < 0.95 * kl(student, base, ids)
    assert not torch.equal(after.lm_head.weight, student.lm_head.weight)  # everything trains
    assert (out / "chat_template.jinja").exists() and not (out / "trainer").exists()
    assert not any(name.startswith("teacher") for name in after.state_dict())


def test_the_first_loss_is_the_divergence_under_yarn(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    extend(student_directory, base_directory, tmp_path / "out", rows, training(length=32, tokens=1), yarn_original=8)
    student, base = load_model(student_directory), load_model(base_directory)
    student.config.extend_context(32, 8)
    ids = torch.stack([rows(32, 4)[i]["input_ids"] for i in range(4)])
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(kl(student, base, ids), rel=1e-4)


def test_checkpointing_changes_nothing(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    for checkpointing in (False, True):
        settings = training(gradient_checkpointing=checkpointing)
        extend(student_directory, base_directory, tmp_path / str(checkpointing), rows, settings, yarn_original=16)
    a, b = (load_model(tmp_path / name).state_dict() for name in ("False", "True"))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6)


def test_two_runs_with_one_seed_give_the_same_weights(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    for name in ("a", "b"):
        extend(student_directory, base_directory, tmp_path / name, rows, training(), yarn_original=16)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_wider_teacher_in_bf16(
    build_base: Callable[..., LlamaForCausalLM],
    student_directory: Path,
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
) -> None:
    build_base(hidden_size=48, num_hidden_layers=4).to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    settings = training(precision="bf16", tokens=20 * 64)
    extend(student_directory, tmp_path / "wide", tmp_path / "out", rows, settings, yarn_original=16)
    steps = read_metrics(tmp_path / "out")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_model(tmp_path / "out").config.dtype == torch.float32


def test_progress_without_a_terminal_is_ten_lines(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining, capfd: Any
) -> None:
    written = io.StringIO()
    extend(
        student_directory,
        base_directory,
        tmp_path / "out",
        rows,
        training(tokens=40 * 64),
        yarn_original=16,
        console=Console(file=written, width=200),
    )
    lines = written.getvalue().splitlines()
    assert len(lines) == 10 and "tokens/s" in lines[0] and "step 40 of 40" in lines[-1]
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""  # nothing from transformers


def test_progress_on_a_terminal_is_a_bar(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=True)
    extend(student_directory, base_directory, tmp_path / "out", rows, training(), yarn_original=16, console=console)
    text = written.getvalue()
    assert "12 of 12" in text and "tokens/s" in text and "step 6 of 12" not in text  # one line, when all is done


def test_a_loss_that_is_not_finite_names_the_step(
    base_directory: Path, base: LlamaForCausalLM, build_student: Any, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    student: HyloForCausalLM = build_student(base, ["mla", "mla", "attention"])
    torch.nn.init.constant_(student.model.norm.weight, float("inf"))
    student.save_pretrained(tmp_path / "broken")
    with pytest.raises(HyloError, match=r"the loss is nan at step 1"):
        extend(tmp_path / "broken", base_directory, tmp_path / "out", rows, training(), yarn_original=16)
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_what_the_same_call_goes_on_with(
    base_directory: Path,
    student_directory: Path,
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    arguments = (student_directory, base_directory, tmp_path / "out", rows, training(save_every=6), 16)
    with monkeypatch.context() as patched:
        patched.setattr(HyloForCausalLM, "save_pretrained", full)
        with pytest.raises(HyloError, match="cannot write .*out.*: No space left on device; .* goes on .*"):
            extend(*arguments)
    assert not (tmp_path / "out").exists()
    extend(*arguments)
    assert [step["step"] for step in read_metrics(tmp_path / "out")] == list(range(1, 13))


def test_bad_inputs_are_named(
    base_directory: Path,
    student_directory: Path,
    build_base: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
) -> None:
    def fails(match: str, teacher: Path = base_directory, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match):
            extend(student_directory, teacher, tmp_path / "out", rows, training(**changes), yarn_original=16)
        assert not (tmp_path / "out").exists()

    fails("exceed the 64", length=65)
    build_base(vocab_size=65).save_pretrained(tmp_path / "other")
    fails("vocabulary of 65", teacher=tmp_path / "other")
    fails("does not exist", teacher=tmp_path / "nowhere")
    build_base(hidden_size=48).save_pretrained(tmp_path / "wide")
    for directory, word in ((tmp_path / "wide", "left"), (student_directory, "right")):
        Tokenizer(WordLevel({word: 0}, unk_token=word)).save(str(directory / "tokenizer.json"))
    fails("tokenizers of .* differ", teacher=tmp_path / "wide")


def test_the_head_of_the_student_gets_a_gradient(base: LlamaForCausalLM, build_student: Any) -> None:
    student = build_student(base, ["mla", "mamba2", "gated_deltanet"])
    hidden = base.model(torch.randint(0, 64, (2, 8))).last_hidden_state.detach()
    batch = {"input_ids": torch.randint(0, 64, (2, 8))}
    LongDistillation(student)(batch, TeacherStates(hidden, base.lm_head.weight)).backward()
    assert base.lm_head.weight.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_a_stage_caches_and_trains_the_same_whole_steps(
    student_directory: Path, base_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    settings = training(length=16, rows=4, tokens=3 * 64 + 5, teacher="cache", trains="all_but_head")
    extend(student_directory, base_directory, tmp_path / "out", rows, settings, 16, cache=tmp_path / "cache")
    assert len(read_metrics(tmp_path / "out")) == 3
