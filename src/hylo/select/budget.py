"""How many layers may stay attention-like: a KV budget, and the largest layout that keeps within it.

    5%            of the base's KV cache a token
    640B, 2KiB    bytes a token
    128k@80GiB    one request of 128k tokens served from 80 GiB, weights, states and workspace included

The first two count what `hylo plan` prints, an exact key norm's extra values (Qwen3) included; the third is `hylo plan
--serve`'s answer for one CUDA device with vLLM's own defaults. Where the layers stand makes no difference to any.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hylo.checkpoint import read_base_config
from hylo.convert.config import planned_config
from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm
from hylo.plan import Plan, make_plan
from hylo.report.names import in_bytes
from hylo.serve.memory import plan_serving


@dataclass(frozen=True)
class Budget:
    """One of: `percent` of the base's KV a token; `bytes` a token; `context` tokens in `memory` bytes."""

    text: str
    percent: float | None = None
    bytes: int | None = None
    context: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Fit:
    """Whether a layout keeps within a budget, and what it costs, in words."""

    fits: bool
    cost: str


def parse_budget(text: str, bytes_of: Callable[[str, str], int], tokens_of: Callable[[str, str], int | None]) -> Budget:
    """`bytes_of` and `tokens_of` are those of hylo.commands.shared. Raises HyloError for what is no budget."""
    option = "--kv-budget"
    written = text.strip()
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", written):
        percent = float(found[1])
        if not 0 < percent <= 100:
            raise HyloError(f"{option} {text}: a share of the base's KV cache is above 0 and at most 100 %")
        return Budget(written, percent=percent)
    length, at, memory = written.partition("@")
    if at:
        return Budget(written, context=tokens_of(length, option), memory=bytes_of(memory, option))
    if re.fullmatch(r"\d+(?:\.\d+)?\s*[kmgt]?i?b", written.lower()):
        return Budget(written, bytes=bytes_of(written, option))
    raise HyloError(f"{option} {text}: write 5% (of the base's KV), 640B (bytes a token) or 128k@80GiB")


def plan_within(
    base: Path,
    budget: Budget,
    attention: str = "MLA",
    linear: str = "GDN",
    geometry: Mapping[str, int] | None = None,
    dtype: str | None = None,
    k_norm: KNorm = "exact",
) -> tuple[Plan, str]:
    """The layout with the most layers of kind `attention` (MLA or A) that meets the budget, the others `linear`, spread
    evenly; and its cost in words.

    Raises HyloError where not even one layer fits, naming its cost, and where all of them would.
    """
    layers = read_base_config(base).num_hidden_layers

    def planned(n: int) -> Plan:
        rest = f"{layers - n}{linear}" if n < layers else ""
        return make_plan(base, f"{n}{attention}{rest}", None, geometry, dtype, k_norm=k_norm)

    for n in range(layers, 0, -1):
        plan = planned(n)
        fit = fit_of(plan, budget)
        if fit.fits and n == layers:
            raise HyloError(
                f"budget {budget.text}: all {layers} layers fit as {attention} ({fit.cost}), so there is nothing to "
                "select; lower the budget"
            )
        if fit.fits:
            return plan, fit.cost
    raise HyloError(
        f"budget {budget.text}: the nearest layout, {plan.layout}, needs more: {fit.cost}; raise the budget"
    )


def fit_of(plan: Plan, budget: Budget) -> Fit:
    """Whether a plan meets the budget, and its cost."""
    if budget.context is not None:
        return _served(plan, budget.context, budget.memory or 0)
    cached = plan.kv_bytes_per_token + plan.kv_extra_bytes_per_token
    percent = 100 * cached / plan.base_kv_bytes_per_token
    cost = f"{cached:,} bytes of KV a token, {percent:.1f} % of the base's"
    return Fit(percent <= budget.percent if budget.percent is not None else cached <= (budget.bytes or 0), cost)


def _served(plan: Plan, context: int, memory: int) -> Fit:
    config = planned_config(plan, "pairs-fast")
    try:
        served = plan_serving(
            config,
            dtype=plan.dtype,
            state_dtype=plan.state_dtype,
            memory_bytes=memory,
            max_model_len=context,
            prefix_caching=True,
        )
    except HyloError as error:  # no room for the weights, or not for vLLM
        return Fit(False, str(error))
    longest = served.largest_context
    return Fit(
        bool(served.concurrent_requests),
        f"{in_bytes(served.sequence_bytes)} of cache for {context:,} tokens, where {in_bytes(served.cache_bytes or 0)} "
        + ("are free" if longest is None else f"are free: at most {longest:,} tokens"),
    )
