"""initialisation.json: the energies of the very SVDs that the conversion cut, and the options it was made with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hylo.convert import Initialisation, convert, measure_ranks, planned_config, read_base
from hylo.convert.mla import keys_and_values, split_rows
from hylo.plan import make_plan

WriteBase = Callable[..., Path]


def record_of(base: Path, layout: str, how: Initialisation, ranks: list[int] | None = None) -> dict[str, Any]:
    out = base.parent / "out"
    convert(base, out, make_plan(base, layout, kv_lora_ranks=ranks), how, seed=3)
    record: dict[str, Any] = json.loads((out / "initialisation.json").read_text())
    return record


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("family, init", [("llama", "pairs-fast"), ("qwen2", "recipe"), ("qwen3", "pairs-best")])
def test_energies_are_those_that_a_rank_report_measures(
    write_base: WriteBase, family: str, init: str, calibrated: bool
) -> None:
    base = write_base(family)
    ids = torch.randint(3, 61, (3, 20)) if calibrated else None
    how = Initialisation(init, calibration_BT=ids, linear_steps=2)
    plan = make_plan(base, "2MLA1GDN", kv_lora_ranks=[8, 8, 24])
    measured = measure_ranks(read_base(base), planned_config(plan, init), how)
    layers = record_of(base, "2MLA1GDN", how, [8, 8, 24])["layers"]
    assert [(layer["layer"], layer["kv_rank"]) for layer in layers] == [(m.layer, m.kv_rank) for m in measured]
    for layer, by_report in zip(layers, measured, strict=True):
        assert layer == pytest.approx(by_report._asdict(), rel=1e-5)
        assert 0 < layer["kv_energy"] < 1 and 0 < layer["q_energy"] <= 1


def test_energy_is_what_the_written_factors_keep(write_base: WriteBase) -> None:
    base = write_base()
    (layer,) = record_of(base, "1MLA2GDN", Initialisation("pairs-fast", rope_key="mean"))["layers"]
    tensors = load_file(base.parent / "out" / "model.safetensors")
    name = f"model.layers.{layer['layer']}.mixer."
    down = tensors[name + "kv_a_proj_with_mqa.weight"][: layer["kv_rank"]]
    attention = read_base(base).attention(layer["layer"])
    whole = keys_and_values(attention, split_rows(16, 4, "pairs-fast")[0])
    kept = (tensors[name + "kv_b_proj.weight"] @ down).square().sum() / whole.square().sum()
    assert layer["kv_energy"] == pytest.approx(kept.item(), rel=1e-4)
    q = tensors[name + "q_b_proj.weight"] @ tensors[name + "q_a_proj.weight"]
    assert layer["q_energy"] == pytest.approx((q.square().sum() / attention.q.square().sum()).item(), rel=1e-4)


def test_options_and_fits_are_recorded(write_base: WriteBase) -> None:
    ids = torch.randint(3, 61, (2, 20))
    record = record_of(write_base(), "1MLA2GDN", Initialisation(calibration_BT=ids, linear_steps=2))
    told = {
        key: record[key] for key in ("init", "rope_key", "linear_init", "calibration_tokens", "linear_steps", "seed")
    }
    assert told == {
        "init": "pairs-best",
        "rope_key": "pca",
        "linear_init": "calibrated",
        "calibration_tokens": 40,
        "linear_steps": 2,
        "seed": 3,
    }
    assert record["base"] == {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    assert record["geometry"]["qk_rope_head_dim"] == 4
    assert [fit["layer"] for fit in record["fits"]] == [0, 2]
    assert all(0 < fit["after"] <= fit["before"] for fit in record["fits"])


def test_mixers_drawn_at_random_keep_nothing(write_base: WriteBase) -> None:
    record = record_of(write_base(), "1MLA2GDN", Initialisation("random"))
    assert (record["init"], record["layers"], record["fits"]) == ("random", [], [])
