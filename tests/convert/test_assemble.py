"""A hybrid picked from two whole students is the one that conversion would have written at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo.convert import Initialisation, convert
from hylo.convert.assemble import assemble
from hylo.errors import HyloError
from hylo.layout import LETTERS
from hylo.modeling.loading import load_model
from hylo.plan import make_plan

WriteBase = Callable[..., Path]
LETTER = {mixer: letters for letters, mixer in LETTERS.items()}


def converted(base: Path, layout: str, name: str, init: Any = "pairs-fast", **options: Any) -> Path:
    attention_layers = options.pop("attention_layers", None)
    ranks = options.pop("kv_lora_ranks", None)
    plan = make_plan(base, layout, attention_layers, options.pop("geometry", {}), kv_lora_ranks=ranks)
    convert(base, base.parent / name, plan, Initialisation(init), **options)
    return base.parent / name


def files(directory: Path) -> dict[str, bytes]:
    """All but what a conversion says of itself."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "initialisation.json"}


@pytest.mark.parametrize("init", ["pairs-fast", "pairs-best"])
@pytest.mark.parametrize("mixer", ["attention", "mla"])
@pytest.mark.parametrize("linear", ["gated_deltanet", "mamba2", "kda"])
def test_picks_what_conversion_writes_at_once(write_base: WriteBase, linear: str, mixer: str, init: str) -> None:
    base = write_base("qwen3")
    growing = converted(base, f"3{LETTER[mixer]}", "growing", init)
    flat = converted(base, f"3{LETTER[linear]}", "linear", init)
    for picked in ([1], [2, 0]):
        layout = f"{len(picked)}{LETTER[mixer]}{3 - len(picked)}{LETTER[linear]}"
        out = base.parent / layout
        assemble(growing, flat, out, picked)
        assert files(out) == files(converted(base, layout, f"{layout}-direct", init, attention_layers=picked))


def test_a_rank_for_every_layer_is_kept_where_the_layer_is(write_base: WriteBase) -> None:
    base = write_base()
    mla = converted(base, "3MLA", "mla", kv_lora_ranks=[8, 16, 24])
    linear = converted(base, "3GDN", "linear", geometry={"gdn_num_heads": 2, "kv_lora_rank": 8})
    assemble(mla, linear, base.parent / "out", [1])
    config = load_model(base.parent / "out").config
    assert config.kv_lora_ranks == [0, 16, 0] and config.gdn_num_heads == 2
    assert config.kv_lora_rank == load_model(mla).config.kv_lora_rank != 8


def changed(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, directory / "model.safetensors", metadata={"format": "pt"})


def test_the_final_norm_goes_with_the_last_layer(write_base: WriteBase) -> None:
    base, norm = write_base(), "model.norm.weight"
    mla, linear = converted(base, "3MLA", "mla"), converted(base, "3GDN", "linear")
    changed(mla, norm, lambda weight: weight * 2)
    for picked, donor in (([1], linear), ([2], mla)):
        assemble(mla, linear, base.parent / str(picked), picked)
        got = load_file(base.parent / str(picked) / "model.safetensors")[norm]
        assert torch.equal(got, load_file(donor / "model.safetensors")[norm])


def test_shards_companions_and_progress(write_base: WriteBase) -> None:
    base = write_base(dtype=torch.bfloat16)
    (base / "tokenizer_config.json").write_text("{}")
    mla, linear = converted(base, "3MLA", "mla"), converted(base, "3GDN", "linear")
    seen: list[tuple[int, int]] = []
    out = base.parent / "out"
    assemble(mla, linear, out, [1], lambda done, total: seen.append((done, total)), shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert seen == [(i, len(index["weight_map"])) for i in range(1, len(seen) + 1)]
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert load_model(out, torch.bfloat16).config.dtype == torch.bfloat16


def test_bad_inputs_are_named(write_base: WriteBase) -> None:
    base = write_base()
    mla, linear = converted(base, "3MLA", "mla"), converted(base, "3GDN", "linear")
    out = base.parent / "out"

    def fails(match: str, first: Path = mla, second: Path = linear, picked: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(HyloError, match=match) as caught:
            assemble(first, second, out, picked)
        assert not out.exists() and "\n" not in str(caught.value)
        assert not list(out.parent.glob(".out*"))

    fails("layer 3 is none of .*mla; indices run from 0 to 2", picked=(1, 3))
    fails(r"attention layers \[1, 1\] name a layer twice", picked=(1, 1))
    fails("layer 0 of .*mla is mla, not a linear block", second=mla)
    fails("layer 1 of .*linear is gated_deltanet, not MLA or attention", first=linear)
    fails("holds a llama model, not a hylo one; convert it first", second=base)
    fails("does not exist", first=base.parent / "nowhere")

    narrow = converted(base, "3GDN", "narrow", dtype="bfloat16")
    fails("dtype is float32 in .*mla and bfloat16 in .*narrow", second=narrow)
    changed(linear, "model.embed_tokens.weight", lambda weight: weight + 1)
    fails("differ in model.embed_tokens.weight")
    (linear / "model.safetensors").write_bytes((linear / "model.safetensors").read_bytes()[:-9])
    fails("not a whole safetensors file")
    narrower = converted(base, "3GDN", "other")
    (narrower / "config.json").write_text((narrower / "config.json").read_text().replace("256", "128"))
    fails("max_position_embeddings is 256 in .*mla and 128 in .*other; convert and align both alike", second=narrower)

    with pytest.raises(HyloError, match="exists already"):
        assemble(mla, converted(base, "3GDN", "whole"), narrow, [1])
