"""Arguments that do not fit are named: which, what it was, what it should have been."""

import re

import pytest
import torch
from torch import Tensor

from hylo.ops import gated_delta_rule, ssd

GATED = {"q": (2, 5, 2, 8), "k": (2, 5, 2, 8), "v": (2, 5, 4, 6), "g": (2, 5, 4), "beta": (2, 5, 4)}
SSD = {"x": (2, 5, 2, 8), "dt": (2, 5, 4), "A_log": (4,), "B": (2, 5, 2, 6), "C": (2, 5, 4, 6)}


def tensors(shapes: dict[str, tuple[int, ...]], **changes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in (shapes | changes).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5, 2, 7)}, "gated_delta_rule: k has shape (2, 5, 2, 7), expected (B=2, T=5, Hk=2, K=8)"),
        ({"beta": (2, 4, 4)}, "gated_delta_rule: beta has shape (2, 4, 4), expected (B=2, T=5, Hv=4)"),
        ({"g": (2, 5)}, "gated_delta_rule: g has shape (2, 5), expected (B=2, T=5, Hv=4)"),
        ({"v": (2, 5, 3, 6)}, "gated_delta_rule: g has shape (2, 5, 4), expected (B=2, T=5, Hv=3)"),
        (
            {"v": (2, 5, 3, 6), "g": (2, 5, 3), "beta": (2, 5, 3)},
            "gated_delta_rule: Hv=3, expected a multiple of Hk=2",
        ),
        (
            {"initial_state": (2, 4, 6, 8)},
            "gated_delta_rule: initial_state has shape (2, 4, 6, 8), expected (N=2, Hv=4, K=8, V=6)",
        ),
        (
            {"initial_state": (3, 4, 8, 6)},
            "gated_delta_rule: initial_state holds 3 states, expected 2, the number of rows",
        ),
    ],
)
def test_gated_delta_rule(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_delta_rule(**tensors(GATED, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": (2, 5, 4, 6)}, "ssd: B has shape (2, 5, 4, 6), expected (B=2, T=5, G=2, N)"),
        ({"C": (2, 5, 4, 5)}, "ssd: C has shape (2, 5, 4, 5), expected (B=2, T=5, H=4, N=6)"),
        ({"A_log": (3,)}, "ssd: A_log has shape (3,), expected (H=4)"),
        ({"D": (1, 4)}, "ssd: D has shape (1, 4), expected (H=4)"),
        ({"x": (2, 5, 3, 8), "B": (2, 5, 3, 6)}, "ssd: H=4, expected a multiple of G=3"),
        ({"initial_state": (2, 4, 6, 8)}, "ssd: initial_state has shape (2, 4, 6, 8), expected (sequences=2, H=4"),
    ],
)
def test_ssd(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ssd(**tensors(SSD, **change))


def test_types_and_devices() -> None:
    integers = tensors(GATED) | {"beta": torch.zeros(2, 5, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"gated_delta_rule: beta is torch.int64, expected a floating-point type"):
        gated_delta_rule(**integers)
    elsewhere = tensors(SSD) | {"C": torch.zeros(2, 5, 4, 6, device="meta")}
    with pytest.raises(ValueError, match=r"ssd: C is on meta, expected cpu as the first argument"):
        ssd(**elsewhere)


def test_states_of_packed_documents() -> None:
    packed = tensors({name: (1, *shape[1:]) for name, shape in GATED.items()}, initial_state=(3, 4, 8, 6))
    with pytest.raises(ValueError, match="3 states, expected 2, the number of documents in cu_seqlens"):
        gated_delta_rule(**packed, cu_seqlens=torch.tensor([0, 2, 5]))
