"""Layouts read, placed and named."""

import pytest

from hylo.errors import HyloError
from hylo.layout import layout_name, parse_layout


def attention_at(mixers: list[str]) -> list[int]:
    return [i for i, mixer in enumerate(mixers) if mixer in ("attention", "mla")]


@pytest.mark.parametrize(
    "layout, layers, positions",
    [
        ("4MLA12GDN", 16, [1, 5, 10, 14]),
        ("8MLA8GDN", 16, list(range(0, 16, 2))),
        ("6MLA22M2", 28, [0, 5, 10, 16, 21, 26]),
        ("7MLA21GDN", 28, [1, 5, 9, 13, 17, 21, 25]),
        ("14MLA14M2", 28, list(range(0, 28, 2))),
        ("8A8M2", 16, list(range(0, 16, 2))),
        ("2MLA4GDN", 6, [1, 4]),
        ("1MLA5GDN", 6, [2]),
        ("16MLA", 16, list(range(16))),
        ("16GDN", 16, []),
        ("6M2", 6, []),
        ("2MLA4KDA", 6, [1, 4]),
    ],
)
def test_published_layouts_stand_where_they_were_published_and_others_are_spread(
    layout: str, layers: int, positions: list[int]
) -> None:
    mixers = parse_layout(layout, layers)
    assert len(mixers) == layers
    assert attention_at(mixers) == positions
    assert layout_name(mixers) == layout


def test_letters_name_mixers_in_either_order() -> None:
    assert parse_layout("1A1GDN", 2, [0]) == ["attention", "gated_deltanet"]
    assert parse_layout("1KDA1A", 2, [1]) == ["kda", "attention"]
    assert parse_layout("3M21MLA", 4, [3]) == ["mamba2", "mamba2", "mamba2", "mla"]
    assert layout_name(parse_layout("3M21MLA", 4)) == "1MLA3M2"


def test_explicit_layers_override_in_any_order() -> None:
    assert attention_at(parse_layout("3MLA13GDN", 16, [15, 0, 7])) == [0, 7, 15]


@pytest.mark.parametrize(
    "layout, positions, named",
    [
        ("4MLA10GDN", None, "14 layers but the base has 16"),
        ("4MLA12XYZ", None, "not understood"),
        ("MLA", None, "not understood"),
        ("", None, "not understood"),
        ("4MLA 12GDN", None, "not understood"),
        ("0MLA16GDN", None, "zero"),
        ("8GDN8GDN", None, "twice"),
        ("4A4MLA8GDN", None, "attention and mla"),
        ("8KDA8M2", None, "kda and mamba2"),
        ("8GDN8M2", None, "gated_deltanet and mamba2"),
        ("4MLA12GDN", [0, 1, 2, 16], "attention layer 16"),
        ("4MLA12GDN", [-1, 1, 2, 3], "attention layer -1"),
        ("4MLA12GDN", [1, 1, 2, 3], "twice"),
        ("4MLA12GDN", [1, 2, 3], "3 attention layers are named"),
        ("16GDN", [1], "1 attention layers are named"),
    ],
)
def test_layouts_that_do_not_fit_are_named(layout: str, positions: list[int] | None, named: str) -> None:
    with pytest.raises(HyloError, match=named) as error:
        parse_layout(layout, 16, positions)
    assert "\n" not in str(error.value)
