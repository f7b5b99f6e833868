"""Gates between two students' layers: the mixture at its ends, what learns, and that repeats are not learned twice."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from hylo.checkpoint import read_tokenizer
from hylo.convert import convert
from hylo.data.settings import Data
from hylo.data.training import TrainingData
from hylo.errors import HyloError
from hylo.modeling.loading import load_model
from hylo.plan import make_plan
from hylo.select import gates
from hylo.select.context import SelectionContext
from hylo.select.gates import GatedMixture, score_gates
from hylo.select.records import Records

GEOMETRY = {"q_lora_rank": 16, "qk_rope_head_dim": 4, "kv_lora_rank": 8}


@pytest.fixture(scope="module")
def build(
    tiny_base: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Records], SelectionContext]:
    folder = tmp_path_factory.mktemp("students")
    for layout in ("3MLA", "3GDN"):
        convert(tiny_base, folder / layout, make_plan(tiny_base, layout, None, GEOMETRY, "float32"))
    data = TrainingData(Data(text=[str(text_file)]), read_tokenizer(tiny_base))  # type: ignore[call-arg]

    def context(records: Records) -> SelectionContext:
        plan = make_plan(tiny_base, "1MLA2GDN", None, GEOMETRY, "float32")
        students = folder / "3MLA", folder / "3GDN"
        console = Console(quiet=True)
        return SelectionContext(
            tiny_base, plan, *students, data, 192, 192 * 4, 0.5, 0, "float32", console, records
        )  # fmt: skip

    return context


def test_at_their_ends_gates_make_the_two_students(build: Any) -> None:
    context = build(Records(None))
    mixture, ids = GatedMixture(context), torch.arange(64)[None] % 61
    for kept in ([], [0, 1, 2], [1], [0, 2]):
        with torch.no_grad():
            mixed = mixture.hidden(ids, torch.tensor([float(i in kept) for i in range(3)]))
            own = context.students.arrange(kept).model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(mixed, own)


def test_a_half_open_gate_mixes_layer_by_layer(build: Any) -> None:
    context = build(Records(None))
    attention, linear = load_model(context.all_attention).double(), load_model(context.all_linear).double()
    context.students.model.double()
    for layer in (*context.students.attention, *context.students.linear, *context.students.norms):
        layer.double()
    ids = torch.arange(64)[None] % 61
    with torch.no_grad():
        mixed = GatedMixture(context).hidden(ids, torch.tensor([0.5, 1.0, 0.25]))
        hidden = attention.model.embed_tokens(ids)
        for i, gate in enumerate((0.5, 1.0, 0.25)):
            ours = attention.model.layers[i](hidden, **attention.model.layer_inputs(hidden))
            theirs = linear.model.layers[i](hidden, **linear.model.layer_inputs(hidden))
            if i == 2:
                ours, theirs = attention.model.norm(ours), linear.model.norm(theirs)
            hidden = gate * ours + (1 - gate) * theirs
    torch.testing.assert_close(mixed, hidden)


def test_only_the_gates_learn_and_repeats_are_not_learned_twice(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "STEPS", 3)
    context = build(Records(tmp_path / "records"))
    before = {name: weight.clone() for name, weight in context.students.model.state_dict().items()}
    scores = score_gates(context, range(3), context.records)
    assert [score.layer for score in scores] == [0, 1, 2]
    assert all(0 < score.score < 1 and score.error is not None and score.error > 0 for score in scores)
    assert all(score.tokens > 0 and score.seconds > 0 for score in scores)
    assert len({score.score for score in scores}) == 3  # they moved, and apart
    after = context.students.arrange([0, 1, 2]).state_dict()
    assert all(weight.grad is None for weight in context.students.model.parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())

    def never(*arguments: Any) -> Any:
        raise AssertionError("learned again")

    monkeypatch.setattr(gates, "learn", never)
    again = score_gates(context, range(3), Records(tmp_path / "records"))
    assert again == scores
    assert score_gates(context, [2], context.records) == scores[2:]


def test_a_gate_closes_where_attention_is_worth_nothing_and_stays_open_where_it_is() -> None:
    """Made up: one layer whose linear form is the base's own, and one whose linear form forgets everything."""
    torch.manual_seed(0)
    embedding = torch.randn(11, 8)
    double, forget = lambda x, **_: 2 * x, lambda x, **_: 0 * x
    body = SimpleNamespace(embed_tokens=lambda ids: embedding[ids], layer_inputs=lambda hidden: {})
    model = SimpleNamespace(model=body, lm_head=SimpleNamespace(weight=torch.randn(11, 8)))
    students = SimpleNamespace(
        model=model,
        arrange=lambda kept: model,
        attention=[double, double],
        linear=[double, forget],
        norms=(lambda x: x, lambda x: x),
    )
    teacher = SimpleNamespace(remembered=lambda ids: 4 * embedding[ids], head=model.lm_head.weight)
    ids = torch.randint(0, 11, (4, 16))
    context: Any = SimpleNamespace(
        students=students,
        teacher=teacher,
        layers=2,
        device="cpu",
        length=16,
        probe=lambda facts, seed: SimpleNamespace(ids_RT=ids),
    )
    found = gates.learn(context, 0)
    assert found["gates"][0] < 0.05 and found["gates"][1] > 0.25 and found["penalty"] > 0

    model.lm_head.weight = torch.full((11, 8), torch.nan)
    with pytest.raises(HyloError, match="not finite"):
        gates.learn(context, 0)
