"""Figure 6, second half: how latent attention is initialised from attention, and the energy that each layer keeps."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from hylo.report.drawing import INK, MUTED, PAPER, ink_on
from hylo.report.readings import Report

QUERIES, KEYS, ROTATED, VALUES, OUTPUTS, LATENT = "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#8c8c8c", "#0072B2"
HEIGHT = 0.62  # of a box; the drawing is 11 by 4.6, as inches
LABELLED = 16  # layers, at most, that have their energies written beside their points
ROTATED_ROWS = {
    "recipe": "the last rows",
    "pairs-stride": "pairs at equal strides",
    "pairs-fast": "the fastest pairs",
    "pairs-best": "the layer's best pairs",
}
SHARED_KEY = {"mean": "mean over the kv heads", "pca": "by pair, the first principal\ncomponent over the kv heads"}


def initialisation_figure(report: Report) -> Figure | None:
    """From the conversion's own record (converted/initialisation.json); None where no layer was initialised as MLA."""
    record = report.get("initialisation") or {}
    if not record.get("layers"):
        return None
    figure = Figure(figsize=(11.0, 7.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(4.6, 2.4))
    _flow(top, record)
    _energies(bottom, record)
    return figure


def _flow(axes: Axes, record: dict[str, Any]) -> None:
    base, geometry = record["base"], record["geometry"]
    D, d = base["hidden_size"], base["head_dim"]
    H, K = base["num_attention_heads"], base["num_key_value_heads"]
    nope, rope, v = geometry["qk_nope_head_dim"], geometry["qk_rope_head_dim"], geometry["v_head_dim"]
    q_rank, kv_rank = (_range([layer[key] for layer in record["layers"]]) for key in ("q_rank", "kv_rank"))
    axes.set_title(f"Attention into latent attention (init {record['init']})")
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 4.6)
    axes.set_axis_off()
    for x, heading in ((1.4, "base's attention"), (4.5, "what is done"), (8.65, "latent attention")):
        axes.text(x, 4.4, heading, ha="center", va="center", color=MUTED, fontsize=9.5)

    whole = record["init"] == "recipe"  # its joint SVD has the rotated rows too, which are dropped afterwards
    rows = "all rows" if whole else "unrotated rows"
    turned = "rotated" if record.get("positions", "rope") == "rope" else "shared"  # without positions nothing turns
    _box(axes, 0.1, 3.4, 2.6, f"$W_Q$   {H * d} × {D}", QUERIES)
    _box(axes, 0.1, 2.5, 2.6, f"$W_V$   {K * d} × {D}", VALUES)
    _box(axes, 0.1, 1.78, 2.6, f"$W_K$, {rows}   {K * (d if whole else nope)} × {D}", KEYS)
    _box(axes, 0.1, 0.96, 2.6, f"$W_K$, {turned}   {K} × {rope} × {D}", ROTATED)
    _box(axes, 0.1, 0.06, 2.6, f"$W_O$   {D} × {H * d}", OUTPUTS)

    weighted = ", weighted by the inputs" if record["calibration_tokens"] else ""
    for y, text, starts in (
        (3.4, f"SVD{weighted}\nrank {q_rank}", (3.4,)),
        (2.14, f"joint SVD{weighted}\nrank {kv_rank}", (2.5, 1.78)),
        (0.96, f"{ROTATED_ROWS[record['init']]};\n{SHARED_KEY[record['rope_key']]}", (0.96,)),
        (0.06, "copied", (0.06,)),
    ):
        _box(axes, 3.3, y, 2.4, text, None)
        for start in starts:
            _arrow(axes, (2.75, start), (3.25, y))
        _arrow(axes, (5.75, y), (6.25, y))

    _box(axes, 6.3, 3.4, 2.1, f"q_b_proj   {H * d} × {q_rank}", QUERIES)
    _box(axes, 8.65, 3.4, 2.3, f"q_a_proj   {q_rank} × {D}", LATENT)
    _box(axes, 6.3, 2.14, 2.1, f"kv_b_proj   {K * (nope + v)} × {kv_rank}", VALUES)
    _box(axes, 8.65, 2.14, 2.3, f"kv_a_proj, latent   {kv_rank} × {D}", LATENT)
    _box(axes, 6.3, 0.96, 4.65, f"kv_a_proj, one {turned} key for all heads   {rope} × {D}", ROTATED)
    _box(axes, 6.3, 0.06, 4.65, f"o_proj   {D} × {H * d}", OUTPUTS)
    for y, factors in (
        (
            3.4,
            r"$U_r$",
        ),
        (2.14, r"$U_r$"),
    ):
        axes.text(7.35, y + HEIGHT + 0.12, factors, ha="center", va="center", fontsize=8.5, color=MUTED)
        axes.text(9.8, y + HEIGHT + 0.12, r"$S_r V_r^T$", ha="center", va="center", fontsize=8.5, color=MUTED)
        axes.text(8.525, y + HEIGHT / 2, "·", ha="center", va="center", fontsize=16, color=INK)


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _box(axes: Axes, x: float, y: float, width: float, text: str, colour: str | None) -> None:
    """`colour` None: a step, outlined."""
    style: dict[str, Any] = {"facecolor": colour or PAPER, "edgecolor": MUTED if colour is None else colour}
    axes.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.06", **style))
    ink = INK if colour is None else ink_on(colour)
    axes.text(x + width / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=8.5, color=ink)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    half = HEIGHT / 2
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (end[0], end[1] + half), xytext=(start[0], start[1] + half), arrowprops=style)


def _energies(axes: Axes, record: dict[str, Any]) -> None:
    """A point for each layer and each of the two SVDs, joined to 100 %."""
    layers = record["layers"]
    axes.set_title("Energy kept (share of the squared singular values)")
    lowest = 100.0
    for shift, key, name, colour, marker in (
        (-0.13, "kv_energy", "keys and values", LATENT, "o"),
        (0.13, "q_energy", "queries", QUERIES, "s"),
    ):
        at, kept = [i + shift for i in range(len(layers))], [100 * layer[key] for layer in layers]
        lowest = min(lowest, *kept)
        style: dict[str, Any] = {"marker": marker, "markersize": 8, "markeredgecolor": PAPER, "linestyle": "none"}
        axes.vlines(at, kept, 100, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(at, kept, color=colour, label=name, zorder=4, clip_on=False, **style)
        for x, value in zip(at, kept, strict=True) if len(layers) <= LABELLED else ():
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
            axes.annotate(f"{value:.1f}", (x, value), xytext=(0, -8), **place)
    axes.set_ylim(lowest - 0.3 * (100 - lowest) - 0.05, 100)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    step = -(-len(layers) // 40)
    axes.set_xticks(range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_ylabel("energy kept (%)")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
