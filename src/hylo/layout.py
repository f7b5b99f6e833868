"""Which layer is what: layouts such as `4MLA12GDN`, read, placed on the layers, and named again.

A layout is one or two counts with a letter each: at most one attention-like kind (A, the base's own attention, or MLA)
and at most one linear kind (GDN, M2 or KDA). The counts add up to the base's layers. The attention-like layers stand
where the paper's released models have them, else spread evenly, or on the indices that the caller names.
"""

import re
from collections.abc import Sequence

from hylo.errors import HyloError
from hylo.modeling.configuration import CACHE_KIND

LETTERS = {"A": "attention", "MLA": "mla", "GDN": "gated_deltanet", "M2": "mamba2", "KDA": "kda"}

# Where the released models differ from the even spread: (layers, attention-like layers) -> indices.
PUBLISHED_POSITIONS = {
    (16, 4): [1, 5, 10, 14],
    (28, 6): [0, 5, 10, 16, 21, 26],
}


def parse_layout(text: str, num_layers: int, attention_layers: Sequence[int] | None = None) -> list[str]:
    """The mixer of every layer, each one of MIXERS; `attention_layers` overrides where the A or MLA layers stand.

    Raises HyloError if the text is no layout, or the layout or the indices do not fit `num_layers`.
    """
    counts = _counts(text)
    if (total := sum(counts.values())) != num_layers:
        raise HyloError(
            f"layout {text} has {total} layers but the base has {num_layers}; make the counts add up to that"
        )
    growing = [mixer for mixer in counts if is_attention_like(mixer)]
    linear = [mixer for mixer in counts if not is_attention_like(mixer)]
    for kinds in (growing, linear):
        if len(kinds) > 1:
            raise HyloError(
                f"layout {text} mixes {' and '.join(kinds)}; use at most one of A or MLA, and of GDN, M2 or KDA"
            )
    n = counts[growing[0]] if growing else 0
    if attention_layers is None:
        positions = attention_positions(n, num_layers)
    else:
        positions = _checked_positions(attention_layers, n, num_layers, text)
    mixers = [linear[0] if linear else ""] * num_layers
    for i in positions:
        mixers[i] = growing[0]
    return mixers


def attention_positions(n: int, num_layers: int) -> list[int]:
    """Indices of `n` attention-like layers: the released models' own, else the middle of each n-th of the layers."""
    if (num_layers, n) in PUBLISHED_POSITIONS:
        return list(PUBLISHED_POSITIONS[num_layers, n])
    return [((2 * i + 1) * num_layers - n) // (2 * n) for i in range(n)]  # floor((i + 1/2) L/n - 1/2)


def layout_name(mixers: Sequence[str]) -> str:
    """`4MLA12GDN` for four MLA and twelve Gated DeltaNet layers, the attention-like kind first."""
    return "".join(f"{n}{letters}" for letters, mixer in LETTERS.items() if (n := list(mixers).count(mixer)))


def is_attention_like(mixer: str) -> bool:
    """Whether the mixer's cache grows with the context."""
    return CACHE_KIND[mixer] == "full_attention"


def _counts(text: str) -> dict[str, int]:
    parts = re.findall(r"(\d+)(A|MLA|GDN|M2|KDA)", text)
    if not parts or "".join(n + letters for n, letters in parts) != text:
        raise HyloError(
            f"layout '{text}' is not understood; write counts with A, MLA, GDN, M2 or KDA, such as 4MLA12GDN"
        )
    counts: dict[str, int] = {}
    for n, letters in parts:
        if int(n) == 0 or LETTERS[letters] in counts:
            raise HyloError(f"layout '{text}' names {letters} {'zero times' if int(n) == 0 else 'twice'}; name it once")
        counts[LETTERS[letters]] = int(n)
    return counts


def _checked_positions(positions: Sequence[int], n: int, num_layers: int, text: str) -> list[int]:
    if outside := [i for i in positions if not 0 <= i < num_layers]:
        raise HyloError(
            f"attention layer {outside[0]} is outside the base's layers; indices run from 0 to {num_layers - 1}"
        )
    if len(set(positions)) != len(positions):
        raise HyloError(f"attention layers {list(positions)} name a layer twice; name each once")
    if len(positions) != n:
        raise HyloError(f"{len(positions)} attention layers are named but layout {text} has {n}; name exactly {n}")
    return sorted(positions)
