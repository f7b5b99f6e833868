"""The plan against published totals, and against models that are really built."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from hylo.convert import planned_config
from hylo.errors import HyloError
from hylo.geometry import default_geometry
from hylo.modeling import HyloForCausalLM
from hylo.plan import make_plan


def llama(hidden: int, layers: int, intermediate: int, heads: int, kv: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **others,
    }


def qwen3(hidden: int, layers: int, intermediate: int, heads: int, **others: Any) -> dict[str, Any]:
    config = llama(hidden, layers, intermediate, heads, 8, head_dim=128, vocab_size=151936, rope_scaling=None)
    names = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
    return config | names | {"sliding_window": None} | others


def qwen25(hidden: int, layers: int, intermediate: int, heads: int, kv: int, **others: Any) -> dict[str, Any]:
    config = llama(hidden, layers, intermediate, heads, kv, vocab_size=151936, rope_theta=1e6, rope_scaling=None)
    window = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": layers}
    return config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]} | window | others


BASES = {
    "Llama-3.2-1B": llama(2048, 16, 8192, 32, 8, head_dim=64),
    "Llama-3.2-3B": llama(3072, 28, 8192, 24, 8, head_dim=128),
    "Llama-3.1-8B": llama(4096, 32, 14336, 32, 8, tie_word_embeddings=False),
    "Qwen3-0.6B": qwen3(1024, 28, 3072, 16),
    "Qwen3-1.7B": qwen3(2048, 28, 6144, 16),
    "Qwen3-4B": qwen3(2560, 36, 9728, 32),
    "Qwen3-8B": qwen3(4096, 36, 12288, 32, tie_word_embeddings=False),
    "SmolLM2-135M": llama(576, 30, 1536, 9, 3, vocab_size=49152),
    "SmolLM2-360M": llama(960, 32, 2560, 15, 5, vocab_size=49152),
    "SmolLM2-1.7B": llama(2048, 24, 8192, 32, 32, vocab_size=49152),
    "Qwen2.5-0.5B": qwen25(896, 24, 4864, 14, 2),
    "Qwen2.5-1.5B": qwen25(1536, 28, 8960, 12, 2),
    "Qwen2.5-7B": qwen25(3584, 28, 18944, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "demo": llama(128, 6, 384, 4, 2, head_dim=64, vocab_size=2560, torch_dtype="float32", rope_scaling=None),
}
BASE_PARAMETERS = {  # a tied head counted once
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
}
TINY = {
    "llama": llama(48, 3, 80, 4, 2, head_dim=16, vocab_size=96, mlp_bias=True, rope_scaling=None),
    "qwen2": qwen25(64, 3, 80, 4, 2, vocab_size=96),
    "qwen3": qwen3(48, 3, 80, 4, num_key_value_heads=2, head_dim=16, vocab_size=96),
}


@pytest.fixture
def base(tmp_path: Path) -> Any:
    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


# vocabulary, hidden, layers, MLP with two norms; then one mixer of each kind, and the layouts with their KV percentages
PUBLISHED = {
    "Llama-3.2-1B": (128256, 2048, 16, 50_335_744, (10_125_312, 25_215_500, 14_763_104), {4: 3.9, 8: 7.8}),
    "Llama-3.2-3B": (128256, 3072, 28, 75_503_616, (19_660_800, 56_715_794, 34_705_480), {6: 2.0, 14: 4.7}),
    "Qwen3-1.7B": (151936, 2048, 28, 37_752_832, (10_748_160, 25_215_500, 16_832_560), {7: 3.9, 14: 7.8}),
}
PUBLISHED_TOTALS = {
    ("Llama-3.2-1B", "4MLA12GDN"): 1_673_797_776,
    ("Llama-3.2-3B", "14MLA14GDN"): 3_971_381_500,
    ("Qwen3-1.7B", "14MLA14M2"): 2_065_541_280,
}


@pytest.mark.parametrize("linear", ["GDN", "M2"])
@pytest.mark.parametrize("name, mla_layers", [(name, n) for name, figures in PUBLISHED.items() for n in figures[-1]])
def test_published_layouts(base: Any, name: str, mla_layers: int, linear: str) -> None:
    vocabulary, hidden, layers, overhead, (mla, gdn, m2), percentages = PUBLISHED[name]
    layout = f"{mla_layers}MLA{layers - mla_layers}{linear}"
    figures = make_plan(base(BASES[name]), layout).to_json()
    mixers = mla_layers * mla + (layers - mla_layers) * (gdn if linear == "GDN" else m2)
    assert figures["parameters_untied"] == 2 * vocabulary * hidden + hidden + layers * overhead + mixers
    assert figures["parameters_untied"] == PUBLISHED_TOTALS.get((name, layout), figures["parameters_untied"])
    assert figures["parameters"] == figures["parameters_untied"] - vocabulary * hidden
    assert round(figures["kv_percent_of_base"], 1) == percentages[mla_layers]
    # exact key norms, which the published percentages leave out
    assert figures["kv_extra_bytes_per_token"] == (mla_layers * 8 * 2 if name == "Qwen3-1.7B" else 0)


@pytest.mark.parametrize(
    "name, layout, mixer, parameters",
    [
        ("Llama-3.2-1B", "16MLA", "mla", 10_125_312),
        ("Llama-3.2-3B", "28MLA", "mla", 19_660_800),
        ("Qwen3-1.7B", "28MLA", "mla", 10_748_160),
        ("Llama-3.2-1B", "16GDN", "gated_deltanet", 25_215_500),
        ("Llama-3.2-3B", "28GDN", "gated_deltanet", 56_715_794),
        ("Qwen3-1.7B", "28GDN", "gated_deltanet", 25_215_500),
        ("Llama-3.2-1B", "16M2", "mamba2", 14_763_104),
        ("Llama-3.2-3B", "28M2", "mamba2", 34_705_480),
        ("Qwen3-1.7B", "28M2", "mamba2", 16_832_560),
    ],
)
def test_published_mixers(base: Any, name: str, layout: str, mixer: str, parameters: int) -> None:
    layer = make_plan(base(BASES[name]), layout).to_json()["layers"][3]
    assert (layer["index"], layer["mixer"], layer["mixer_parameters"]) == (3, mixer, parameters)


def test_published_geometry(base: Any) -> None:
    plan = make_plan(base(BASES["Llama-3.2-3B"]), "6MLA22GDN")
    assert plan.geometry == {
        "kv_lora_rank": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "conv_kernel_size": 4,
        "gdn_num_heads": 9,
        "gdn_head_dim": 256,
        "gdn_expand_v": 2,
        "mamba_d_state": 128,
        "mamba_head_dim": 128,
        "mamba_num_heads": 24,
        "mamba_d_inner": 3072,
        "mamba_d_xb": 1024,
        "kda_num_heads": 24,
        "kda_head_dim": 128,
    }


@pytest.mark.parametrize("name", BASE_PARAMETERS)
def test_bases_have_the_parameters_that_their_cards_state(base: Any, name: str) -> None:
    plan = make_plan(base(BASES[name]), f"{BASES[name]['num_hidden_layers']}A")
    assert plan.base_parameters == plan.parameters == BASE_PARAMETERS[name]


@pytest.mark.parametrize("name", BASES)
def test_every_base_has_a_default_geometry_that_fits(base: Any, name: str) -> None:
    layers = BASES[name]["num_hidden_layers"]
    attention = layers // 4
    plan = make_plan(base(BASES[name]), f"{attention}MLA{layers - attention}GDN")
    assert plan.geometry == default_geometry(plan.base_config)
    assert plan.kv_percent_of_base < 10
    assert 0.9 < plan.parameters / plan.base_parameters < 1.5


@pytest.mark.parametrize(
    "name, heads, width",
    [
        ("Llama-3.1-8B", 12, 256),
        ("Qwen2.5-7B", 11, 256),  # 10.5
        ("Qwen2.5-1.5B", 5, 256),  # 4.5
        ("Qwen3-4B", 8, 256),  # 7.5
        ("Qwen3-0.6B", 3, 256),
        ("SmolLM2-360M", 6, 128),  # 5.6
        ("Qwen2.5-0.5B", 5, 128),  # 5.25
        ("SmolLM2-135M", 3, 128),  # 3.4
        ("demo", 2, 64),  # 1.5
    ],
)
def test_gated_deltanet_is_three_quarters_as_wide_as_the_model_in_whole_heads(
    base: Any, name: str, heads: int, width: int
) -> None:
    geometry = make_plan(base(BASES[name]), f"{BASES[name]['num_hidden_layers']}GDN").geometry
    assert (geometry["gdn_num_heads"], geometry["gdn_head_dim"]) == (heads, width)


@pytest.mark.parametrize("linear", ["GDN", "M2"])
@pytest.mark.parametrize("name", BASES)
def test_every_base_makes_a_hybrid_with_the_parameters_of_its_plan(base: Any, name: str, linear: str) -> None:
    half = BASES[name]["num_hidden_layers"] // 2
    plan = make_plan(base(BASES[name]), f"{half}MLA{half}{linear}")
    with torch.device("meta"):
        model = HyloForCausalLM(planned_config(plan, "pairs-fast"))
    assert plan.parameters == model.num_parameters()
    for layer, built in zip(plan.layers, model.model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in built.parameters())


def test_the_demo_base_keeps_less_than_a_tenth_of_its_cache(base: Any) -> None:
    plan = make_plan(base(BASES["demo"]), "2MLA4GDN")
    assert plan.kv_percent_of_base == pytest.approx(100 * 2 * (48 + 16) / (6 * 2 * 2 * 64))


@pytest.mark.parametrize("k_norm", ["exact", "folded"])
@pytest.mark.parametrize("layout", ["3A", "3MLA", "3GDN", "3M2", "3KDA", "1A2M2", "1MLA2GDN"])
@pytest.mark.parametrize("family", TINY)
def test_formulas_count_what_a_model_has(base: Any, family: str, layout: str, k_norm: Any) -> None:
    overrides = {"qk_rope_head_dim": 4, "gdn_num_heads": 3, "gdn_head_dim": 8, "conv_kernel_size": 3}
    plan = make_plan(base(TINY[family]), layout, geometry=overrides, k_norm=k_norm)
    with torch.device("meta"):
        model = HyloForCausalLM(planned_config(plan, "pairs-fast"))
        original = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.base))
    assert plan.parameters == model.num_parameters()
    assert plan.base_parameters == original.num_parameters()
    for layer, built in zip(plan.layers, model.model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in built.parameters())
        assert layer.mixer_parameters == sum(p.numel() for p in built.get_submodule("mixer").parameters())


def test_a_folded_key_norm_has_no_weight_and_caches_nothing(base: Any) -> None:
    exact = make_plan(base(BASES["Qwen3-1.7B"]), "7MLA21GDN").to_json()
    folded = make_plan(base(BASES["Qwen3-1.7B"]), "7MLA21GDN", k_norm="folded").to_json()
    assert (exact["k_norm"], folded["k_norm"]) == ("exact", "folded")
    assert folded["parameters"] == exact["parameters"] - 7 * 128
    assert (exact["kv_extra_bytes_per_token"], folded["kv_extra_bytes_per_token"]) == (7 * 8 * 2, 0)
    assert folded["kv_bytes_per_token"] == exact["kv_bytes_per_token"]


@pytest.mark.parametrize("family", TINY)
def test_ranks_of_their_own_are_counted_layer_by_layer(base: Any, family: str) -> None:
    plan = make_plan(base(TINY[family]), "2MLA1GDN", [0, 2], kv_lora_ranks=[5, 999, 17], dtype="float32")
    assert plan.kv_lora_ranks == plan.to_json()["kv_lora_ranks"] == [5, 0, 17]
    rope = plan.geometry["qk_rope_head_dim"]
    assert [layer.kv_bytes_per_token for layer in plan.layers] == [4 * (5 + rope), 0, 4 * (17 + rope)]
    with torch.device("meta"):
        model = HyloForCausalLM(planned_config(plan, "recipe"))
    for layer, built in zip(plan.layers, model.model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in built.parameters())
    console = Console(width=200, record=True, file=io.StringIO())
    plan.print(console)
    assert "kv_lora_rank 5 to 17" in console.export_text()


@pytest.mark.parametrize(
    "ranks, named",
    [
        ([8, 8], "kv_lora_ranks has 2 entries for 6 layers"),
        ([0, 8, 0, 0, 0, 0], "kv_lora_ranks has 0 for layer 4"),
        ([0, 129, 0, 0, 8, 0], "kv_lora_ranks has 129 for layer 1, whose matrix is 224 x 128; choose 1 to 128"),
    ],
)
def test_ranks_that_do_not_fit_are_named(base: Any, ranks: list[int], named: str) -> None:
    with pytest.raises(HyloError, match=named):
        make_plan(base(BASES["demo"]), "2MLA4GDN", kv_lora_ranks=ranks)


def test_bytes_follow_the_dtypes(base: Any) -> None:
    directory = base(BASES["Llama-3.2-1B"])
    stated, wide = make_plan(directory, "4MLA12GDN"), make_plan(directory, "4MLA12GDN", dtype="float32")
    assert stated.kv_bytes_per_token == 4 * (128 + 32) * 2
    assert stated.base_kv_bytes_per_token == 16 * 2 * 512 * 2
    assert wide.kv_bytes_per_token == 2 * stated.kv_bytes_per_token
    recurrent, columns = 12 * 6 * 256 * 512, 12 * 3 * (1536 + 1536 + 3072)
    assert stated.state_bytes_per_sequence == 4 * recurrent + 2 * columns
    narrow = make_plan(directory, "4MLA12GDN", state_dtype="bfloat16")
    assert narrow.state_bytes_per_sequence == 2 * recurrent + 2 * columns


def test_dependent_widths_follow_overrides(base: Any) -> None:
    directory = base(BASES["demo"])
    geometry = make_plan(directory, "6MLA", geometry={"qk_rope_head_dim": 64}).geometry
    assert geometry["qk_nope_head_dim"] == 0
    geometry = make_plan(directory, "6MLA", geometry={"qk_nope_head_dim": 40}).geometry
    assert geometry["qk_rope_head_dim"] == 24
    geometry = make_plan(directory, "6M2", geometry={"mamba_num_heads": 2, "mamba_head_dim": 128}).geometry
    assert (geometry["mamba_d_inner"], geometry["mamba_d_state"]) == (256, 128)


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"kv_lora_rank": 129}, "kv_lora_rank is 129.*224 x 128.*at most 128"),
        ({"q_lora_rank": 129}, "q_lora_rank is 129"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15"),
        ({"qk_rope_head_dim": 66}, "qk_rope_head_dim is 66"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"),
        ({"qk_rope_head_dim": 16, "qk_nope_head_dim": 16}, "qk_nope_head_dim is 16"),
        ({"v_head_dim": 32}, "v_head_dim is 32"),
        ({"gdn_num_heads": 0}, "gdn_num_heads is 0"),
        ({"conv_kernel_size": 1}, "conv_kernel_size is 1"),
        ({"mamba_d_inner": 100}, "mamba_d_inner is 100"),
        ({"mamba_d_xb": 192}, "mamba_d_xb is 192"),
        ({"latent": 3}, "no latent"),
        ({"gdn_head_dim": 2.5}, "gdn_head_dim is 2.5"),
    ],
)
def test_geometry_that_does_not_fit_is_named(base: Any, overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(HyloError, match=named) as error:
        make_plan(base(BASES["demo"]), "2MLA4GDN", geometry=overrides)
    assert "\n" not in str(error.value)


def test_unknown_choices_are_named(base: Any) -> None:
    for choice in ("dtype", "state_dtype", "k_norm"):
        with pytest.raises(HyloError, match="float8"):
            make_plan(base(BASES["demo"]), "2MLA4GDN", **{choice: "float8"})  # type: ignore[arg-type]


def test_the_table_shows_every_layer_and_the_totals(base: Any) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    make_plan(base(BASES["Qwen3-1.7B"]), "7MLA21GDN").print(console)
    text = console.export_text()
    assert text.count("gated_deltanet") == 21
    assert "3.9 %" in text
    assert "kv_lora_rank 256" in text and "mamba" not in text
