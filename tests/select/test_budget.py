"""How many layers a KV budget leaves attention-like, and what is said where it leaves none or all."""

import json
from pathlib import Path

import pytest

from hylo.commands.shared import bytes_of, tokens_of
from hylo.convert.config import planned_config
from hylo.errors import HyloError
from hylo.select.budget import Budget, parse_budget, plan_within
from hylo.serve.memory import plan_serving

LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama_1b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    return tmp_path


def parsed(text: str) -> Budget:
    return parse_budget(text, bytes_of, tokens_of)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5%", Budget("5%", percent=5.0)),
        ("3.9 %", Budget("3.9 %", percent=3.9)),
        ("640B", Budget("640B", bytes=640)),
        ("2KiB", Budget("2KiB", bytes=2048)),
        ("128k@80GiB", Budget("128k@80GiB", context=131072, memory=80 * 2**30)),
    ],
)
def test_three_ways_to_write_a_budget(text: str, budget: Budget) -> None:
    assert parsed(text) == budget


@pytest.mark.parametrize("text", ["", "5", "0%", "120%", "lots", "640", "128k@", "@80GiB", "-3%", "1k,2k@80GiB"])
def test_what_is_no_budget_is_said_in_one_line(text: str) -> None:
    with pytest.raises(HyloError, match="--kv-budget") as raised:
        parsed(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("4%", "4MLA12GDN"),  # the released 1B hybrid: 4 x (128 + 32) of 16 x 1024 values, 3.9 %
        ("3.9%", "3MLA13GDN"),  # 3.90625 is more
        ("1280B", "4MLA12GDN"),
        ("1279B", "3MLA13GDN"),
    ],
)
def test_most_layers_within_the_budget(llama_1b: Path, text: str, layout: str) -> None:
    plan, cost = plan_within(llama_1b, parsed(text))
    assert plan.layout == layout
    assert f"{plan.kv_bytes_per_token:,} bytes of KV a token" in cost


def test_other_kinds_of_layer(llama_1b: Path) -> None:
    assert plan_within(llama_1b, parsed("50%"), "A", "M2")[0].layout == "8A8M2"


def test_a_context_in_a_memory_is_what_serving_says(llama_1b: Path) -> None:
    text = "8m@16GiB"
    plan, cost = plan_within(llama_1b, parsed(text))
    assert 1 < plan.kv_bytes_per_token // 320 < 15 and "of cache for 8,388,608 tokens" in cost
    length, memory = 2**23, 16 * 2**30

    def fits(n: int) -> bool:
        config = planned_config(plan_within(llama_1b, Budget("", bytes=320 * n))[0], "pairs-fast")
        served = plan_serving(config, dtype="bfloat16", memory_bytes=memory, max_model_len=length, prefix_caching=True)
        return bool(served.concurrent_requests)

    n = plan.kv_bytes_per_token // 320
    assert fits(n) and not any(fits(more) for more in range(n + 1, 16))


def test_no_layer_fits(llama_1b: Path) -> None:
    with pytest.raises(HyloError, match=r"1%: the nearest layout, 1MLA15GDN, needs more: 320 bytes .* 1\.0 % of"):
        plan_within(llama_1b, Budget("1%", percent=0.9))
    with pytest.raises(HyloError, match=r"1MLA15GDN, needs more: 1 GiB of memory, .* has no room") as raised:
        plan_within(llama_1b, parsed("128k@1GiB"))
    assert "\n" not in str(raised.value)


def test_all_layers_fit(llama_1b: Path) -> None:
    with pytest.raises(HyloError, match="all 16 layers fit as MLA .* nothing to select; lower the budget"):
        plan_within(llama_1b, parsed("20%"))
