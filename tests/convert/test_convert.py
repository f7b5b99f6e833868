"""The written directory: complete, loadable without a missing key, in the dtype and shards asked for, reproducible."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo.convert import Initialisation, convert, measure_ranks, planned_config, read_base, with_energy
from hylo.convert.mla import split_rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model
from hylo.plan import make_plan

WriteBase = Callable[..., Path]
LAYOUTS = ["3A", "3MLA", "1MLA2GDN", "1A2M2", "3GDN"]


def converted(base: Path, layout: str = "1MLA2GDN", name: str = "out", **options: Any) -> Path:
    out = base.parent / name
    how = Initialisation(options.pop("init", "pairs-fast"), linear_steps=2)
    convert(base, out, make_plan(base, layout), how, **options)
    return out


@pytest.mark.parametrize("init", ["recipe", "pairs-stride", "pairs-fast", "pairs-best", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_key_is_there_and_counts_are_the_plans(
    write_base: WriteBase, family: str, layout: str, init: str
) -> None:
    base = write_base(family)
    out = converted(base, layout, init=init)
    model, info = HyloForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == make_plan(base, layout).parameters
    assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_all_but_the_mixers_is_the_bases(write_base: WriteBase) -> None:
    base = write_base(mlp_bias=True)
    theirs, ours = load_file(base / "model.safetensors"), load_file(converted(base) / "model.safetensors")
    kept = [name for name in ours if ".mixer." not in name]
    assert sorted(kept) == sorted(name for name in theirs if ".self_attn." not in name)
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)


def test_configuration_is_the_bases_and_the_plans(write_base: WriteBase) -> None:
    base = write_base("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    for init, theta in (("recipe", 5e5), ("pairs-stride", 5e5), ("pairs-fast", 5e5**0.25), ("random", 5e5**0.25)):
        config = json.loads((converted(base, init=init, name=init) / "config.json").read_text())
        assert config["mla_rope_parameters"] == {"rope_type": "default", "rope_theta": pytest.approx(theta)}
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert config["model_type"] == "hylo" and config["architectures"] == ["HyloForCausalLM"]
    assert config["qk_norm"] and config["base_model_type"] == "qwen3"
    assert config["mixers"] == ["gated_deltanet", "mla", "gated_deltanet"]
    assert config["max_position_embeddings"] == 256 and config["eos_token_id"] == 2
    assert config["qk_rope_head_dim"] == 4 and config["kv_lora_rank"] == 16


def test_tied_heads_stay_tied(write_base: WriteBase) -> None:
    out = converted(write_base(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = load_model(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_shards_hold_the_same_tensors(write_base: WriteBase) -> None:
    base = write_base(shard="20KB")
    whole = load_file(converted(base) / "model.safetensors")
    out = converted(base, name="sharded", shard_bytes=30_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == shard.name
            assert torch.equal(tensor, whole.pop(name))
    assert not whole
    load_model(out)


def test_dtypes(write_base: WriteBase) -> None:
    base = write_base(dtype=torch.bfloat16)
    stated, wide = converted(base), converted(base, name="wide", dtype="float32")
    assert {t.dtype for t in load_file(stated / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((stated / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}
    narrow = load_file(stated / "model.safetensors")
    for name, tensor in load_file(wide / "model.safetensors").items():  # arithmetic is float32 either way
        assert torch.equal(tensor.bfloat16(), narrow[name])


def test_seeds_decide_what_is_left_to_chance(write_base: WriteBase) -> None:
    base = write_base()
    before = torch.random.get_rng_state()
    first, again, other = (
        load_file(converted(base, "1MLA2GDN", name, seed=seed) / "model.safetensors")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    gates = "model.layers.{}.mixer.g_proj.weight"
    assert not torch.equal(first[gates.format(0)], other[gates.format(0)])
    assert not torch.equal(first[gates.format(0)], first[gates.format(2)])


def test_random_mixers_know_nothing_of_the_base(write_base: WriteBase) -> None:
    base = write_base()
    tensors = load_file(converted(base, "1A2GDN", init="random") / "model.safetensors")
    theirs = load_file(base / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert not torch.equal(tensors["model.layers.1.mixer.q_proj.weight"], theirs)


def test_tokenizer_and_generation_files_come_along(write_base: WriteBase) -> None:
    base = write_base()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_args.bin"):
        (base / name).write_text(name)
    out = converted(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "training_args.bin").exists()


def test_progress_is_told_layer_by_layer(write_base: WriteBase) -> None:
    told: list[tuple[int, int]] = []
    converted(write_base(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_nothing_is_left_where_conversion_fails(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"].fill_(float("nan"))
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(HyloError, match="v_proj"):
        converted(base)
    assert [path.name for path in tmp_path.iterdir()] == [base.name]


def test_an_output_that_exists_is_kept(write_base: WriteBase) -> None:
    base = write_base()
    (base.parent / "out").mkdir()
    with pytest.raises(HyloError, match="exists already"):
        converted(base)


def test_plans_of_other_bases_are_refused(write_base: WriteBase) -> None:
    base = write_base()
    plan = make_plan(base, "1MLA2GDN")
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 512})
    )
    with pytest.raises(HyloError, match="plan again"):
        convert(base, base.parent / "out", plan)


def test_initialisations_that_do_not_exist_or_fit_are_named(write_base: WriteBase) -> None:
    llama, qwen3 = write_base(), write_base("qwen3")
    plan = make_plan(llama, "1MLA2GDN", geometry={"qk_rope_head_dim": 6})
    folded = make_plan(qwen3, "1MLA2GDN", k_norm="folded")
    Initialisation("pairs-fast").check(plan)
    Initialisation(calibration_BT=torch.zeros(1, 8, dtype=torch.long)).check(folded)
    for how, given, named in (
        (Initialisation("pairs-stride"), plan, "qk_rope_head_dim 6 does not divide head_dim 16"),
        (Initialisation("pairs"), plan, "init pairs is not known"),
        (Initialisation("recipe", "copied"), plan, "linear init copied is not known"),
        (Initialisation(rope_key="sum"), plan, "rope key sum is not known"),
        (Initialisation(linear_fraction=0.0), plan, "linear fraction 0.0"),
        (Initialisation(linear_init="calibrated"), plan, "needs activations; give calibration text"),
        (Initialisation(), make_plan(llama, "1MLA2GDN", k_norm="folded"), "llama has no key norm"),
        (Initialisation(), folded, "mean of 1/rms"),
        (Initialisation(rope_key="pca"), make_plan(qwen3, "1MLA2GDN"), "shared query norm"),
    ):
        with pytest.raises(HyloError, match=named):
            how.check(given)


def test_energy_decides_every_layers_rank(write_base: WriteBase) -> None:
    base = write_base()
    plan = make_plan(base, "2MLA1GDN")
    how = Initialisation("pairs-fast")
    plans, ranks = zip(*(with_energy(plan, how, share) for share in (0.5, 0.8, 1.0)), strict=True)
    assert plans[0].kv_lora_ranks is not None and plans[2].kv_lora_ranks is not None
    assert sum(plans[0].kv_lora_ranks) < sum(plans[2].kv_lora_ranks)
    assert plans[0].kv_bytes_per_token < plans[1].kv_bytes_per_token <= plans[2].kv_bytes_per_token
    checkpoint, config = read_base(base), planned_config(plans[1], "pairs-fast")
    assert ranks[1] == measure_ranks(checkpoint, config, how)
    for measured in ranks[1]:
        assert measured.kv_rank == config.kv_rank(measured.layer)
        assert measured.kv_energy >= 0.8
        attention = checkpoint.attention(measured.layer)
        kept = torch.cat((attention.k[:, split_rows(16, 4, "pairs-fast")[0]], attention.v), 1).flatten(0, 1)
        energy = torch.linalg.svdvals(kept).square()
        assert measured.kv_energy == pytest.approx((energy[: measured.kv_rank].sum() / energy.sum()).item(), rel=1e-4)
        assert energy[: measured.kv_rank - 8].sum() / energy.sum() < 0.8  # eight fewer would not do
    convert(base, base.parent / "out", plans[1], how)
    model = load_model(base.parent / "out")
    assert model.num_parameters() == plans[1].parameters
    for share, named in ((1.5, "is no share"), (0.0, "is no share")):
        with pytest.raises(HyloError, match=named):
            with_energy(plan, how, share)
    with pytest.raises(HyloError, match="for MLA layers"):
        with_energy(make_plan(base, "3GDN"), how, 0.9)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_calibrated_conversions_load(write_base: WriteBase, family: str) -> None:
    base = write_base(family)
    plan = make_plan(base, "1MLA2M2", k_norm="folded" if family == "qwen3" else "exact")
    how = Initialisation("pairs-best", calibration_BT=torch.randint(3, 61, (3, 20)), linear_steps=2)
    convert(base, base.parent / "out", plan, how)
    model = load_model(base.parent / "out")
    assert model.num_parameters() == plan.parameters
    assert [entry is None for entry in model.config.mla_inv_freq] == [True, False, True]
    assert model(torch.arange(12)[None]).logits.isfinite().all()
