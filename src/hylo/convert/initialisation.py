"""How the new mixers start: the choices, checked, and the rank that every latent attention layer would need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from rich.console import Console
from rich.table import Table
from torch import Tensor

from hylo.convert.base import BaseCheckpoint, read_base
from hylo.convert.calibration import samples_of
from hylo.convert.config import planned_config
from hylo.convert.linear_fit import FitResult
from hylo.convert.mla import (
    best_pairs,
    fold_key_norm,
    keys_and_values,
    queries,
    rows_factored,
    shared_key,
    split_rows,
)
from hylo.convert.svd import energy_kept, rank_for_energy, singular_values
from hylo.errors import HyloError
from hylo.layout import is_attention_like
from hylo.modeling import HyloConfig
from hylo.plan import Plan, make_plan

Init = Literal["recipe", "pairs-stride", "pairs-fast", "pairs-best", "random"]
LinearInit = Literal["recipe", "aligned", "calibrated"]
RopeKey = Literal["mean", "pca"]


@dataclass(frozen=True)
class Initialisation:
    """`init`: how MLA layers start, `linear_init`: how linear ones do; `random` draws every mixer afresh.

    `rope_key`: one rotated key from the kv heads' by mean or pca; None: pca, but mean for `recipe` and on Qwen3, whose
    query norm cannot follow. `calibration_BT`: token ids to run the base on, which
    a folded key norm and `calibrated` linear blocks need; MLA's ranks are then cut by activations instead of weights.
    `linear_init` None: `calibrated` where there is calibration text, else `aligned`. Linear blocks start with an output
    of `linear_fraction` of the attention's norm (None: nearly closed, or, calibrated, with the least squared error);
    `calibrated` ones are then fitted to it for `linear_steps` steps.
    """

    init: str = "pairs-best"
    linear_init: str | None = None
    rope_key: str | None = None
    calibration_BT: Tensor | None = None
    linear_fraction: float | None = None
    linear_steps: int = 300

    @property
    def linear(self) -> str:
        return self.linear_init or ("aligned" if self.calibration_BT is None else "calibrated")

    def rope_key_for(self, base_model_type: str) -> str:
        return self.rope_key or ("mean" if self.init == "recipe" or base_model_type == "qwen3" else "pca")

    @property
    def sampled_by(self) -> Tensor | None:
        """The token ids that conversion runs the base on, if it needs any."""
        return None if self.init == "random" else self.calibration_BT

    def check(self, plan: Plan) -> None:
        """Raises HyloError for a choice that does not exist or does not fit the plan. Reads no weight."""
        for what, value, known in (
            ("init", self.init, get_args(Init)),
            ("linear init", self.linear, get_args(LinearInit)),
            ("rope key", self.rope_key_for(plan.base_config.model_type), get_args(RopeKey)),
        ):
            if value not in known:
                raise HyloError(f"{what} {value} is not known; choose one of {', '.join(known)}")
        if self.linear_fraction is not None and self.linear_fraction <= 0:
            raise HyloError(f"linear fraction {self.linear_fraction} must be above 0")
        if self.init == "random":
            return
        uncalibrated = "give calibration text (--calibrate TEXT)"
        if self.linear == "calibrated" and self.calibration_BT is None:
            raise HyloError(f"linear init calibrated needs activations; {uncalibrated} or choose aligned")
        if "mla" not in plan.mixers:
            return
        if plan.base_config.model_type == "qwen3":
            if self.rope_key == "pca":
                raise HyloError(
                    "rope key pca scales queries head by head, which Qwen3's shared query norm cannot; choose mean"
                )
            if plan.k_norm == "folded" and self.calibration_BT is None:
                raise HyloError(f"a folded key norm needs the mean of 1/rms; {uncalibrated} or choose exact")
        elif plan.k_norm == "folded":
            raise HyloError(f"k norm folded is for Qwen3; {plan.base_config.model_type} has no key norm to fold")
        if self.init != "pairs-best":
            split_rows(plan.base_config.head_dim, plan.geometry["qk_rope_head_dim"], self.init)


class LayerRanks(NamedTuple):
    """One MLA layer's ranks, and the share of squared singular values that they keep."""

    layer: int
    kv_rank: int
    kv_energy: float
    q_rank: int
    q_energy: float


