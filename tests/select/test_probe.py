"""The probe's rows, and what is measured on them, against written-out sums."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hylo.checkpoint import read_tokenizer
from hylo.data.settings import Data
from hylo.data.training import TrainingData
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer, Teacher
from hylo.modeling.loading import load_model
from hylo.select.probe import difference, measure, probe_rows


@pytest.fixture
def data(tiny_base: Path, text_file: Path) -> TrainingData:
    return TrainingData(Data.model_validate({"text": [str(text_file)], "facts": 0.5}), read_tokenizer(tiny_base))


def test_rows_are_held_out_text_with_facts_in_their_share(data: TrainingData) -> None:
    probe = probe_rows(data, 256, 1536, 0.5, (0, 0))
    assert probe.ids_RT.shape == (6, 256) and probe.tokens == 1536
    assert probe.answer_RT.any(1).tolist() == [True] * 3 + [False] * 3
    held_out = data.held_out
    for row in probe.ids_RT[3:]:
        assert (np.lib.stride_tricks.sliding_window_view(held_out, 256) == row.numpy()).all(1).any()
    same, other = probe_rows(data, 256, 1536, 0.5, (0, 0)), probe_rows(data, 256, 1536, 0.5, (0, 1))
    assert torch.equal(same.ids_RT, probe.ids_RT) and not torch.equal(other.ids_RT, probe.ids_RT)


def test_measures_are_those_of_the_written_out_sums(data: TrainingData, tiny_base: Path) -> None:
    probe = probe_rows(data, 256, 1024, 0.5, (0, 0))
    teacher, student = load_model(tiny_base), load_model(tiny_base)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
        found = measure(Scorer(student), probe, Teacher(teacher))
        log_p, log_q = (model(probe.ids_RT).logits.log_softmax(-1) for model in (teacher, student))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(1)
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-4)
    for row, answer, scores, loss in zip(probe.ids_RT, probe.answer_RT, log_q, found["answers"], strict=True):
        where = answer.nonzero()[:, 0]
        if not len(where):
            assert loss is None
            continue
        assert math.isclose(loss, F.nll_loss(scores[where - 1], row[where]).item(), rel_tol=1e-4)
    assert measure(Scorer(teacher), probe, Teacher(teacher))["kl"] == pytest.approx([0.0] * 4, abs=1e-6)


def test_differences_are_paired_over_the_rows_that_have_a_value() -> None:
    found = difference([3.0, None, 5.0, 9.0], [2.0, 1.0, 3.0, 6.0])  # 1, 2, 3
    assert found.value == 2.0 and found.error == pytest.approx(1 / math.sqrt(3))
    assert difference([1.0, 3.0]).value == 2.0


def test_rows_that_cannot_be(data: TrainingData) -> None:
    with pytest.raises(HyloError, match="too short for facts; give a length of at least"):
        probe_rows(data, 16, 1024, 0.5, (0, 0))
    with pytest.raises(HyloError, match="fewer than one row of 1000000"):
        probe_rows(data, 1_000_000, 1024, 0.0, (0, 0))
