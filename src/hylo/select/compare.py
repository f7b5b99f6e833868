"""The layout chosen beside the even spread, both put together from the same students and measured on the same rows."""

from collections.abc import Sequence
from typing import Any

from hylo.data.training import TrainingData
from hylo.evaluate.forward import Scorer
from hylo.evaluate.needle import needle_rows, recalled
from hylo.select.context import SelectionContext
from hylo.select.probe import difference, measure, probe_rows

DEPTHS = 8
OTHER_ROWS = 1  # a seed: not those that the layers were scored on, which flatter the choice


def compare(context: SelectionContext, chosen: Sequence[int], answers: int) -> dict[str, Any]:
    """{"chosen", "uniform", "difference"}: each with "kl" in nats a token, "needle" (share of `answers` that are right)
    and their standard errors "kl_se", "needle_se"; the first two with their "layers", the last one, chosen less
    uniform, paired over the rows. Also "tokens" and "seconds". Goes on from the context's records.
    """
    found = [_measured(context, layers, answers) for layers in (chosen, context.uniform)]
    named = [
        {"layers": list(layers)} | _figures(own) for layers, own in zip((chosen, context.uniform), found, strict=True)
    ]
    different = [found[0]] if list(chosen) == context.uniform else found
    return {
        "chosen": named[0],
        "uniform": named[1],
        "difference": _figures(*found),
        "tokens": sum(own["tokens"] for own in different),
        "seconds": sum(own["seconds"] for own in different),
    }


def check_rows(data: TrainingData, length: int, answers: int) -> None:
    """Raises HyloError where rows of `length` tokens have no room for facts, or the held-out text is too short."""
    probe_rows(data, length, length, 1.0, (0, 0))
    needle_rows(data.held_out, length, data.facts, answers, DEPTHS, 0)


def _measured(context: SelectionContext, layers: Sequence[int], answers: int) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        probe = context.probe(seed=OTHER_ROWS)
        stream, facts = context.data.held_out, context.data.facts
        rows = needle_rows(stream, context.length, facts, answers, DEPTHS, context.seed)
        scorer = Scorer(context.students.arrange(layers))
        kl = measure(scorer, probe, context.teacher)["kl"]
        needle = recalled(scorer, rows).mean(1).tolist()
        return {"kl": kl, "needle": needle, "tokens": probe.tokens + len(rows) * context.length}

    return context.records.timed("compare/" + "-".join(map(str, layers)), read)


def _figures(ours: dict[str, Any], theirs: dict[str, Any] | None = None) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for key in ("kl", "needle"):
        mean = difference(ours[key], None if theirs is None else theirs[key])
        figures |= {key: mean.value, f"{key}_se": mean.error}
    return figures
