"""What `hylo upcycle --dry-run` prints, and refuses."""

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from hylo.distill.settings import Stage
from hylo.dry_run import dry_run
from hylo.errors import HyloError
from hylo.estimate import Memory
from hylo.recipe import read_recipe

LAYERS = {"objective": "layers", "length": 64, "rows": 4, "tokens": 2560, "learning_rate": 1e-3, "share": 0.25}
KL = {"length": 256, "rows": 2, "tokens": 5120, "learning_rate": 5e-4, "warmup": 0.2}


def recipe(base: Path, folder: Path, **others: Any) -> Path:
    values = {
        "base": str(base),
        "layout": "1MLA2GDN",
        "data": {"text": ["nowhere.txt"]},
        "stages": [LAYERS, KL],
        "yarn_original_length": 64,
        "evaluate": {"lengths": [64]},
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(values | others))
    return path


def shown(path: Path, devices: int = 1, *overrides: str) -> tuple[str, list[tuple[Stage, Memory]]]:
    console = Console(file=io.StringIO(), width=200)
    found = dry_run(read_recipe(path, overrides), console, devices)
    return console.file.getvalue(), found  # type: ignore[attr-defined]


def test_plan_stages_and_memory_are_shown_without_any_weight(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "base" / name).write_bytes((tiny_base / name).read_bytes())
    text, found = shown(recipe(tmp_path / "base", tmp_path))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    rows = {line[0]: line[1:] for line in reversed(lines)}  # of two called teacher, who it is
    assert rows["objective"] == ["layers", "forward_kl"] and rows["teacher"] == ["live", "live"]
    assert (rows["length"], rows["YaRN"], rows["rows"]) == (["64", "256"], ["-", "4"], ["4", "2"])
    assert (rows["tokens"], rows["steps"]) == (["2,560", "5,120"], ["10", "10"])
    assert rows["data"] == ["0% to 25%", "25% to 100%"]
    assert (rows["warm-up"], rows["learning rate"]) == (["1 step", "2 steps"], ["0.001", "0.0005"])
    assert rows["then"] == ["cosine to 0", "cosine to 0"]
    assert "1MLA2GDN" in text and "floating-point operations" in text
    assert rows["together"] == [f"{memory.total / 2**30:.2f}" for _, memory in found]
    assert rows["fullest at"] == [memory.moment for _, memory in found]


def test_within_the_length_of_the_base_nothing_is_stretched(tiny_base: Path, tmp_path: Path) -> None:
    stages = [LAYERS, KL, KL | {"length": 512}]
    text, _ = shown(recipe(tiny_base, tmp_path, stages=stages, yarn_original_length=None))
    row = next(line for line in text.splitlines() if "YaRN" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["-", "1", "1"]


def test_devices_share_the_rows(tiny_base: Path, tmp_path: Path) -> None:
    text, found = shown(recipe(tiny_base, tmp_path), 2, "stages.0.micro_rows=1")
    assert "4 = 1 x 2 x 2" in text and "2 = 1 x 2" in text and "stages on 2 devices" in text
    assert found[1][1].optimiser < shown(recipe(tiny_base, tmp_path))[1][1][1].optimiser


@pytest.mark.parametrize(
    ("override", "devices", "words"),
    [
        ("layout=3MLA1GDN", 1, "layout 3MLA1GDN has 4 layers but the base has 3"),
        ("stages.1.length=1024", 1, "stages.1.length: 1024 exceeds the 512 tokens of"),
        ("stages.1.rows=3", 2, "stages.1.rows: 3 cannot be shared out to 2 devices"),
        ("base=owner/base", 1, "model owner/base is no directory here"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path, override: str, devices: int, words: str) -> None:
    with pytest.raises(HyloError) as error:
        shown(recipe(tiny_base, tmp_path), devices, override)
    assert words in str(error.value) and "\n" not in str(error.value)