def with_energy(
    plan: Plan, initialisation: Initialisation, energy: float, progress: Callable[[int, int], None] | None = None
) -> tuple[Plan, list[LayerRanks]]:
    """The plan with every MLA layer's kv rank the least that keeps `energy`, a share of squared singular values.

    And what these ranks keep, as `measure_ranks` finds it.
    Raises HyloError if `energy` is no share, or the plan has no MLA layer.
    """
    if not 0 < energy <= 1:
        raise HyloError(f"rank energy={energy:g} is no share; write one above 0 and at most 1, such as energy=0.95")
    if "mla" not in plan.mixers:
        raise HyloError(f"rank energy={energy:g} is for MLA layers, and layout {plan.layout} has none; leave it out")
    config = planned_config(plan, initialisation.init)
    measured = measure_ranks(read_base(plan.base), config, initialisation, energy, progress)
    ranks = [plan.geometry["kv_lora_rank"]] * len(plan.mixers)
    for measurement in measured:
        ranks[measurement.layer] = measurement.kv_rank
    attention_like = [i for i, mixer in enumerate(plan.mixers) if is_attention_like(mixer)]
    changed = make_plan(
        plan.base,
        plan.layout,
        attention_like,
        plan.geometry,
        plan.dtype,
        plan.state_dtype,
        k_norm=plan.k_norm,
        kv_lora_ranks=ranks,
        positions=plan.positions,
        attention_gate=plan.attention_gate,
    )
    return changed, measured


def measure_ranks(
    checkpoint: BaseCheckpoint,
    config: HyloConfig,
    initialisation: Initialisation,
    energy: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerRanks]:
    """What the ranks of `config` keep of every MLA layer; with `energy`, the least kv rank that keeps that share."""
    layers = [i for i, mixer in enumerate(config.mixers) if mixer == "mla"]
    samples = samples_of(checkpoint, config, initialisation.calibration_BT, layers)
    measured = []
    for index in layers:
        base, sample = checkpoint.attention(index), next(samples)
        covariance = None if sample is None else sample.covariance()
        if sample is not None and base.k_norm is not None and config.mla_k_norm == "folded":
            base = fold_key_norm(base, sample, config.rms_norm_eps)
        init, rope = initialisation.init, config.qk_rope_head_dim
        pairs = best_pairs(base, rope, sample) if init == "pairs-best" else None
        nope, rotated = split_rows(config.head_dim, rope, init, pairs)
        *_, factor_HP = shared_key(base, rotated, initialisation.rope_key_for(config.base_model_type), sample)
        kv = singular_values(keys_and_values(base, rows_factored(config.head_dim, nope, init)), covariance)
        q = singular_values(queries(base, nope, rotated, factor_HP), covariance)
        limit = config.num_key_value_heads * (config.qk_nope_head_dim + config.v_head_dim)
        rank = config.kv_rank(index) if energy is None else min(rank_for_energy(kv, energy), limit)
        kept = energy_kept(kv, rank), energy_kept(q, config.q_lora_rank)
        measured.append(LayerRanks(index, rank, kept[0], config.q_lora_rank, kept[1]))
        if progress is not None:
            progress(len(measured), len(layers))
    return measured


def print_fits(fits: Mapping[int, FitResult], console: Console) -> None:
    for index, fit in fits.items():
        console.print(f"layer {index}: squared error to its attention {fit.before:.3g}, fitted {fit.after:.3g}")


def print_ranks(ranks: list[LayerRanks], console: Console) -> None:
    table = Table(title="energy kept (share of squared singular values)", title_justify="left")
    for heading in ("layer", "kv rank", "kv energy", "q rank", "q energy"):
        table.add_column(heading, justify="right")
    for r in ranks:
        table.add_row(str(r.layer), str(r.kv_rank), f"{r.kv_energy:.4f}", str(r.q_rank), f"{r.q_energy:.4f}")
    console.print(table)
