"""`hylo select` as a user calls it: what it writes, how it goes on, and what bad input gets."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Done, hylo

from hylo.convert import Initialisation
from hylo.files import read_json
from hylo.recipe import read_recipe
from hylo.select import gates, prepare
from hylo.select.records import Records

GEOMETRY = ("--set", "q_lora_rank=16", "--set", "qk_rope_head_dim=4", "--set", "kv_lora_rank=8")
ROWS = ("--tokens", 1024, "--length", 256, "--answers", 16, "--calibration-tokens", 256)
METHODS = (
    ("--method", "kl", "--order", "one-shot"),
    ("--method", "kl", "--order", "removal", "--linear", "M2"),
    ("--method", "kl", "--attention", "A", "--linear", "KDA"),
    ("--method", "window", "--window", 40),
    ("--method", "gates"),
)


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, ...]]:
    """Options that give two students, each converted once."""
    folder = tmp_path_factory.mktemp("students")

    def options(attention: str = "MLA", linear: str = "GDN") -> tuple[Any, ...]:
        for kind in (attention, linear):
            if not (folder / kind).exists():
                done = hylo("convert", tiny_base, folder / kind, "--layout", f"3{kind}", *GEOMETRY)
                assert done.returncode == 0, done.stderr
        return "--all-mla", folder / attention, "--all-linear", folder / linear

    return options


@pytest.fixture
def students(made: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
    return made()


def budget(attention: str) -> str:
    """Two of three layers: 12 of 64 values each as MLA, 64 as the base's own."""
    return "70%" if attention == "A" else "13%"


