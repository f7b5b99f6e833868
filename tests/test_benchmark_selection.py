"""The yardstick of layer selection: its ranks by hand, and one layout trained for a step."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from scripts import script

from hylo.data.settings import Data


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("selection", monkeypatch)


def results(**kl: float) -> list[dict[str, Any]]:
    return [{"layers": [int(c) for c in name[1:]], "kl": value, "needle": 0.5} for name, value in kl.items()]


def test_ranks_are_strict_and_equals_share_one(selection: ModuleType) -> None:
    found = results(_01=0.4, _02=0.3, _12=0.4, _13=0.9)
    assert selection.ranks(found, "kl", True) == {(0, 1): 2, (0, 2): 1, (1, 2): 2, (1, 3): 4}
    assert set(selection.ranks(found, "needle", False).values()) == {1}


def test_a_hit_is_among_the_best_tenth_and_at_least_the_best(selection: ModuleType) -> None:
    found = results(_01=0.4, _02=0.3, _12=0.45)
    near = selection.judged(found, [1, 0])
    assert (near["kl_rank"], near["kl_hit"], near["needle_rank"], near["needle_hit"]) == (2, False, 1, True)
    assert near["kl_regret"] == pytest.approx(0.1)
    twenty = [{"layers": list(layers), "kl": k, "needle": 0} for k, layers in enumerate(selection.layouts(3))]
    assert [selection.judged(twenty, result["layers"])["kl_hit"] for result in twenty[:3]] == [True, True, False]


def test_the_table_counts_hits_over_seeds(selection: ModuleType) -> None:
    entry = {
        "method": "kl:greedy",
        "count": 2,
        "seconds": 60.0,
        "kl_regret": 0.0,
        "needle_rank": 3,
        "needle_hit": False,
    }
    entries = [
        entry | {"seed": 0, "kl_rank": 1, "kl_hit": True, "layers": [0, 1]},
        entry | {"seed": 1, "kl_rank": 4, "kl_hit": False, "layers": [0, 2]},
    ]
    text = io.StringIO()
    selection.print_results(entries, [2, 3], Console(file=text, width=160))
    for part in ("15 layouts a seed", "1/2", "2.5", "0/2", "3.0", "0-1, 0-2", "chance", "8.0"):
        assert part in text.getvalue(), part


def test_a_layout_is_trained_and_measured_once(
    selection: ModuleType, tiny_base: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = {"q_lora_rank": 16, "qk_rope_head_dim": 4, "kv_lora_rank": 8}
    data = Data.model_validate({"text": [str(text_file)], "facts": 0.5, "epochs": 20})
    recipe = selection.read_recipe(selection.HERE / "short.yaml").model_copy(
        update={"geometry": geometry, "data": data, "calibration_tokens": 512, "linear_steps": 2}
    )
    monkeypatch.setattr(selection, "read_recipe", lambda path: recipe)
    monkeypatch.setattr(selection, "TEACHER", tiny_base)
    monkeypatch.setattr(selection, "LAYERS", 3)
    settings = selection.Settings(align_tokens=4096, tokens=768, length=192, rows=2, answers=16, text_tokens=768)
    quiet = Console(quiet=True)
    yard = selection.Yard(settings, 0, tmp_path / "seed-0", quiet)
    found = selection.measure_all(yard, 1, quiet)
    assert [result["layers"] for result in found] == [[0], [1], [2]]
    for result in found:
        assert 0 < result["kl"] < 3 and result["kl"] != result["kl_undistilled"]  # two steps, the first of rate zero
        assert (len(result["loss"]), len(result["kl_rows"]), len(result["needle_rows"])) == (2, 4, 2)
    again = selection.Yard(settings, 0, tmp_path / "seed-0", quiet)
    assert again.measure([0]) | {"seconds": 0} == found[0] | {"seconds": 0}  # and layouts do not depend on the order

    monkeypatch.setattr(selection.Yard, "measure", lambda *arguments: pytest.fail("measured again"))
    assert selection.measure_all(again, 1, quiet) == found
    chosen = selection.choices(again, 1, ["uniform", "kl:one-shot"])
    assert chosen["uniform"]["layers"] == [1]
    assert len(chosen["kl:one-shot"]["scores"]) == 3 and chosen["kl:one-shot"]["tokens"] > 0
    assert json.loads((tmp_path / "seed-0" / "choices" / "kl-one-shot-1.json").read_text()) == chosen["kl:one-shot"]


def test_other_settings_are_refused(
    selection: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selection, "measure_all", lambda *arguments: pytest.fail("measured"))
    for tokens in ("1000", "2000"):
        monkeypatch.setattr(sys, "argv", ["selection.py", "--work", str(tmp_path), "--tokens", tokens, "--seeds", "0"])
        if tokens == "1000":
            selection.main()
        else:
            with pytest.raises(SystemExit):
                selection.main()
    assert "holds results of other settings" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["selection.py", "--work", str(tmp_path), "--methods", "uniform,luck"])
    with pytest.raises(SystemExit):
        selection.main()
    assert "method luck is not known" in capsys.readouterr().err
