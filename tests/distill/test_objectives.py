"""The objectives of stage 2 against full logits, document by document; what trains; positions; where the teacher is."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.distill.batch import NO_TARGET, model_inputs, next_tokens
from hylo.distill.extend import extend
from hylo.distill.objectives import LongDistillation, TeacherStates
from hylo.distill.settings import Training
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model

MakeTraining = Callable[..., Training]
QUIET = Console(quiet=True)
LENGTH = 16
CUTS = ([5, 11], [3, 4, 9], [16], [1, 15])  # tokens of the documents of every row, over and over
MIXERS = ["gated_deltanet", "mla", "mamba2"]


class PackedRows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.ids = torch.randint(0, 64, (count, LENGTH), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        positions = torch.cat([torch.arange(n) for n in CUTS[index % len(CUTS)]])
        return {"input_ids": self.ids[index], "position_ids": positions}


def packed_rows(length: int, count: int) -> PackedRows:
    assert length == LENGTH
    return PackedRows(count)


@pytest.fixture
def training(training: MakeTraining) -> MakeTraining:
    return lambda **changes: training(save_every=100, **changes)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    rows = [packed_rows(LENGTH, 4)[i] for i in range(4)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def student(base: LlamaForCausalLM, build_student: Any) -> HyloForCausalLM:
    return build_student(base, MIXERS)


def documents(batch: dict[str, Tensor]) -> Iterator[Tensor]:
    for row, cuts in zip(batch["input_ids"], CUTS, strict=True):
        yield from row.split(cuts)


def value_from_logits(
    name: str, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> Tensor:
    """Every document by itself, as a row of its own."""
    total = torch.zeros(())
    for ids in documents(batch):
        s, t = (torch.log_softmax(model(ids[None]).logits[0], -1) for model in (student, teacher))
        if name == "forward_kl":
            total = total + (t.exp() * (t - s)).sum()
        elif name == "reverse_kl":
            total = total + (s.exp() * (s - t)).sum()
        elif name == "jsd":
            m = torch.log(0.3 * t.exp() + 0.7 * s.exp())
            total = total + 0.3 * (t.exp() * (t - m)).sum() + 0.7 * (s.exp() * (s - m)).sum()
        else:
            total = total + F.nll_loss(s[:-1], ids[1:], reduction="sum")
    return total / batch["input_ids"].numel()


def states(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> TeacherStates:
    with torch.no_grad():
        hidden = teacher.model(**model_inputs(batch), use_cache=False).last_hidden_state
    return TeacherStates(hidden, teacher.lm_head.weight)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_packed_documents_count_as_if_each_were_alone(
    name: str, student: HyloForCausalLM, base: LlamaForCausalLM, batch: dict[str, Tensor]
) -> None:
    student, base = student.double(), base.double()
    value = LongDistillation(student, [name], beta=0.3)(batch, states(base, batch))
    expected = value_from_logits(name, student, base, batch)
    assert value.shape == (1,) and value.item() == pytest.approx(expected.item(), rel=1e-9)
    ours = torch.autograd.grad(value.sum(), list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    for (parameter, _), a, b in zip(student.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10, msg=parameter)


def test_halves_average_to_the_whole(
    student: HyloForCausalLM, base: LlamaForCausalLM, batch: dict[str, Tensor]
) -> None:
    """Whatever the number of targets: the halves have 29 and 30 next tokens."""
    names = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
    distillation = LongDistillation(student.double(), names)
    halves = [{key: values[part] for key, values in batch.items()} for part in (slice(2), slice(2, 4))]
    assert len({(next_tokens(half) != NO_TARGET).sum().item() for half in halves}) == 2
    with torch.no_grad():
        values = [distillation(part, states(base.double(), part)) for part in (batch, *halves)]
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2, rtol=1e-12, atol=0)


def test_positions_are_given_only_where_they_restart(batch: dict[str, Tensor]) -> None:
    assert model_inputs(batch).keys() == {"input_ids", "position_ids"}
    whole = {name: values[2:3] for name, values in batch.items()}  # one document
    assert model_inputs(whole).keys() == {"input_ids"}
    assert model_inputs({"input_ids": batch["input_ids"]}).keys() == {"input_ids"}
    targets = next_tokens(batch)
    assert (targets[1] == NO_TARGET).nonzero()[:, 0].tolist() == [2, 6, 15]
    assert torch.equal(targets[2, :-1], batch["input_ids"][2, 1:])


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_is_the_weighted_sum_of_its_parts(
    student: HyloForCausalLM,
    base_directory: Path,
    base: LlamaForCausalLM,
    batch: dict[str, Tensor],
    tmp_path: Path,
    training: MakeTraining,
) -> None:
    student.save_pretrained(tmp_path / "student")
    mixture = {"forward_kl": 0.9, "cross_entropy": 0.1, "jsd": 2.0}
    settings = training(objective=mixture, beta=0.3, tokens=10 * 4 * LENGTH, micro_rows=2)
    extend(tmp_path / "student", base_directory, tmp_path / "out", packed_rows, settings, LENGTH, QUIET)
    steps = steps_of(tmp_path / "out")
    for step in (steps[0], steps[-1]):
        assert step["loss"] == pytest.approx(sum(mixture[name] * step["losses"][name] for name in mixture), rel=1e-5)
    for name, value in steps[0]["losses"].items():
        expected = value_from_logits(name, student, base, batch).item()
        assert value == pytest.approx(expected, rel=1e-4), name
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_cross_entropy_needs_no_teacher(student_directory: Path, tmp_path: Path, training: MakeTraining) -> None:
    class Repeated(PackedRows):  # random tokens can only be learned by heart
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return super().__getitem__(index % 4)

    settings = training(objective="cross_entropy", tokens=10 * 4 * LENGTH)
    extend(student_directory, None, tmp_path / "out", lambda length, count: Repeated(count), settings, LENGTH, QUIET)
    losses = [step["loss"] for step in steps_of(tmp_path / "out")]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    with pytest.raises(HyloError, match="forward_kl needs a teacher; give one"):
        extend(student_directory, None, tmp_path / "other", packed_rows, training(), LENGTH, QUIET)


@pytest.mark.parametrize("trains", ["all", "all_but_head", "mixers"])
def test_only_what_is_to_train_changes(
    trains: str, student_directory: Path, base_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    settings = training(trains=trains, tokens=2 * 4 * LENGTH, gradient_checkpointing=True)
    extend(student_directory, base_directory, tmp_path / "out", packed_rows, settings, LENGTH, QUIET)
    before, model = load_model(student_directory).state_dict(), load_model(tmp_path / "out")
    after = model.state_dict()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    if trains == "mixers":
        assert same == {name for name in before if ".mixer." not in name}
    else:
        assert same == ({"lm_head.weight"} if trains == "all_but_head" else set())
    assert model.config.tie_word_embeddings == (trains != "all_but_head")


@pytest.mark.parametrize(
    ("changes", "rope", "factor"),
    [
        ({}, "yarn", 2.0),
        ({"yarn_factor": 4.0}, "yarn", 4.0),
        ({"yarn_factor": 1.0}, "default", None),
        ({"positions": "unscaled"}, "default", None),
    ],
)
def test_the_saved_configuration_states_positions_and_length(
    changes: dict[str, Any],
    rope: str,
    factor: float | None,
    student_directory: Path,
    base_directory: Path,
    tmp_path: Path,
    training: MakeTraining,
) -> None:
    settings = training(tokens=1, **changes)
    extend(student_directory, base_directory, tmp_path / "out", packed_rows, settings, LENGTH // 2, QUIET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == LENGTH
    assert (config["mla_rope_parameters"]["rope_type"], config["mla_rope_parameters"].get("factor")) == (rope, factor)


@pytest.mark.parametrize("rows_of", [packed_rows, None])
def test_a_stage_writes_its_cache_and_trains_as_with_the_live_teacher(
    rows_of: Rows | None,
    student_directory: Path,
    base_directory: Path,
    tmp_path: Path,
    rows: Rows,
    training: MakeTraining,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = (student_directory, base_directory)
    rest = (rows_of or rows, training(trains="all_but_head", teacher="cache"), 8, QUIET, tmp_path / "cache")
    extend(*arguments, tmp_path / "cached", *rest)
    live = training(trains="all_but_head", teacher="live")
    extend(*arguments, tmp_path / "live", rest[0], live, 8, QUIET)
    cached, expected = ([step["loss"] for step in steps_of(tmp_path / name)] for name in ("cached", "live"))
    assert cached == pytest.approx(expected, rel=1e-5) and len(cached) == 12
    packed = json.loads((tmp_path / "cache" / "manifest.json").read_text())["recipe"]["packed"]
    assert packed == (rows_of is packed_rows)
    monkeypatch.setattr("hylo.distill.cache_writer.load_model", None)  # what is there is not made again
    extend(*arguments, tmp_path / "again", *rest)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cached", "again"))
    assert a == b


def test_a_cache_of_rows_that_are_packed_otherwise_is_refused(
    student_directory: Path, base_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    settings = training(trains="all_but_head", teacher="cache")
    rest = (settings, 8, QUIET, tmp_path / "cache")
    extend(student_directory, base_directory, tmp_path / "a", packed_rows, *rest)

    class Unpacked(PackedRows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return super().__getitem__(index) | {"position_ids": torch.arange(LENGTH)}

    with pytest.raises(HyloError, match=r"other rows than teacher cache .*cache was made of \(from row 0 on\)"):
        extend(student_directory, base_directory, tmp_path / "b", lambda length, count: Unpacked(count), *rest)
    with pytest.raises(HyloError, match="needs a directory for the cache"):
        extend(student_directory, base_directory, tmp_path / "b", packed_rows, settings, 8, QUIET)


@pytest.mark.parametrize(
    "bad",
    [{"beta": 0.5}, {"objective": "jsd", "beta": 1.0}, {"objective": "on_policy", "beta": 1.5}],
)
def test_a_beta_that_means_nothing_is_refused(bad: dict[str, Any], training: MakeTraining) -> None:
    assert training(objective="on_policy", beta=1.0).beta == 1.0
    with pytest.raises(ValidationError, match="beta"):
        training(**bad)