def select(base: Path, text: Path, out: Path, *options: object) -> Done:
    share = budget("A" if "A" in options else "MLA")
    return hylo("select", base, "--kv-budget", share, "--data", text, *GEOMETRY, *ROWS, *options, "--out", out)


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options[1::2])))
def test_every_method_writes_a_selection(
    tiny_base: Path,
    text_file: Path,
    tmp_path: Path,
    made: Callable[..., tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[Any, ...],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(gates, "STEPS", 4)
    kinds = {name[2:]: options[options.index(name) + 1] for name in ("--attention", "--linear") if name in options}
    done = select(tiny_base, text_file, out, *options, *made(**kinds))
    assert done.returncode == 0, done.stderr
    found = read_json(out / "selection.json", "selection")
    assert found["count"] == len(found["chosen"]) == 2 and found["uniform"] == [0, 1]
    assert found["chosen"] == sorted(found["ranking"][:2])
    assert [score["layer"] for score in found["scores"]] == [0, 1, 2]
    compared = found["comparison"]
    assert compared["difference"]["kl"] == pytest.approx(compared["chosen"]["kl"] - compared["uniform"]["kl"])
    assert (out / "selection.png").stat().st_size > 1000 and "<svg" in (out / "selection.svg").read_text()
    for word in ("score", "chosen", "uniform", "needle", "minutes"):
        assert word in done.stdout
    fragment = yaml.safe_load((out / "selection.yaml").read_text())
    assert fragment["mla_layers"] == found["chosen"] and fragment["layout"] == found["layout"]
    assert fragment["geometry"] == {"q_lora_rank": 16, "qk_rope_head_dim": 4, "kv_lora_rank": 8}


def test_a_recipe_extends_what_was_selected(
    tiny_base: Path, text_file: Path, tmp_path: Path, students: tuple[Any, ...]
) -> None:
    assert select(tiny_base, text_file, tmp_path / "out", *students).returncode == 0
    recipe = {"extends": "out/selection.yaml", "base": str(tiny_base), "data": {"text": [str(text_file)]}}
    recipe |= {"yarn_original_length": 128, "evaluate": {"lengths": [64]}}
    recipe["stages"] = [{"length": 64, "rows": 1, "tokens": 64, "learning_rate": 1e-3}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read.layout == "2MLA1GDN" and read.geometry["kv_lora_rank"] == 8
    assert read.mla_layers == read_json(tmp_path / "out" / "selection.json", "selection")["chosen"]


def test_uniform_measures_nothing_and_needs_no_data(tiny_base: Path, tmp_path: Path) -> None:
    arguments = ("select", tiny_base, "--budget", "13%", "--method", "uniform", *GEOMETRY, "--out", tmp_path / "out")
    done = hylo(*arguments)
    assert done.returncode == 0, done.stderr
    assert "nothing was measured" in done.stdout
    assert read_json(tmp_path / "out" / "selection.json", "selection")["chosen"] == [0, 1]


@pytest.mark.parametrize("method", ["kl", "window"])
def test_goes_on_where_a_signal_stopped_it(
    tiny_base: Path,
    text_file: Path,
    tmp_path: Path,
    students: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    measured: list[str] = []
    add = Records.add

    def counted(self: Records, key: str, record: Any) -> Any:
        measured.append(key)
        recorded = add(self, key, record)
        if key in stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        return recorded

    monkeypatch.setattr(Records, "add", counted)
    options = (*students, "--method", method)
    stopping: list[str] = []
    assert select(tiny_base, text_file, tmp_path / "whole", *options).returncode == 0
    of_layers = [key for key in measured if key.startswith(method)]
    whole = list(measured)
    stopping.append(of_layers[2])  # the start, and two layers
    measured.clear()
    stopped = select(tiny_base, text_file, tmp_path / "out", *options)
    assert stopped.returncode == 0 and "go on with: hylo select" in stopped.stdout
    assert not (tmp_path / "out" / "selection.json").exists()
    first = list(measured)
    stopping.clear()
    measured.clear()
    assert select(tiny_base, text_file, tmp_path / "out", *options).returncode == 0
    assert first[-1] == of_layers[2] and first + measured == whole  # nothing is scored twice, nothing left out
    results = [read_json(tmp_path / name / "selection.json", "selection") for name in ("whole", "out")]
    for result in results:
        for key in ("score_seconds", "students_seconds"):
            del result[key]
        del result["comparison"]["seconds"]
        for score in [*result["scores"], *(score for scores in result["rounds"] for score in scores)]:
            del score["seconds"]
    assert results[0] == results[1]
    measured.clear()
    assert select(tiny_base, text_file, tmp_path / "out", *options).returncode == 0 and not measured


def test_other_settings_in_the_same_directory_are_refused(
    tiny_base: Path, text_file: Path, tmp_path: Path, students: tuple[Any, ...]
) -> None:
    assert select(tiny_base, text_file, tmp_path / "out", *students).returncode == 0
    before = json.dumps(read_json(tmp_path / "out" / "selection.json", "selection"))
    done = select(tiny_base, text_file, tmp_path / "out", *students, "--seed", 1)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "holds a selection with other settings: seed is 0 there, 1 here" in done.stderr or "data" in done.stderr
    assert json.dumps(read_json(tmp_path / "out" / "selection.json", "selection")) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--kv-budget", "much"), "--kv-budget much: write 5%"),
        (("--kv-budget", "1%"), "nearest layout, 1MLA2GDN, needs more"),
        (("--kv-budget", "90%"), "all 3 layers fit as MLA"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--length", "4096"), "exceeds the base's context, 512"),
        (("--length", "64"), "too short for facts"),
        (("--method", "guess"), "--method"),
        (("--method", "window", "--window", "512"), "--window 512 hides nothing"),
        (("--all-mla", "somewhere"), "give both --all-mla and --all-linear"),
        (("--all-mla", "somewhere", "--all-linear", "elsewhere"), "somewhere does not exist"),
        (("--all-mla", "x", "--all-linear", "y", "--align-tokens", "64"), "leave it out"),
        (("--set", "kv_lora_rank=9999"), "kv_lora_rank"),
        (("--linear", "RNN"), "--linear"),
    ],
)
def test_bad_input_is_named_in_one_line(
    tiny_base: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    done = select(tiny_base, text_file, tmp_path / "out", *options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out" / "selection.json").exists()


def test_no_data(tiny_base: Path, tmp_path: Path) -> None:
    done = hylo("select", tiny_base, "--kv-budget", "13%", *GEOMETRY, "--out", tmp_path / "out")
    assert done.returncode == 2 and "method kl scores layers on text; give --data" in done.stderr
    assert not list(tmp_path.iterdir())


def test_students_of_other_kinds(tiny_base: Path, text_file: Path, tmp_path: Path, students: tuple[Any, ...]) -> None:
    done = select(tiny_base, text_file, tmp_path / "out", *students, "--linear", "M2")
    assert done.returncode == 2 and "has gated_deltanet layers, which layout 2MLA1M2 has not" in done.stderr


def test_students_made_here_can_be_aligned(
    tiny_base: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "Initialisation", partial(Initialisation, linear_steps=2))
    done = select(tiny_base, text_file, tmp_path / "out", "--align-tokens", 8192, "--method", "kl")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "out" / "students").iterdir() if path.is_dir()}
    assert made == {"all-attention", "all-attention-aligned", "all-linear", "all-linear-aligned"}
