"""OUT/initialisation.json: what a conversion chose, and what its low-rank layers keep of the base's attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from hylo.convert.initialisation import Initialisation, LayerRanks
from hylo.convert.linear_fit import FitResult
from hylo.plan import Plan

NAME, FORMAT = "initialisation.json", "hylo-initialisation-1"
BASE_KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def initialisation_record(
    plan: Plan,
    initialisation: Initialisation,
    seed: int,
    ranks: Sequence[LayerRanks],
    fits: Mapping[int, FitResult],
) -> dict[str, Any]:
    """JSON values: the options; the attention's shape before (`base`) and after (`geometry`); by MLA layer the ranks
    and the energy (share of squared singular values) that they keep; by fitted linear layer its squared error.
    """
    tokens = initialisation.sampled_by
    return {
        "format": FORMAT,
        "init": initialisation.init,
        "rope_key": initialisation.rope_key_for(plan.base_config.model_type),
        "linear_init": initialisation.linear,
        "linear_fraction": initialisation.linear_fraction,
        "linear_steps": initialisation.linear_steps,
        "calibration_tokens": 0 if tokens is None else tokens.numel(),
        "k_norm": plan.k_norm,
        "positions": plan.positions,
        "attention_gate": plan.attention_gate,
        "seed": seed,
        "base": {key: getattr(plan.base_config, key) for key in BASE_KEYS},
        "geometry": dict(plan.geometry),
        "layers": [layer._asdict() for layer in ranks],
        "fits": [{"layer": layer, **fit._asdict()} for layer, fit in fits.items()],
    }
