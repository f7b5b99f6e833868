"""`hylo select`: a budget, the scores of the layers, and the layout they choose beside the even spread."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hylo.checkpoint import model_hash, read_base_config, read_tokenizer
from hylo.data.training import TrainingData
from hylo.files import locked
from hylo.layout import is_attention_like
from hylo.plan import Plan
from hylo.select.budget import plan_within
from hylo.select.compare import check_rows, compare
from hylo.select.context import LayerScore, Order, Ranking, SelectionContext
from hylo.select.kl import rank_kl
from hylo.select.outcome import print_selection, write_selection
from hylo.select.prepare import Preparation, check_given
from hylo.select.records import Records
from hylo.select.settings import LENGTH, Method, SelectionSettings, check_settings, identity
from hylo.select.window import rank_window

__all__ = ["LayerScore", "Method", "Ranking", "SelectionContext", "SelectionSettings", "rank_layers", "select"]


def select(base: Path, out: Path, settings: SelectionSettings, console: Console) -> dict[str, Any]:
    """Chooses the layers of `base` that stay attention-like, writes OUT/selection.{yaml,json,png,svg} and returns what
    selection.json says. A second call goes on from what OUT/records holds.

    Raises HyloError for a base, budget, data or students that do not fit, for other settings than OUT was begun with,
    and while another process works in OUT.
    """
    plan, cost = plan_within(
        base, settings.budget, settings.attention, settings.linear, settings.geometry, k_norm=settings.k_norm
    )
    check_settings(base, settings)
    check_given(base, plan, settings)
    console.print(f"budget {settings.budget.text}: {plan.layout}, {cost}", highlight=False)
    data = None if settings.data is None else TrainingData(settings.data, read_tokenizer(base), console=console)
    length = settings.length or min(LENGTH, read_base_config(base).max_position_embeddings)
    if data is not None:
        check_rows(data, length, settings.answers)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"another selection is at work in {out}; wait for it"):
        selection = {"base": str(base), "cost": cost} | _selection(base, out, plan, settings, data, length, console)
        write_selection(out, selection, settings.geometry)
    print_selection(selection, console)
    console.print(f"wrote {out / 'selection.yaml'}: extend it in a recipe", highlight=False, soft_wrap=True)
    return selection


def rank_layers(
    context: SelectionContext, method: Method, order: Order = "greedy", window: int | None = None
) -> Ranking:
    """The base's layers, the first to stay attention-like first, by one of the methods; goes on from the records."""
    layers = range(context.layers)
    if method == "kl":
        return rank_kl(context, order)
    if method == "window":
        return rank_window(context, window)
    if method == "gates":
        from hylo.select.gates import score_gates

        return Ranking.of(score_gates(context, layers, context.records))
    return Ranking([*context.uniform, *(i for i in layers if i not in context.uniform)], [], [])


def _selection(
    base: Path,
    out: Path,
    plan: Plan,
    settings: SelectionSettings,
    data: TrainingData | None,
    length: int,
    console: Console,
) -> dict[str, Any]:
    """What selection.json says but for the base and the cost."""
    found: dict[str, Any] = {
        "format": "hylo-selection-1",
        "budget": settings.budget.text,
        "layout": plan.layout,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_percent_of_base": plan.kv_percent_of_base,
        "k_norm": plan.k_norm,
        "geometry": dict(plan.geometry),
        "layers": len(plan.mixers),
        "method": settings.method,
    }
    uniform = [i for i, mixer in enumerate(plan.mixers) if is_attention_like(mixer)]
    if data is None or settings.data is None:
        return found | {"count": len(uniform), "uniform": uniform, "chosen": uniform, "scores": [], "rounds": []}
    own = identity(base, settings, data)
    records = Records(out / "records", own)
    preparation = Preparation(base, out / "students", plan, settings, data, records, console)
    students = preparation.students()
    context = SelectionContext(
        base,
        plan,
        *students,
        data=data,
        length=length,
        tokens=settings.tokens,
        facts=settings.data.facts,
        seed=settings.seed,
        precision=settings.precision,
        console=console,
        records=records,
    )
    ranking = rank_layers(context, settings.method, settings.order, settings.window)
    chosen = sorted(ranking.order[: context.count])
    return found | {
        "order": settings.order if settings.method == "kl" else None,
        "count": context.count,
        "uniform": uniform,
        "chosen": chosen,
        "ranking": ranking.order,
        "scores": [vars(score) for score in ranking.scores],
        "rounds": [[vars(score) for score in scores] for scores in ranking.rounds],
        "score_tokens": ranking.tokens,
        "score_seconds": ranking.seconds,
        "students_seconds": preparation.seconds,
        "comparison": compare(context, chosen, settings.answers),
        "students": {"all_attention": str(students[0]), "all_linear": str(students[1])},
        "student_hashes": [model_hash(student) for student in students],
        "settings": own,
        "probe": {"length": length, "tokens": settings.tokens, "facts": settings.data.facts},
    }
