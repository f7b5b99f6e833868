"""Conversion under `positions` and `attention_gate`: what changes in the directory, what does not, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import hylo
from safetensors.torch import load_file

from hylo.convert import Initialisation, convert, planned_config, read_base, with_energy
from hylo.convert.assemble import assemble
from hylo.convert.calibration import samples_of
from hylo.convert.linear_fit import outputs_of
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.estimate import stage_memory
from hylo.export import export_portable
from hylo.modeling.loading import load_model
from hylo.plan import Plan, make_plan, plan_of

WriteBase = Callable[..., Path]
GEOMETRY = {"gdn_num_heads": 2, "gdn_head_dim": 16, "gdn_expand_v": 1}


def planned(base: Path, layout: str = "2MLA1GDN", **options: Any) -> Plan:
    return make_plan(base, layout, geometry=GEOMETRY, **options)


def converted(base: Path, name: str, layout: str = "2MLA1GDN", how: Any = None, **options: Any) -> Path:
    out = base.parent / name
    convert(base, out, planned(base, layout, **options), how or Initialisation(linear_steps=2))
    return out


@pytest.mark.parametrize("positions", ["none", "hype"])
@pytest.mark.parametrize("layout", ["2MLA1GDN", "1A2M2", "1MLA2KDA"])
def test_positions_change_no_weight(write_base: WriteBase, layout: str, positions: str) -> None:
    base = write_base()
    rope, other = (converted(base, name, layout, positions=name) for name in ("rope", positions))
    before, after = (load_file(directory / "model.safetensors") for directory in (rope, other))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(3, 40)[None]
    assert load_model(other).config.positions == positions
    assert (load_model(other)(ids).logits - load_model(rope)(ids).logits).abs().max() > 1e-3


def test_samples_are_the_bases_own_and_linear_blocks_are_fitted_as_they_will_run(write_base: WriteBase) -> None:
    base, ids = write_base(), torch.randint(3, 61, (4, 24))
    checkpoint = read_base(base)
    plans = {name: planned(base, positions=name) for name in ("rope", "none", "hype")}
    samples = {
        name: next(iter(samples_of(checkpoint, planned_config(plan, "pairs-fast"), ids, [2])))
        for name, plan in plans.items()
    }
    for name in ("none", "hype"):
        for field in ("inputs_BTD", "outputs_BTD", "q_BTHd", "k_BTKd"):
            assert torch.equal(getattr(samples[name], field), getattr(samples["rope"], field))
    assert samples["rope"].rotary == samples["none"].rotary == {} and list(samples["hype"].rotary) == ["gated_deltanet"]

    out = base.parent / "hype"
    how = Initialisation(calibration_BT=ids, linear_steps=20)
    fits = convert(base, out, plans["hype"], how)
    assert all(fit.after < fit.before for fit in fits.values())
    (index,) = fits
    sample = list(samples_of(checkpoint, planned_config(plans["hype"], "pairs-fast"), ids, [index]))[0]
    model = load_model(out)
    with torch.no_grad():
        rotary = model.model.layer_inputs(sample.inputs_BTD)["rotary"]
        mixer = model.model.layers[index].mixer
        torch.testing.assert_close(outputs_of(mixer, sample), mixer(sample.inputs_BTD, None, rotary))
        error = (outputs_of(mixer, sample) - sample.outputs_BTD).square().mean().item()
    assert error == pytest.approx(fits[index].after, rel=1e-4)


@pytest.mark.parametrize("init", ["recipe", "pairs-fast", "pairs-best"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gate_changes_nothing_at_first(write_base: WriteBase, family: str, init: str) -> None:
    base, how = write_base(family), Initialisation(init)
    plain, gated = (
        converted(base, name, "2MLA1GDN", how, attention_gate=name == "gated") for name in ("plain", "gated")
    )
    model = load_model(gated)
    assert not model.model.layers[0].mixer.g_proj.weight.any()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, load_model(plain)(ids).logits)  # halves and doubles are exact
    plan = planned(base, attention_gate=True)
    assert plan.parameters == model.num_parameters() == plan_of(gated, model.config, "float32").parameters
    width, heads = model.config.hidden_size, 4 * 16
    assert plan.parameters - planned(base).parameters == 2 * width * heads
    assert plan.kv_bytes_per_token == planned(base).kv_bytes_per_token
    record = json.loads((gated / "initialisation.json").read_text())
    assert record["attention_gate"] and record["positions"] == "rope"


def test_pairs_found_layer_by_layer(write_base: WriteBase) -> None:
    """Their frequencies are not known yet when the base is sampled."""
    base, how = write_base(), Initialisation("pairs-best", calibration_BT=torch.arange(48).view(2, 24), linear_steps=1)
    model = load_model(converted(base, "out", how=how, positions="hype"))
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_a_random_gate_is_random(write_base: WriteBase) -> None:
    out = converted(write_base(), "out", "3MLA", Initialisation("random"), attention_gate=True)
    assert load_model(out).model.layers[0].mixer.g_proj.weight.std() > 0.01


def test_ranks_by_energy_keep_both(write_base: WriteBase) -> None:
    plan, _ = with_energy(planned(write_base(), positions="none", attention_gate=True), Initialisation(), 0.9)
    assert (plan.positions, plan.attention_gate) == ("none", True)


def test_assembling(write_base: WriteBase) -> None:
    """The gate comes with the MLA layers; positions must be those of both."""
    base = write_base()
    growing = converted(base, "mla", "3MLA", positions="hype", attention_gate=True)
    linear = converted(base, "linear", "3GDN", positions="hype")
    assemble(growing, linear, base.parent / "out", [0])
    direct = converted(base, "direct", "1MLA2GDN", positions="hype", attention_gate=True)
    model, whole = load_model(base.parent / "out"), load_model(growing)
    assert model.config.attention_gate and model.config.positions == "hype"
    assert model.num_parameters() == load_model(direct).num_parameters()
    assert torch.equal(model.model.layers[0].mixer.g_proj.weight, whole.model.layers[0].mixer.g_proj.weight)
    with pytest.raises(HyloError, match="positions is hype in .* and rope in"):
        assemble(growing, converted(base, "rotated", "3GDN"), base.parent / "other", [0])


def test_a_portable_export(write_base: WriteBase, tmp_path: Path) -> None:
    out = converted(write_base(), "out", positions="hype", attention_gate=True)
    export_portable(out, tmp_path / "portable")
    config = json.loads((tmp_path / "portable" / "config.json").read_text())
    assert config["positions"] == "hype" and config["attention_gate"]
    assert "query_factor" in (tmp_path / "portable" / "hylo_modeling_rope.py").read_text()


def test_memory_of_training_counts_the_gate(write_base: WriteBase) -> None:
    base = write_base()
    training = Training.model_validate({"tokens": 64, "length": 16, "rows": 2, "learning_rate": 1e-3})
    student, gated = (
        planned_config(planned(base, positions="hype", attention_gate=gate), "recipe") for gate in (False, True)
    )
    without, with_gate = (
        stage_memory(training, config, read_base(base).config, torch.float32, 1, True).total
        for config in (student, gated)
    )
    assert with_gate > without


def test_the_command_and_its_refusals(write_base: WriteBase, tmp_path: Path) -> None:
    base, out = write_base(), tmp_path / "out"
    options = ("--layout", "2MLA1GDN", "--set", "gdn_num_heads=2", "--set", "gdn_head_dim=16")
    done = hylo("convert", base, out, *options, "--positions", "hype", "--attention-gate")
    assert done.returncode == 0 and "positions: hype, MLA's output gated" in done.stdout
    assert load_model(out).config.attention_gate
    assert "positions: hype, MLA's output gated" in hylo("plan", out).stdout
    for arguments, said in (
        (("plan", out, "--positions", "none"), "settled"),
        (("plan", base, "--layout", "3A", "--attention-gate"), "the attention gate is for MLA layers"),
        (("convert", base, tmp_path / "no", "--layout", "3GDN", "--attention-gate"), "and layout 3GDN has none"),
    ):
        refused = hylo(*arguments)
        assert refused.returncode and said in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    with pytest.raises(HyloError, match="gdn_head_dim is 15; positions hype rotates pairs"):
        make_plan(base, "2MLA1GDN", geometry={"gdn_head_dim": 15}, positions="hype")
    with pytest.raises(HyloError, match="positions alibi are not known"):
        make_plan(base, "2MLA1GDN", positions="alibi")
