"""Recipes: what a good one becomes, and that a bad one is named with its path in one line."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from hylo.errors import HyloError
from hylo.recipe import dump_recipe, overrides_of, read_recipe

LAYERS = {"objective": "layers", "length": 32, "rows": 2, "tokens": 128, "learning_rate": 1e-3}
KL = {"length": 64, "rows": 1, "tokens": 128, "learning_rate": 1e-3}
DPO = KL | {"objective": "dpo"}
GOOD = {
    "base": "base",
    "layout": "1MLA2GDN",
    "data": {"text": ["python-stdlib", "text.txt"], "facts": 0.5},
    "stages": [LAYERS, KL],
    "yarn_original_length": 32,
    "evaluate": {"lengths": [32, 64]},
}


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(HyloError) as error:
        read_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_paths_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD))
    assert recipe.base == tmp_path / "base"
    assert recipe.extension_teacher == recipe.base
    assert recipe.data.documents[0].paths == ["python-stdlib", str(tmp_path / "text.txt")]


def test_every_file_has_its_own_paths(tmp_path: Path) -> None:
    write(tmp_path / "families" / "a.yaml", GOOD | {"teacher": "teacher"})
    child = {"extends": "families/a.yaml", "base": "mine", "data": {"held_out": ["other.txt"]}}
    recipe = read_recipe(write(tmp_path / "r.yaml", child))
    assert recipe.base == tmp_path / "mine"
    assert recipe.teacher == tmp_path / "families" / "teacher"
    assert recipe.data.documents[0].paths == ["python-stdlib", str(tmp_path / "families" / "text.txt")]
    assert recipe.data.held_out[0].paths == [str(tmp_path / "other.txt")]


def test_sources_have_their_paths_too(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    sources: list[dict[str, Any]] = [
        {"kind": "jsonl", "paths": ["a.jsonl"], "text": "text"},
        {"kind": "hub", "dataset": "set"},
        {"kind": "hub", "dataset": "owner/set"},
    ]
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"data": {"sources": sources}}))
    jsonl, local, hub = recipe.data.documents
    assert jsonl.paths == [str(tmp_path / "a.jsonl")] and jsonl.text == "text"
    assert (local.dataset, hub.dataset) == (str(tmp_path / "set"), "owner/set")


def test_mappings_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    write(tmp_path / "c.yaml", GOOD | {"geometry": {"kv_lora_rank": 8, "q_lora_rank": 16}, "seed": 3})
    write(tmp_path / "b.yaml", {"extends": "c.yaml", "geometry": {"kv_lora_rank": 4}, "stages": [KL]})
    recipe = read_recipe(write(tmp_path / "a.yaml", {"extends": "b.yaml", "seed": 5}))
    assert recipe.geometry == {"kv_lora_rank": 4, "q_lora_rank": 16}
    assert [stage.kind for stage in recipe.stages] == ["distill"]
    assert recipe.seed == 5
    assert recipe.data.facts == 0.5


def test_null_takes_a_key_of_the_parent_away(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", GOOD | {"teacher": "teacher"})
    data = {"text": None, "facts": None, "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}]}
    child = write(tmp_path / "child.yaml", {"extends": "parent.yaml", "teacher": None, "data": data})
    read = read_recipe(child)
    assert read.teacher is None and [source.kind for source in read.data.sources] == ["jsonl"]
    assert "layout: Field required" in refusal(child, "layout=null")


def test_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    assert "a circle" in refusal(tmp_path / "a.yaml")


def test_a_missing_parent_is_named_with_its_child(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.yaml", {"extends": "b.yaml"}))
    assert "b.yaml" in message and "a.yaml extends" in message and "does not exist" in message


def test_overrides_reach_everything(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", GOOD)
    sets = ["seed=7", "stages.1.tokens=4_096", "data.facts=0.25", "geometry.kv_lora_rank=8", "stages.0.name=first"]
    recipe = read_recipe(path, [*sets, "base=other", "evaluate.lengths=[32]", "stages.1.objective={forward_kl: 2}"])
    assert recipe.seed == 7
    assert recipe.stages[1].tokens == 4096
    assert recipe.stages[1].objective == {"forward_kl": 2.0}
    assert recipe.data.facts == 0.25
    assert recipe.geometry == {"kv_lora_rank": 8}
    assert recipe.stages[0].directory == "first"
    assert recipe.base == tmp_path / "other"
    assert recipe.evaluate.lengths == [32]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["seed", "KEY=VALUE"]),
        ("stages.7.tokens=1", ["stages is a list without '7'", "0 to 1"]),
        ("stages.x=1", ["stages is a list without 'x'"]),
        ("seed.a=1", ["seed: Input should be a valid integer"]),
        ("layout.a=1", ["layout is '1MLA2GDN'", "holds no 'a'"]),
        ("stages.0.tokens=-5", ["stages.0.tokens", "greater than 0", "-5"]),
        ("seed=[", ["not YAML"]),
    ],
)
def test_what_cannot_be_set_is_named(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(write(tmp_path / "r.yaml", GOOD), override)
    assert all(word in message for word in words), message


def test_a_dumped_recipe_reads_back_the_same_anywhere(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"teacher": "owner/larger", "stages": [LAYERS, KL, DPO]}))
    copy = tmp_path / "elsewhere" / "r.yaml"
    copy.parent.mkdir()
    copy.write_text(dump_recipe(recipe))
    assert read_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layot": "x"}, ["layot", "unknown key"]),
        ({"stages": [LAYERS | {"tokens": -5}]}, ["stages.0.tokens", "greater than 0", "-5"]),
        ({"stages": [LAYERS | {"lr": 1}]}, ["stages.0.lr", "unknown key"]),
        ({"stages": [LAYERS, KL | {"length": "long"}]}, ["stages.1.length", "'long'"]),
        ({"stages": [KL | {"teacher": "none"}]}, ["stages.0: objective forward_kl", "teacher is none"]),
        ({"stages": []}, ["stages", "at least 1"]),
        ({"stages": [KL, KL]}, ["stages.1.name", "stages.0 is called extended-64"]),
        ({"stages": [KL | {"name": "converted"}]}, ["stages.0.name", "converted"]),
        ({"stages": [KL, KL | {"length": 32}]}, ["stages.1.length: 32 after 64"]),
        ({"stages": [KL, LAYERS]}, ["stages.1.objective: layers after distill"]),
        ({"stages": [DPO, LAYERS]}, ["stages.1.objective: layers after dpo"]),
        ({"stages": [LAYERS | {"share": 0.6}, KL | {"share": 0.6}]}, ["shares add up to 1.2"]),
        ({"stages": [LAYERS | {"share": 1}, KL]}, ["shares add up to 1,", "none left"]),
        ({"data": {"text": ["x"], "facts": 2}}, ["data.sources.1", "less than or equal to 1"]),
        ({"init": "magic"}, ["init", "pairs-fast"]),
        ({"rank": "many"}, ["rank", "energy=0.95"]),
        ({"evaluate": {"lengths": [0]}}, ["evaluate.lengths.0", "greater than 0"]),
    ],
)
def test_bad_values_are_named_with_their_path(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    message = refusal(write(tmp_path / "r.yaml", GOOD | change))
    assert all(word in message for word in [*words, "r.yaml"]), message
    assert "Value error" not in message


def test_parts_are_shares_and_what_is_left_by_tokens(tmp_path: Path) -> None:
    stages = [LAYERS | {"share": 0.2}, KL | {"tokens": 300}, DPO, KL | {"length": 128, "tokens": 100}]
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"stages": stages}))
    for part, expected in zip(recipe.parts(), [(0, 0.2), (0.2, 0.8), (0, 1), (0.8, 1)], strict=True):
        assert part == pytest.approx(expected)


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "r.yaml", {"init": "recipe"}))
    assert "base: Field required" in message and "stages: Field required" in message


@pytest.mark.parametrize("text", ["a: [1, 2", "", "- a\n- b\n", "just words", "extends: [a, b]\n"])
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    refusal(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.yaml")


def hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_models_of_the_hub_are_downloaded_when_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path / "cache" / name)

    hub(monkeypatch, download)
    (tmp_path / "mine" / "base").mkdir(parents=True)
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"base": "mine/base", "teacher": "owner/larger"}))
    assert recipe.base == tmp_path / "mine" / "base"  # a directory, though it looks like a name
    assert recipe.teacher == Path("owner/larger") and not asked
    assert recipe.with_models().teacher == tmp_path / "cache" / "owner" / "larger"
    assert recipe.with_models(weights=False).base == recipe.base
    assert asked == [("owner/larger", True, False), ("owner/larger", False, False)]


def test_a_model_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no\nconnection")

    hub(monkeypatch, download)
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"base": "owner/base"}))
    with pytest.raises(HyloError, match=r"owner/base .*\(no connection\).* path of a copy") as error:
        recipe.with_models()
    assert "\n" not in str(error.value)


def test_positions_without_yarn(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", GOOD)
    assert read_recipe(path, ["positions=hype", "attention_gate=true"]).positions == "hype"
    assert read_recipe(path).positions == "rope"
    said = "stages.1.yarn_factor: positions none have nothing to stretch"
    assert said in refusal(path, "positions=none", "stages.1.yarn_factor=2")
    assert "positions: Input should be 'rope', 'none' or 'hype' (got 'alibi')" in refusal(path, "positions=alibi")


def test_one_seed_goes_to_every_stage_that_names_no_other(tmp_path: Path) -> None:
    stages = [LAYERS, KL | {"seed": 7}]
    recipe = read_recipe(write(tmp_path / "r.yaml", GOOD | {"stages": stages, "seed": 3}))
    assert [stage.seed for stage in recipe.stages] == [3, 7]
    assert [stage.seed for stage in read_recipe(tmp_path / "r.yaml", ["seed=4"]).stages] == [4, 7]


def test_as_published_comes_before_what_is_set(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", GOOD)
    published = read_recipe(path, overrides_of({}, as_published=True))
    assert (published.init, published.rope_key, published.linear_init) == ("recipe", "mean", "recipe")
    assert not published.data.boundaries and published.calibration_tokens == 0
    assert read_recipe(path, overrides_of({"init": "pairs-best"}, as_published=True)).init == "pairs-best"
    assert read_recipe(path, overrides_of({})) == read_recipe(path)


def test_a_stretch_is_not_shorter_than_what_was_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", GOOD)
    assert read_recipe(path, ["stretch=128"]).stretch == 128
    assert "stretch: 32 after 64; lengths must not fall" in refusal(path, "stretch=32")
    assert "stages.1: layer_loss is for objective layers" in refusal(path, "stages.1.layer_loss=mixer")
