"""How stages, mixers and amounts are called and coloured, in figures and tables alike. Colours: Okabe and Ito's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Look:
    label: str
    colour: str
    marker: str = "o"
    line: str = "-"
    ink: str = "white"  # of text upon the colour


STAGES = {
    "teacher": Look("Teacher", "#1a1a1a", "s", "--"),
    "base": Look("Base", "#7a7a7a", "D", "--"),
    "converted": Look("Converted", "#E69F00", "^"),
    "aligned": Look("Aligned", "#56B4E9", "v"),
    "extended": Look("Extended", "#0072B2", "o"),
    "control": Look("Control", "#D55E00", "X", ":"),
    "no_alignment": Look("No alignment", "#CC79A7", "P", ":"),
}
MEANING = {
    "teacher": "the model distilled from",
    "base": "the checkpoint converted",
    "converted": "mixers initialised from the base, no training",
    "aligned": "after stage 1, every layer fitted to the teacher's",
    "extended": "after stage 2, the finished hybrid",
    "control": "the same geometry and extension, but random mixers and no alignment",
    "no_alignment": "the conversion, with alignment's tokens spent on extension",
}
MIXERS = {
    "attention": Look("Attention", "#8c8c8c"),
    "mla": Look("MLA", "#0072B2"),
    "gated_deltanet": Look("Gated DeltaNet", "#E69F00", ink="#1a1a1a"),
    "mamba2": Look("Mamba-2", "#009E73"),
    "kda": Look("KDA", "#CC79A7"),
}
LETTERS = {"attention": "A", "mla": "MLA", "gated_deltanet": "GDN", "mamba2": "M2", "kda": "KDA"}
ROLES = {
    "teacher": Look("", "#1a1a1a", "s", "--"),
    "base": Look("", "#7a7a7a", "D", "--"),
    "hybrid": Look("", "#0072B2", "o"),
}
BASELINES = (
    Look("", "#D55E00", "X", ":"),
    Look("", "#CC79A7", "P", ":"),
    Look("", "#009E73", "^", "-."),
    Look("", "#E69F00", "v", "-."),
    Look("", "#56B4E9", "h", ":"),
    Look("", "#7F3C8D", "<", "-."),
)
SPARE = ("#009E73", "#B8A800", "#7F3C8D", "#6B4C2A")


def stage_look(name: str) -> Look:
    """A stage's own look, or for an unknown stage one that its name alone decides."""
    known = STAGES.get("extended" if name == "extend" else name)
    label = name.replace("_", " ").capitalize() if name != "dpo" else "DPO"
    return known or Look(label, SPARE[sum(map(ord, name)) % len(SPARE)], "h", "-.")


def looks(report: Mapping[str, Any]) -> dict[str, Look]:
    """How each model of a report is called and drawn: by its stage, else its role; baselines each in a colour apart."""
    found: dict[str, Look] = {}
    taken: set[str] = set()
    for name, about in report["models"].items():
        usual = STAGES.get(name) or ROLES.get(about["role"])
        if usual and usual.colour not in taken:
            found[name] = replace(usual, label=usual.label or name)
            taken.add(usual.colour)
    for name in report["models"]:
        if name not in found:
            spare = next((look for look in BASELINES if look.colour not in taken), stage_look(name))
            found[name] = replace(spare, label=name)
            taken.add(spare.colour)
    return {name: found[name] for name in report["models"]}


def amount(value: Any) -> str:
    """A number with three figures that count; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "∞" if value > 0 else "n/a"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.{2 if abs(value) >= 10 else 3}f}"


def short_length(tokens: int) -> str:
    """2048 -> 2K."""
    if tokens >= 2**20 and tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def count(number: float) -> str:
    """1673797776 -> 1.67 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def in_bytes(number: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f} bytes"


def metric(stage: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A stage's metric by length, without what was not measured."""
    return {key: value for key, value in (stage["metrics"].get(name) or {}).items() if value is not None}
