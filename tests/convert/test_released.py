"""Released checkpoints, written by released_format.py: the import computes the same, and what does not fit is named."""

import importlib.util
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hylo.checkpoint import read_base_config
from hylo.convert.released import import_released, read_hybrid_config, released_config, released_tensors
from hylo.errors import HyloError
from hylo.modeling.loading import load_model
from hylo.modeling.rope import mla_frequencies

Release = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]
TOKENS = torch.tensor([3, 59, 3, 8, 41, 17, 17, 2, 30, 8, 5, 60, 41])
Q_NORM, K_NORM = "mla.q_norm.weight", "mla.k_norm.weight"


def _format() -> ModuleType:
    spec = importlib.util.spec_from_file_location("released_format", Path(__file__).with_name("released_format.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


released_format = _format()


def imported(directory: Path, release: Release, **options: Any) -> Path:
    source = released_format.write(directory / "release", release)
    import_released(source, directory / "out", **options)
    return directory / "out"


def refused(directory: Path, release: Release, *named: str, **options: Any) -> None:
    with pytest.raises(HyloError) as error:
        imported(directory, release, **options)
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)
    assert [path.name for path in directory.iterdir()] == ["release"]


@pytest.fixture(scope="module")
def llama() -> Release:
    return released_format.random_release("llama", "gdn")


@pytest.fixture(scope="module")
def qwen() -> Release:
    return released_format.random_release("qwen3", "gdn")


def changed(release: Release, **changes: Any) -> Release:
    """Other values in hybrid_config.json; ... takes a key out."""
    tensors, hybrid, base = release
    hybrid = {key: value for key, value in (hybrid | changes).items() if value is not ...}
    return dict(tensors), hybrid, dict(base)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def with_exact_rotation(model: PreTrainedModel, hybrid: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits with RoPE's tables in float64; the model's own are float32 for any weights."""
    angular, factor = released_format.frequencies(hybrid)
    angles = torch.arange(len(TOKENS))[:, None] * torch.tensor(angular, dtype=torch.float64).repeat(2)
    table = (factor * angles.cos()[None], factor * angles.sin()[None])
    rope = model.model.rope
    monkeypatch.setattr(model.model, "rope", lambda *args, **kwargs: dict.fromkeys(rope(*args, **kwargs), table))
    return logits(model)


@pytest.mark.parametrize("pairing", ["interleaved", "half-split"])
@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("family, block", list(product(["llama", "qwen3"], ["gdn", "mamba"])))
def test_the_imported_model_computes_what_the_release_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, block: str, factor: float, pairing: str
) -> None:
    scaling = {"factor": factor, "original_max_position_embeddings": 64, "rope_type": "yarn"}
    release = released_format.random_release(family, block, rope_scaling=scaling)
    expected = released_format.forward(release, TOKENS, neighbours=pairing == "interleaved")
    model = load_model(imported(tmp_path, release, rope_pairing=pairing), dtype=torch.float64)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(with_exact_rotation(model, release[1], monkeypatch), expected, atol=1e-9, rtol=0)


def test_every_part_of_the_format_shows_in_the_logits(qwen: Release) -> None:
    """What the test above would not see if it were ignored: pairing, YaRN, both norms, grouping."""
    expected = released_format.forward(qwen, TOKENS)
    plain = changed(qwen, rope_scaling=None)
    flat = dict(qwen[0])
    for name in flat:
        if name.endswith((Q_NORM, K_NORM)):
            flat[name] = flat[name].flip(0)
    for other in (
        released_format.forward(qwen, TOKENS, neighbours=False),
        released_format.forward(plain, TOKENS),
        released_format.forward((flat, *qwen[1:]), TOKENS),
    ):
        assert (other - expected).abs().max() > 0.01


def test_decoding_token_by_token_gives_the_same(tmp_path: Path, qwen: Release) -> None:
    model = load_model(imported(tmp_path, qwen), dtype=torch.float64)
    cache, steps = None, []
    with torch.no_grad():
        for token in TOKENS:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), released_format.forward(qwen, TOKENS), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "scaling, length, kind",
    [
        (None, 131072, "default"),
        ({"factor": 1, "original_max_position_embeddings": 64, "rope_type": "yarn"}, 131072, "default"),
        ({"factor": 32, "original_max_position_embeddings": 2048, "rope_type": "yarn"}, 65536, "yarn"),
        ({"factor": 2.5, "original_max_position_embeddings": 2048}, 5120, "yarn"),
    ],
)
def test_positions_and_supported_length(
    tmp_path: Path, llama: Release, scaling: dict[str, Any] | None, length: int, kind: str
) -> None:
    release = changed(llama, rope_scaling=scaling)
    config = load_model(imported(tmp_path, release)).config
    assert config.max_position_embeddings == length
    assert config.mla_rope_parameters["rope_type"] == kind and config.mla_rope_parameters["rope_theta"] == 10000.0
    if kind == "yarn":
        assert config.mla_rope_parameters["attention_factor"] == 0.1 * math.log(scaling["factor"]) + 1
    assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["factor"] == 32.0
    angular, factor = released_format.frequencies(release[1])
    found, found_factor = mla_frequencies(config, 1)
    torch.testing.assert_close(found.double(), torch.tensor(angular, dtype=torch.float64), atol=0, rtol=1e-6)
    assert found_factor == pytest.approx(factor, rel=1e-12)


def test_configuration_is_ours(tmp_path: Path, qwen: Release) -> None:
    config = json.loads((imported(tmp_path, qwen) / "config.json").read_text())
    assert config["model_type"] == "hylo" and config["architectures"] == ["HyloForCausalLM"]
    assert config["mixers"] == ["gated_deltanet", "mla", "gated_deltanet"] and config["gdn_expand_v"] == 2
    assert config["qk_norm"] and config["base_model_type"] == "qwen3" and config["eos_token_id"] == 2
    assert config["dtype"] == "float32" and "released_config" not in config


def test_tensors_keep_their_values_and_shards_their_dtype(tmp_path: Path, llama: Release) -> None:
    tensors = load_file(imported(tmp_path, llama, dtype="bfloat16") / "model.safetensors")
    assert len(tensors) == len(llama[0]) and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for ours, theirs in (
        ("model.layers.1.mixer.o_proj.weight", "model.layers.1.mla.out_proj.weight"),
        ("model.layers.0.mixer.o_proj.weight", "model.layers.0.gdn.o_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    ):
        assert torch.equal(tensors[ours], llama[0][theirs].bfloat16())


def test_companions_come_along_and_progress_is_told(tmp_path: Path, llama: Release) -> None:
    source = released_format.write(tmp_path / "release", llama)
    (source / "tokenizer.json").write_text("{}")
    told: list[tuple[int, int]] = []
    import_released(source, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert told == [(i + 1, len(llama[0])) for i in range(len(llama[0]))]


def test_a_stored_head_is_never_tied_again(tmp_path: Path, llama: Release) -> None:
    release = changed(llama)
    release[0]["lm_head.weight"] = release[0]["model.embed_tokens.weight"].clone()
    assert release[2]["tie_word_embeddings"]
    model = load_model(imported(tmp_path, release))
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_not_stored_is_tied_if_the_base_says_so(tmp_path: Path, llama: Release, tied: bool) -> None:
    release = changed(llama)
    del release[0]["lm_head.weight"]
    release[2]["tie_word_embeddings"] = tied
    if not tied:
        return refused(tmp_path, release, "lacks lm_head.weight")
    model = load_model(imported(tmp_path, release))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def with_block_keys(block: str, keys: dict[str, Any]) -> Release:
    tensors, hybrid, base = released_format.random_release("llama", block)
    taken_out = dict.fromkeys(released_format.BLOCKS[block], ...)
    return changed((tensors, hybrid, base), **(taken_out | keys))


@pytest.mark.parametrize("block, mixer", [("gdn", "gated_deltanet"), ("mamba", "mamba2")])
def test_tensors_decide_where_keys_name_both_blocks(tmp_path: Path, block: str, mixer: str) -> None:
    release = with_block_keys(block, released_format.GDN | released_format.MAMBA)
    assert load_model(imported(tmp_path, release)).config.mixers == [mixer, "mla", mixer]


def test_keys_decide_which_block(tmp_path: Path) -> None:
    refused(tmp_path, with_block_keys("gdn", released_format.MAMBA), "lacks model.layers.0.mamba.", "unexpected")


def test_a_block_without_a_key_has_the_default_figures(tmp_path: Path) -> None:
    release = with_block_keys("mamba", {"ssm_cfg": {}, "d_inner": None})
    assert load_model(imported(tmp_path, release)).config.mamba_num_heads == 4


def test_keys_of_a_block_are_whole(tmp_path: Path) -> None:
    keys = {"ssm_cfg": {"ngroups": 4}, "d_inner": 64}
    refused(tmp_path, with_block_keys("mamba", keys), "lacks ssm_cfg.d_state, d_xb")


def test_layers_of_both_blocks_are_refused(tmp_path: Path) -> None:
    release = with_block_keys("gdn", {})
    release[0]["model.layers.0.mamba.D"] = torch.ones(4)
    refused(tmp_path, release, "both .gdn. and .mamba. tensors")


def test_all_layers_may_be_mla(tmp_path: Path) -> None:
    release = released_format.random_release("llama", "gdn", mla_layers=[0, 1, 2])
    assert load_model(imported(tmp_path, changed(release, gdn_num_heads=...))).config.mixers == ["mla"] * 3


OPTIONAL = [
    "hidden_act",
    "d_model",
    "rope_scaling",
    "rope_type",
    "use_lora_layer_norm",
    "use_full_kv_head",
    "attention_bias",
    "attention_dropout",
    "qkv_rank_divisor",
]


def test_what_has_a_default_may_be_left_out(tmp_path: Path, llama: Release) -> None:
    load_model(imported(tmp_path, changed(llama, **dict.fromkeys(OPTIONAL, ...))))


@pytest.mark.parametrize("key", sorted(set(released_format.TINY | released_format.GDN) - set(OPTIONAL)))
def test_missing_keys_are_named(tmp_path: Path, llama: Release, key: str) -> None:
    refused(tmp_path, changed(llama, **{key: ...}), "hybrid_config.json", f"lacks {key}")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"gdn_gate": 1, "rope_interleave": True}, "unknown keys: gdn_gate, rope_interleave"),
        ({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "beta": 1}}, "rope_scaling.beta"),
        ({"rope_scaling": {"factor": 4.0}}, "lacks rope_scaling.original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}}, "llama3"),
        ({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "default"}}, "yarn"),
        ({"rope_scaling": {"factor": 1.3, "original_max_position_embeddings": 64}}, "83.2"),
        ({"rope_scaling": {"factor": 0.5, "original_max_position_embeddings": 64}}, "rope_scaling.factor 0.5"),
        ({"rope_type": "su"}, "rope_type 'su'"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"kv_lora_rank": "20"}, "kv_lora_rank '20'"),
        ({"q_lora_rank": None}, "q_lora_rank None"),
        ({"use_lora_layer_norm": True, "use_full_kv_head": True}, "use_lora_layer_norm, use_full_kv_head"),
        ({"attention_bias": True}, "attention_bias"),
        ({"ssm_cfg": {"repeat_kv_before_conv": True}}, "ssm_cfg.repeat_kv_before_conv"),
        ({"hidden_size": 64, "n_layer": 4}, "hidden_size 64 (there 32)"),
        ({"hidden_size": 64, "n_layer": 4}, "n_layer 4 (there 3)"),
        ({"d_model": 48}, "d_model 48"),
        ({"intermediate_size": 44}, "intermediate_size 44"),
        ({"num_attention_heads": 8}, "num_attention_heads 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mla_layers": [1, 3]}, "mla_layers [1, 3]"),
        ({"mla_layers": [1, 1]}, "mla_layers [1, 1]"),
        ({"qk_nope_head_dim": 12}, "qk_nope_head_dim is 12"),
        ({"kv_lora_rank": 24}, "mla.kv_a_proj_with_mqa.weight, model.layers.1.mla.kv_b_proj.weight in another shape"),
        ({"gdn_head_dim": 8}, "model.layers.0.gdn.q_proj.weight"),
    ],
)
def test_other_bad_figures_are_named(tmp_path: Path, llama: Release, changes: dict[str, Any], named: str) -> None:
    refused(tmp_path, changed(llama, **changes), named)


def test_lenient_keeps_unknown_keys(tmp_path: Path, llama: Release) -> None:
    scaling = llama[1]["rope_scaling"] | {"mscale": 1.0}
    out = imported(tmp_path, changed(llama, rope_scaling=scaling, gdn_mode="chunk"), lenient=True)
    assert load_model(out).config.released_config == {"gdn_mode": "chunk", "rope_scaling.mscale": 1.0}


def test_missing_unexpected_and_misshaped_tensors_are_listed(tmp_path: Path, llama: Release) -> None:
    release = changed(llama)
    del release[0]["model.layers.1.mla.q_a_proj.weight"], release[0]["model.norm.weight"]
    release[0]["model.layers.1.mla.q_a_layernorm.weight"] = torch.ones(24)
    release[0]["model.layers.2.gdn.A_log"] = torch.ones(3)
    refused(
        tmp_path,
        release,
        "lacks model.layers.1.mla.q_a_proj.weight, model.norm.weight;",
        "holds unexpected model.layers.1.mla.q_a_layernorm.weight;",
        "has model.layers.2.gdn.A_log in another shape ([3], not [2])",
    )


def test_tensors_that_are_not_finite_are_named(tmp_path: Path, llama: Release) -> None:
    release = changed(llama)
    release[0]["model.norm.weight"] = torch.full((32,), float("nan"))
    refused(tmp_path, release, "model.norm.weight")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_and_pickled_weights_are_named(tmp_path: Path, llama: Release, name: str) -> None:
    source = released_format.write(tmp_path / "release", llama)
    weights = (source / "model.safetensors").rename(source / name)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(HyloError, match=name):
        import_released(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_rope_buffers_are_left_out(tmp_path: Path, llama: Release) -> None:
    release = changed(llama)
    release[0]["model.layers.1.mla.rotary_emb.inv_freq"] = torch.ones(4)
    load_model(imported(tmp_path, release))


def renamed_norms(qwen: Release, q_norm: str, k_norm: str) -> Release:
    tensors = {name.replace(Q_NORM, q_norm).replace(K_NORM, k_norm): tensor for name, tensor in qwen[0].items()}
    return tensors, *qwen[1:]


@pytest.mark.parametrize(
    "renames",
    [
        {"mla.query_norm.weight": Q_NORM, "mla.key_norm.weight": K_NORM},
        {"query_norm.weight": "q_norm.weight", "model.layers.1.mla.key_norm.weight": "model.layers.1." + K_NORM},
        {"mla.query_norm.weight": "mixer.q_norm.weight", "mla.key_norm.weight": "mixer.k_norm.weight"},
    ],
)
def test_tensors_can_be_renamed(tmp_path: Path, qwen: Release, renames: dict[str, str]) -> None:
    release = renamed_norms(qwen, "mla.query_norm.weight", "mla.key_norm.weight")
    found = logits(load_model(imported(tmp_path, release, renames=renames), dtype=torch.float64))
    torch.testing.assert_close(found, released_format.forward(qwen, TOKENS), atol=2e-5, rtol=0)


def test_renames_that_do_not_fit_are_named(tmp_path: Path, qwen: Release) -> None:
    other = renamed_norms(qwen, "mla.query_norm.weight", "mla.key_norm.weight")
    cases: list[tuple[Release, dict[str, str], str]] = [
        (other, {}, "rename with --map OLD=NEW"),
        (qwen, {"mla.query_norm.weight": Q_NORM}, "--map mla.query_norm.weight=mla.q_norm.weight matches no tensor"),
        (qwen, {"_norm.weight": Q_NORM}, "matches no tensor"),  # names are cut at dots
        (qwen, {Q_NORM: K_NORM}, "both read as model.layers.1.mla.k_norm.weight"),
        (qwen, {Q_NORM: "mixer.k_norm.weight"}, "both read as model.layers.1.mixer.k_norm.weight"),
        (
            qwen,
            {Q_NORM: "mla.norm.weight"},
            "unexpected model.layers.1.mla.q_norm.weight (read as model.layers.1.mla.norm.weight)",
        ),
    ]
    for i, (release, renames, named) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        refused(tmp_path / str(i), release, named, renames=renames)


def test_other_directories_and_options_are_refused(
    tmp_path: Path, llama: Release, write_base: Callable[..., Path]
) -> None:
    base = write_base()
    with pytest.raises(HyloError, match="no released checkpoint: it holds no hybrid_config.json"):
        import_released(base, tmp_path / "out")
    with pytest.raises(HyloError, match="does not exist"):
        import_released(tmp_path / "nowhere", tmp_path / "out")
    source = released_format.write(tmp_path / "release", llama)
    with pytest.raises(HyloError, match="RoPE pairing neox is not known"):
        import_released(source, tmp_path / "out", rope_pairing="neox")  # type: ignore[arg-type]
    with pytest.raises(HyloError, match="dtype float8 is not known"):
        import_released(source, tmp_path / "out", dtype="float8")
    with pytest.raises(HyloError, match="exists already"):
        import_released(source, base)
    assert not (tmp_path / "out").exists()


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **{"hidden_size": 2048, "d_model": 2048, "intermediate_size": 8192, "n_layer": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "kv_lora_rank": 128, "q_lora_rank": 1344},
        **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "gdn_num_heads": 6, "gdn_head_dim": 256},
        **{"ssm_cfg": {"expand": 1, "ngroups": 32, "d_state": 64}, "d_inner": 2048, "d_xb": 512},
    },
    "llama-3b": {
        **{"hidden_size": 3072, "d_model": 3072, "intermediate_size": 8192, "n_layer": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "kv_lora_rank": 128, "q_lora_rank": 1536},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128, "gdn_num_heads": 9, "gdn_head_dim": 256},
        **{"ssm_cfg": {"expand": 1, "ngroups": 24, "d_state": 128}, "d_inner": 3072, "d_xb": 1024},
    },
    "qwen3-1.7b": {
        **{"hidden_size": 2048, "d_model": 2048, "intermediate_size": 6144, "n_layer": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "kv_lora_rank": 256, "q_lora_rank": 1344},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128, "gdn_num_heads": 6, "gdn_head_dim": 256},
        **{"ssm_cfg": {"expand": 1, "ngroups": 16, "d_state": 128}, "d_inner": 2048, "d_xb": 1024},
    },
}
MLA_LAYERS = {
    "llama-1b": [[1, 5, 10, 14], list(range(0, 16, 2))],
    "llama-3b": [[0, 5, 10, 16, 21, 26], list(range(0, 28, 2))],
    "qwen3-1.7b": [[1, 5, 9, 13, 17, 21, 25], list(range(0, 28, 2))],
}
TOTALS = {
    ("llama-1b", 4, "gdn"): 1_673_797_776,
    ("llama-3b", 14, "gdn"): 3_971_381_500,
    ("qwen3-1.7b", 14, "mamba"): 2_065_541_280,
}


@pytest.mark.parametrize("block", ["gdn", "mamba"])
@pytest.mark.parametrize("model, layers", [(model, layers) for model in PUBLISHED for layers in MLA_LAYERS[model]])
def test_published_geometries(tmp_path: Path, model: str, layers: list[int], block: str) -> None:
    """Names and shapes of whole releases, from configurations that carry both blocks' keys; no weights."""
    hybrid = released_format.TINY | PUBLISHED[model] | {"mla_layers": layers}
    family, vocab_size = ("qwen3", 151936) if model == "qwen3-1.7b" else ("llama", 128256)
    base = released_format.base_config(family, hybrid, hybrid["v_head_dim"], vocab_size)
    (tmp_path / "hybrid_config.json").write_text(json.dumps(hybrid))
    (tmp_path / "config.json").write_text(json.dumps(base))
    expected = released_format.shapes(hybrid, base, block)
    read, _ = read_hybrid_config(tmp_path)
    config = released_config(tmp_path, read, read_base_config(tmp_path), set(expected))
    assert {tensor.name: tensor.shape for tensor in released_tensors(config).values()} == expected
    total = sum(math.prod(shape) for shape in expected.values())
    assert total == TOTALS.get((model, len(layers), block), total)
