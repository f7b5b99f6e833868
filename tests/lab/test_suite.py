"""Suites as they are read: what an arm's recipe becomes, the suites of the repository, and what bad ones are told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hylo.errors import HyloError
from hylo.lab.jobs import jobs_of
from hylo.lab.suite import Metric, read_suite, recipe_of
from hylo.recipe import PUBLISHED

SUITES = sorted(path for path in (Path(__file__).parents[2] / "suites").glob("*.yaml") if path.stem != "short")
RECIPE = {
    "base": "base",
    "layout": "1MLA2GDN",
    "data": {"text": ["python-stdlib"], "facts": 0.5},
    "stages": [{"length": 32, "rows": 2, "tokens": 256, "learning_rate": 1e-3}],
    "yarn_original_length": 32,
    "evaluate": {"lengths": [64, 256]},
}
SUITE = {
    "title": "T",
    "recipe": "recipe.yaml",
    "seeds": 3,
    "baseline": "a",
    "metrics": ["kl@256", "needle@64"],
    "set": {"stages.0.tokens": 512},
    "arms": {"a": None, "b": {"label": "B", "set": {"stages.0.tokens": 1024, "data.facts": 0.25}}},
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "base").mkdir()
    (folder / "suite.yaml").write_text(yaml.safe_dump({**SUITE, **changes}, sort_keys=False))
    return folder / "suite.yaml"


def test_an_arm_is_the_recipe_with_the_suites_settings_and_then_its_own(tmp_path: Path) -> None:
    path = write(tmp_path)
    suite = read_suite(path)
    assert suite.seeds == [0, 1, 2]
    a, b = (recipe_of(suite, path, name, 2) for name in "ab")
    assert (a.stages[0].tokens, b.stages[0].tokens) == (512, 1024)
    assert (a.data.facts, b.data.facts) == (0.5, 0.25)
    assert a.seed == a.stages[0].seed == 2
    assert a.base == (tmp_path / "base").resolve()


def test_relative_paths_of_a_suite_start_at_the_suite(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    arms = {"a": {}, "b": {"set": {"teacher": "larger"}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE | {"recipe": "recipes/recipe.yaml", "arms": arms}))
    suite = read_suite(tmp_path / "suite.yaml")
    made = recipe_of(suite, tmp_path / "suite.yaml", "b", 0)
    assert made.teacher == tmp_path / "larger" and made.base == tmp_path / "recipes" / "base"


def test_an_arm_as_published_has_the_papers_choices_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, arms={"a": {"as_published": True}, "b": {"as_published": True, "set": {"init": "random"}}})
    suite = read_suite(path)
    a, b = (recipe_of(suite, path, name, 0) for name in "ab")
    assert not a.data.boundaries
    assert {key: getattr(a, key) for key in PUBLISHED if "." not in key} == {
        key: value for key, value in PUBLISHED.items() if "." not in key
    }
    assert b.init == "random" and b.rope_key == PUBLISHED["rope_key"]


def test_jobs_come_seed_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path)
    jobs = jobs_of(read_suite(path), path, tmp_path / "lab")
    assert [job.name for job in jobs] == [f"{arm}-seed-{seed}" for seed in range(3) for arm in "ab"]
    assert jobs[3].run == tmp_path / "lab" / "runs" / "b" / "seed-1"


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_of_the_repository_is_made_of_valid_recipes(path: Path, tmp_path: Path) -> None:
    suite = read_suite(path)
    if path.stem == "teacher":  # which is trained first
        suite.arms["larger"].set["teacher"] = str(path.parent.parent / "src/hylo/demo")
    jobs = jobs_of(suite, path, tmp_path)
    assert len(suite.seeds) >= 5 and len(jobs) == len(suite.seeds) * len(suite.arms)
    first = {job.arm: job.recipe for job in jobs if job.seed == suite.seeds[0]}
    assert len({recipe.model_dump_json() for recipe in first.values()}) == len(first)  # no arm is another's double


def test_metrics() -> None:
    metric = Metric.parse("converted:needle@2048")
    assert (metric.model, metric.figure, metric.length) == ("converted", "needle", 2048)
    assert not metric.lower_is_better and metric.label == "needle accuracy at 2048, converted"
    assert Metric.parse("kl@256").model is None and Metric.parse("kl@256").lower_is_better


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "c"}, "baseline: c is none of the arms (a, b)"),
        ({"metrics": ["kl"]}, "metric kl is not understood"),
        ({"metrics": ["accuracy@64"]}, "metric accuracy@64 is not understood"),
        ({"metrics": ["kl@128"]}, "arm a: metric kl@128 is at a length that its recipe does not evaluate (64, 256)"),
        ({"seeds": [1, 1]}, "name one twice"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"arms": {}}, "arms"),
        ({"arms": {"A b": {}}}, "arms"),
        ({"arms": {"a": {"sets": {}}}}, "arms.a.sets: unknown key"),
        ({"arms": {"a": {"set": {"layuot": "3MLA"}}}}, "arm a: recipe"),
        ({"arms": {"a": {"recipe": "other.yaml"}}}, "arm a: recipe"),
        ({"recipe": "none.yaml"}, "none.yaml does not exist"),
        ({"arms": {"a": {}, "b": {"set": {"teacher": "larger"}}}}, "arm b: model directory"),
        ({"titel": "T"}, "titel: unknown key"),
    ],
)
def test_bad_suites_are_told_so_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(HyloError) as raised:
        jobs_of(read_suite(path), path, tmp_path / "lab")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="suite .*none.yaml does not exist"):
        read_suite(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(HyloError, match="holds no keys"):
        read_suite(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(HyloError, match="title: Field required"):
        read_suite(tmp_path / "empty.yaml")
