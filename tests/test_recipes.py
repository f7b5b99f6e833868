"""The recipes that come with the repository: the released models, their schedule, and the predecessors'."""

import json
from pathlib import Path
from typing import Any

import pytest

from hylo.plan import make_plan
from hylo.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
RELEASED = [
    f"{base}-{layout}-{length}"
    for base, layouts in {
        "llama-3.2-1b": ("4mla12gdn", "8mla8gdn", "4mla12m2"),
        "llama-3.2-3b": ("6mla22gdn", "14mla14gdn"),
        "qwen3-1.7b": ("7mla21gdn", "14mla14m2"),
    }.items()
    for layout in layouts
    for length in ("8k", "64k")
]
LEARNING_RATES = {"llama-3.2-1b": 6e-5, "llama-3.2-3b": 4e-5, "qwen3-1.7b": 6e-5}
# hidden, layers, intermediate, heads, head_dim, vocabulary; KV heads are 8 in all of them
GEOMETRY = {
    "llama-3.2-1b": ("llama", 2048, 16, 8192, 32, 64, 128256),
    "llama-3.2-3b": ("llama", 3072, 28, 8192, 24, 128, 128256),
    "qwen3-1.7b": ("qwen3", 2048, 28, 6144, 16, 128, 151936),
}
TOTALS = {  # published, with the head counted apart
    "llama-3.2-1b-4mla12gdn": 1_673_797_776,
    "llama-3.2-3b-14mla14gdn": 3_971_381_500,
    "qwen3-1.7b-14mla14m2": 2_065_541_280,
}


def recipe(name: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml")


def base(name: str, directory: Path) -> Path:
    kind, hidden, layers, intermediate, heads, head_dim, vocabulary = GEOMETRY[name]
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rope_theta": 500000.0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_there_is_one_for_every_released_model() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert len(RELEASED) == 14
    assert names - set(RELEASED) == {
        "llama-3.2-1b-4mla12gdn-2k-8k-64k",
        "mamba-in-llama-3b-14a14m2",
        "zebra-llama-1b-4mla12m2",
    }
    assert set(RELEASED) <= names


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_published_hyperparameters(name: str, tmp_path: Path) -> None:
    read = recipe(name)
    family, layout, length = name.rsplit("-", 2)
    align, *extend = read.stages
    assert (align.kind, align.length, align.rows, align.learning_rate) == ("layers", 2048, 96, 2e-4)
    assert [stage.length for stage in extend] == {"8k": [8192], "64k": [8192, 65536]}[length]
    assert {stage.learning_rate for stage in extend} == {LEARNING_RATES[family]}
    assert all(list(stage.objective) == ["forward_kl"] and stage.teacher_source == "live" for stage in extend)
    assert all(2**18 <= stage.rows * stage.length <= 2**19 for stage in extend)  # at most 0.5M tokens a step
    assert {(s.schedule, s.warmup, s.precision, s.clip) for s in read.stages} == {("cosine", 0.01, "bf16", 1.0)}
    assert sum(stage.tokens for stage in read.stages) == 10_000_000_000
    assert read.parts()[0] == (0, 0.2)
    assert read.yarn_original_length == (32768 if family.startswith("qwen") else 2048)
    assert read.evaluate.lengths[-1] == extend[-1].length
    assert "8B" in str(read.teacher)
    plan = make_plan(base(family, tmp_path), read.layout, read.mla_layers, read.geometry)
    assert plan.layout.lower() == layout
    if (total := TOTALS.get(f"{family}-{layout}")) is not None:
        assert plan.parameters_untied == total


def test_every_released_model_is_a_few_lines() -> None:
    assert all(len((RECIPES / f"{name}.yaml").read_text().splitlines()) <= 5 for name in RELEASED)


def test_the_schedule_in_three_lengths_ends_as_the_released_one() -> None:
    read = recipe("llama-3.2-1b-4mla12gdn-2k-8k-64k")
    assert [stage.length for stage in read.stages if stage.kind == "distill"] == [2048, 8192, 65536]
    assert sum(stage.tokens for stage in read.stages) == 10_000_000_000
    assert read.model_copy(update={"stages": []}) == recipe("llama-3.2-1b-4mla12gdn-64k").model_copy(
        update={"stages": []}
    )


def test_zebra_llama_is_all_2k_with_a_live_teacher_and_then_preferences(tmp_path: Path) -> None:
    read = recipe("zebra-llama-1b-4mla12m2")
    align, extend, dpo = read.stages
    assert (align.kind, extend.kind, dpo.kind) == ("layers", "distill", "dpo")
    assert align.length == extend.length == 2048
    assert extend.teacher_source == "live" and "8B" in str(read.teacher)
    assert (dpo.beta, dpo.learning_rate) == (0.01, 5e-7)
    assert len(read.data.preferences) == 3
    plan = make_plan(base("llama-3.2-1b", tmp_path), read.layout, read.mla_layers)
    assert [i for i, mixer in enumerate(plan.mixers) if mixer == "mla"] == [0, 5, 10, 14]
    assert plan.layout == "4MLA12M2"


def test_mamba_in_llama_keeps_every_other_attention_layer(tmp_path: Path) -> None:
    read = recipe("mamba-in-llama-3b-14a14m2")
    assert [stage.kind for stage in read.stages] == ["distill", "dpo"]
    plan = make_plan(base("llama-3.2-3b", tmp_path), read.layout, read.mla_layers)
    assert plan.mixers == ["mamba2", "attention"] * 14
