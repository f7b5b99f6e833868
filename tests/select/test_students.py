"""Layers of two students in one model: the same as an assembled directory, and no weight twice."""

from pathlib import Path

import pytest
import torch

from hylo.convert import convert
from hylo.convert.assemble import assemble
from hylo.errors import HyloError
from hylo.modeling.loading import load_model
from hylo.plan import make_plan
from hylo.select.students import Students, check_students, load_students

GEOMETRY = {"q_lora_rank": 16, "qk_rope_head_dim": 4, "kv_lora_rank": 8}


def student(base: Path, out: Path, layout: str, **changes: int) -> Path:
    convert(base, out, make_plan(base, layout, None, GEOMETRY | changes, "float32"))
    return out


@pytest.mark.parametrize(("attention", "linear"), [("MLA", "GDN"), ("A", "M2"), ("MLA", "KDA")])
def test_arranged_as_assembled(tiny_base: Path, tmp_path: Path, attention: str, linear: str) -> None:
    growing = student(tiny_base, tmp_path / "attention", f"3{attention}")
    flat = student(tiny_base, tmp_path / "linear", f"3{linear}")
    students = load_students(growing, flat, torch.float32, "cpu")
    ids = torch.arange(40)[None] % 61
    for layers in ([1], [0, 2], [], [0, 1, 2], [2]):
        arranged = students.arrange(layers)
        assemble(growing, flat, tmp_path / f"hybrid-{layers}", layers)
        reference = load_model(tmp_path / f"hybrid-{layers}")
        with torch.no_grad():
            torch.testing.assert_close(
                arranged(ids, use_cache=False).logits, reference(ids, use_cache=False).logits, rtol=0, atol=0
            )
        assert arranged.config.mixers == reference.config.mixers


def test_no_weight_is_copied(tiny_base: Path, tmp_path: Path) -> None:
    models = [load_model(student(tiny_base, tmp_path / layout, layout)) for layout in ("3MLA", "3GDN")]
    held = {parameter.data_ptr() for model in models for parameter in model.parameters()}
    students = Students(*models)
    for layers in ([0], [1, 2]):
        assert {parameter.data_ptr() for parameter in students.arrange(layers).parameters()} <= held


def test_students_that_do_not_belong_together(tiny_base: Path, tmp_path: Path) -> None:
    growing, flat = student(tiny_base, tmp_path / "mla", "3MLA"), student(tiny_base, tmp_path / "gdn", "3GDN")
    mixed = student(tiny_base, tmp_path / "mixed", "1MLA2GDN")
    with pytest.raises(HyloError, match="layer 0 of .*mla is mla, not a linear block"):
        check_students(growing, growing)
    with pytest.raises(HyloError, match="of .*mixed is gated_deltanet, not MLA or attention"):
        check_students(mixed, flat)
    with pytest.raises(HyloError, match="does not exist"):
        check_students(tmp_path / "nowhere", flat)
