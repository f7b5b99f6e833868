"""A whole run on a tiny base, through the command line: what it writes, that it goes on, and what bad input gets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import hylo
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hylo.modeling import HyloForCausalLM

GEOMETRY = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12}


def write_recipe(path: Path, base: Path, text: Path, **changes: object) -> Path:
    stage = {"length": 32, "rows": 2, "tokens": 256, "learning_rate": 1e-3}
    recipe = {
        "base": str(base),
        "layout": "1MLA2GDN",
        "geometry": GEOMETRY,
        "data": {"text": [str(text)], "facts": 0.5},
        "stages": [stage | {"objective": "layers"}, stage | {"length": 64}, stage | {"length": 128, "rows": 1}],
        "yarn_original_length": 32,
        "evaluate": {"lengths": [256], "answers": 16, "tokens": 256},
        "controls": True,
    } | changes
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder / "recipe.yaml", tiny_base, text_file)
    done = hylo("upcycle", recipe, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_every_stage_leaves_a_complete_model_directory(run: Path) -> None:
    for name in ("converted", "aligned", "extended-64", "extended-128", "control/extended-128"):
        model, info = HyloForCausalLM.from_pretrained(run / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], name
        assert model.config.mixers == ["gated_deltanet", "mla", "gated_deltanet"]
        assert (run / name / "tokenizer.json").exists()


def test_each_stage_saves_its_length_and_yarn_factor(run: Path) -> None:
    def config(name: str) -> dict:
        return json.loads((run / name / "config.json").read_text())

    assert config("aligned")["mla_rope_parameters"]["rope_type"] == "default"
    for name, factor in (("extended-64", 2.0), ("extended-128", 4.0)):
        assert config(name)["mla_rope_parameters"]["factor"] == factor
    assert config("extended-128")["max_position_embeddings"] == 128


def test_the_report_has_every_stage(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["teacher", "converted", "aligned", "extended", "control", "no_alignment"]
    for stage in report["stages"]:
        assert {"needle", "kl", "perplexity"} <= stage["metrics"].keys()
        assert stage["name"] == "teacher" or stage["metrics"]["kl"]["256"] > 0
    plan = json.loads((run / "plan.json").read_text())
    assert report["kv_percent_of_base"] == plan["kv_percent_of_base"] == pytest.approx(100 * 12 / (3 * 2 * 2 * 16))
    assert len(report["training"]["align"]) == 4
    assert "<html" in (run / "report.html").read_text()


def test_metrics_are_kept_as_jsonl_and_tensorboard(run: Path) -> None:
    steps = [json.loads(line) for line in (run / "extended-64" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["loss"] > 0 and step["tokens_per_second"] > 0 for step in steps)
    assert list((run / "extended-64" / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "1MLA2KDA", "positions": "hype", "attention_gate": True},
        {"layout": "1A2M2", "positions": "none"},
    ],
    ids=str,
)
def test_other_blocks_and_positions_run_through_all_stages(
    tmp_path: Path, tiny_base: Path, text_file: Path, changes: dict[str, object]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_base, text_file, controls=False, **changes)
    done = hylo("upcycle", recipe, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model = HyloForCausalLM.from_pretrained(tmp_path / "out" / "extended-128")
    assert model.config.positions == changes["positions"]
    assert model.config.mla_rope_parameters["rope_type"] == "default"  # nothing for YaRN to stretch
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kl = [stage["metrics"]["kl"]["256"] for stage in report["stages"] if stage["name"] != "teacher"]
    assert all(0 < each < 1 for each in kl), kl


def test_a_second_call_skips_what_is_done_and_makes_what_is_missing(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "extended-128")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.safetensors")}
    done = hylo("upcycle", copy / "recipe.yaml", "--out", copy)
    assert done.returncode == 0, done.stderr
    assert "aligned: " in done.stdout and "skipped" in done.stdout
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    first, second = (HyloForCausalLM.from_pretrained(d / "extended-128").state_dict() for d in (run, copy))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_directory_belongs_to_one_recipe(run: Path, tmp_path: Path, tiny_base: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_base, text_file)
    done = hylo("upcycle", recipe, "--out", run, "--set", "stages.1.learning_rate=0.5")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another recipe" in done.stderr and "stages.1.learning_rate is 0.001 there, 0.5 here" in done.stderr


def test_stages_run_alone(run: Path, tmp_path: Path, tiny_base: Path, text_file: Path) -> None:
    training = ("--data", text_file, "--length", 64, "--tokens", 128, "--rows", 1, "--precision", "float32")
    sets = [part for key, value in GEOMETRY.items() for part in ("--set", f"{key}={value}")]
    for command in (
        ("convert", tiny_base, tmp_path / "a", "--layout", "1A2M2"),
        ("convert", tiny_base, tmp_path / "b", "--layout", "1MLA2GDN", "--mla-layers", "2", *sets),
        ("align", tiny_base, tmp_path / "b", tmp_path / "c", *training),
        ("extend", tmp_path / "c", tmp_path / "d", "--teacher", tiny_base, "--yarn-original", 32, *training),
        ("evaluate", tmp_path / "d", "--teacher", tiny_base, "--lengths", "256", "--answers", 8, "--tokens", 128)
        + ("--beyond-context", "--text", text_file, "--json", tmp_path / "e.json"),
    ):
        done = hylo(*command)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert set(result["suites"]) == {"needle", "intrinsic"} and list(result["models"]) == ["d"]
    assert set(result["suites"]["intrinsic"]["results"]["d"]) >= {"kl", "perplexity", "memory"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "d").config.mla_rope_parameters["factor"] == 2.0


def test_plan_prints_json_and_a_table(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    done = hylo("plan", tmp_path, "--layout", "3A", "--json")
    figures = json.loads(done.stdout)
    assert figures["kv_percent_of_base"] == 100 and figures["parameters"] == figures["base_parameters"]
    assert "attention" in hylo("plan", tmp_path, "--layout", "3A").stdout


def test_a_dry_run_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    done = hylo("convert", tiny_base, tmp_path / "out", "--layout", "3GDN", "--dry-run")
    assert done.returncode == 0 and "gated_deltanet" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_installed_command_ends_with_one_line(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "hylo", "plan", tmp_path / "none", "--layout", "3A"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_bad_input_ends_with_status_2_and_one_line(tiny_base: Path, tmp_path: Path, text_file: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    half = tmp_path / "half"
    shutil.copytree(tiny_base, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    student = tmp_path / "student"
    assert hylo("convert", tiny_base, student, "--layout", "3GDN").returncode == 0
    out, layout = tmp_path / "out", ("--layout", "1MLA2GDN")
    training = ("--length", 64, "--tokens", 64, "--rows", 1)
    before = sorted(tmp_path.iterdir())
    for command, words in (
        (("convert", tmp_path / "none", out, *layout), ["none", "does not exist"]),
        (("convert", half, out, *layout), ["half", "model.safetensors"]),
        (("convert", other, out, *layout), ["GPT2LMHeadModel"]),
        (("convert", tiny_base, out, "--layout", "4MLA12GDN"), ["4MLA12GDN", "3"]),
        (("convert", tiny_base, out, "--layout", "nonsense"), ["nonsense"]),
        (("convert", tiny_base, out, *layout, "--set", "kv_lora_rank=4000"), ["kv_lora_rank", "4000"]),
        (("convert", tiny_base, out, *layout, "--set", "kv_lora_rank=big"), ["kv_lora_rank=big"]),
        (("convert", tiny_base, student, *layout), ["student", "exists"]),
        (("convert", tiny_base, out, *layout, "--init", "magic"), ["magic"]),
        (("align", tiny_base, student, out, "--data", short, *training), ["64", "give more text"]),
        (("align", tiny_base, student, out, "--data", tmp_path / "no.txt", *training), ["no.txt", "does not exist"]),
        (("align", tiny_base, student, out, "--data", text_file, "--rows", 0), ["--rows", "greater than 0"]),
        (("align", tiny_base, student, out, "--data", text_file, "--set", "objective=dpo"), ["dpo", "hylo extend"]),
        (("extend", student, out, "--objective", "layers", "--data", text_file), ["layers", "hylo align"]),
        (("extend", student, out, "--teacher", half, "--data", text_file, *training), ["half"]),
        (("evaluate", half, "--text", text_file), ["half"]),
        (("evaluate", student, "--text", short, "--lengths", "64"), ["64"]),
        (("upcycle", tmp_path / "no.yaml", "--out", out), ["no.yaml"]),
        (("plan", tiny_base), ["--layout"]),
    ):
        done = hylo(*command)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (command, done.stderr)
        assert all(str(word) in done.stderr for word in words), (command, done.stderr)
        assert sorted(tmp_path.iterdir()) == before, command


def test_a_teacher_of_another_vocabulary_is_refused(
    run: Path, tiny_base: Path, tmp_path: Path, text_file: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_base, teacher)
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(model.config.vocab_size + 100)
    model.save_pretrained(teacher)
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, text_file, teacher=str(teacher))
    done = hylo("upcycle", recipe, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(model.config.vocab_size) in done.stderr and str(model.config.vocab_size - 100) in done.stderr
    assert not (tmp_path / "out").exists()  # said before any work
