"""Recipes: what a good one becomes, and that a bad one is named with its path in one line."""

from pathlib import Path

import pytest
import yaml

from hylo.errors import HyloError
from hylo.recipe import dump_recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = {
    "base": "base",
    "layout": "1MLA2GDN",
    "data": {"text": ["python-stdlib", "text.txt"], "facts": 0.5},
    "align": {"length": 32, "rows": 2, "tokens": 128, "learning_rate": 1e-3},
    "extend": [{"length": 64, "rows": 1, "tokens": 128, "learning_rate": 1e-3}],
    "yarn_original_length": 32,
    "evaluate": {"lengths": [32, 64]},
}


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_paths_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD))
    assert recipe.base == tmp_path / "base"
    assert recipe.extension_teacher == recipe.base
    assert recipe.data.text == ["python-stdlib", str(tmp_path / "text.txt")]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_repositorys_recipes_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.extend[-1].length > recipe.align.length
    assert recipe.base.parent == path.parent


def test_a_dumped_recipe_reads_back_the_same_anywhere(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"teacher": "larger"}))
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "r.yaml"
    copy.write_text(dump_recipe(recipe))
    assert read_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layot": "x"}, ["layot", "unknown key"]),
        ({"align": GOOD["align"] | {"tokens": -5}}, ["align.tokens", "greater than 0", "-5"]),
        ({"align": GOOD["align"] | {"lr": 1}}, ["align.lr", "unknown key"]),
        ({"extend": [GOOD["extend"][0] | {"length": "long"}]}, ["extend.0.length", "'long'"]),
        ({"extend": []}, ["extend", "at least 1"]),
        ({"extend": GOOD["extend"] * 2}, ["extend lengths must grow", "[64, 64]"]),
        ({"data": {"text": ["x"], "facts": 2}}, ["data.facts", "less than or equal to 1"]),
        ({"init": "magic"}, ["init", "pairs-fast"]),
        ({"evaluate": {"lengths": [0]}}, ["evaluate.lengths.0", "greater than 0"]),
    ],
)
def test_bad_values_are_named_with_their_path(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(HyloError) as error:
        read_recipe(write(tmp_path / "r.yaml", GOOD | change))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [*words, "r.yaml"]), message


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="base: Field required; .*layout: Field required"):
        read_recipe(write(tmp_path / "r.yaml", {"init": "recipe"}))


@pytest.mark.parametrize("text", ["a: [1, 2", "", "- a\n- b\n", "just words"])
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(HyloError) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
