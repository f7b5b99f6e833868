"""The needle suite on directories: its map, its errors, what it reads again and what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from counting_bar import CountingBar

from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer
from hylo.evaluate.held_out import held_out
from hylo.evaluate.needle import NeedleSettings, check_needle, evaluate_needle, needle_summary
from hylo.evaluate.subject import Subject


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def subject(tiny_base: Path) -> Subject:
    return Subject("tiny", tiny_base)


def settings(text: Path, answers: int = 6, **changes: object) -> NeedleSettings:
    return NeedleSettings((128, 160), depths=3, answers=answers, text=(str(text),), **changes)  # type: ignore[arg-type]


@pytest.fixture
def some_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub that knows the facts at even depths: an untrained model recalls nothing."""

    def answered(scorer: Scorer, ids: torch.Tensor, rows: list) -> np.ndarray:
        scorer.hidden(ids)
        odd = ids.sum(1).numpy() % 2 == 1  # some rows are worse than others
        return np.array([[True, False, not bad] for bad in odd])

    monkeypatch.setattr("hylo.evaluate.needle.answered", answered)


def test_map(subject: Subject, text_file: Path, some_right: None) -> None:
    with CountingBar() as bar:
        result = evaluate_needle(subject, settings(text_file, answers=24), bar)
    assert json.loads(json.dumps(result)) == result
    assert result["needle_answers"] == {"128": 24, "160": 24}
    for length in ("128", "160"):
        share, errors = result["needle_depth"][length], result["needle_depth_se"][length]
        assert share[:2] == [1.0, 0.0] and errors[:2] == [0.0, 0.0] and 0 < share[2] < 1
        # by hand: of 8 rows a share p is right
        assert errors[2] == pytest.approx(np.sqrt(share[2] * (1 - share[2]) / 7))
        assert result["needle"][length] == pytest.approx((1 + share[2]) / 3)
        assert result["needle"][length] == pytest.approx(np.mean(result["needle_rows"][length]))
        assert result["needle_se"][length] == pytest.approx(errors[2] / 3)
    assert bar.announced == bar.read == 8 * (128 + 160) and "failed" not in result


def test_a_cell_can_be_asked_for_as_many_answers_as_a_length(subject: Subject, text_file: Path) -> None:
    with CountingBar() as bar:
        result = evaluate_needle(subject, settings(text_file, answers=4, answers_per_cell=True), bar)
    assert result["needle_answers"] == {"128": 12, "160": 12}


def test_what_is_recorded_is_not_read_again(
    subject: Subject, text_file: Path, some_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CountingBar() as bar:
        first = evaluate_needle(subject, settings(text_file), bar)
    assert bar.read == 2 * (128 + 160)
    with CountingBar() as bar:
        again = evaluate_needle(Subject("other name", subject.directory), settings(text_file), bar)
    assert again == first and bar.announced == bar.read == 0
    with CountingBar() as bar:  # two rows more at each length
        more = evaluate_needle(subject, settings(text_file, answers=12), bar)
    assert bar.announced == bar.read == 2 * (128 + 160)
    monkeypatch.setenv("HYLO_CACHE", str(text_file.parent / "elsewhere"))
    with CountingBar() as bar:
        whole = evaluate_needle(subject, settings(text_file, answers=12), bar)
    assert {**more, "seconds": 0} == {**whole, "seconds": 0}


def test_another_seed_is_another_set_and_more_answers_are_not(subject: Subject, text_file: Path) -> None:
    for changes, rows in (({}, 2), ({"seed": 1}, 2), ({"answers_per_cell": True}, 6 - 2)):
        with CountingBar() as bar:
            evaluate_needle(subject, settings(text_file, **changes), bar)
        assert bar.read == rows * (128 + 160)


def test_a_row_that_fails_is_recorded_and_tried_again(
    subject: Subject, text_file: Path, some_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, read = Scorer.hidden, []

    def fails(self: Scorer, ids: torch.Tensor) -> torch.Tensor:
        read.append(ids.shape)
        if ids.shape[1] == 160 and (ids == poison).all(1).any():
            raise torch.OutOfMemoryError("no room")
        return hidden(self, ids)

    poison = torch.from_numpy(settings(text_file, 12).rows(held_out(subject, (str(text_file),)))[160][1].ids)
    monkeypatch.setattr(Scorer, "hidden", fails)
    with CountingBar() as bar:
        result = evaluate_needle(subject, settings(text_file, answers=12), bar)
    assert result["failed"] == {"160": 1} and "no room" in result["errors"]["160"]
    assert result["needle_answers"] == {"128": 12, "160": 9}
    assert [share is None for share in result["needle_rows"]["160"]] == [False, True, False, False]
    assert [shape[0] for shape in read if shape[1] == 160] == [4, 2, 1, 1, 2]  # halves, down to the row
    monkeypatch.setattr(Scorer, "hidden", hidden)
    with CountingBar() as bar:
        mended = evaluate_needle(subject, settings(text_file, answers=12), bar)
    assert bar.announced == bar.read == 160 and "failed" not in mended
    assert mended["needle_answers"]["160"] == 12


def test_interrupted_in_the_middle_it_goes_on(
    subject: Subject, text_file: Path, some_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hylo.evaluate.rows.BATCH_TOKENS", 256)
    with CountingBar() as bar:
        expected = evaluate_needle(subject, settings(text_file, answers=18), bar)
    monkeypatch.setenv("HYLO_CACHE", str(text_file.parent / "interrupted"))
    hidden, calls = Scorer.hidden, []

    def interrupted(self: Scorer, ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(self, ids)

    monkeypatch.setattr(Scorer, "hidden", interrupted)
    with CountingBar() as bar, pytest.raises(KeyboardInterrupt):
        evaluate_needle(subject, settings(text_file, answers=18), bar)
    with CountingBar() as rest:
        result = evaluate_needle(subject, settings(text_file, answers=18), rest)
    assert bar.read == 4 * 128 and rest.announced == rest.read == 2 * 128 + 6 * 160
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}


def test_logits_that_are_not_finite_are_a_failure(tiny_base: Path, text_file: Path) -> None:
    broken = Subject("broken", tiny_base)
    broken.model.model.norm.weight.data.fill_(math.inf)
    with CountingBar() as bar:
        result = evaluate_needle(broken, settings(text_file), bar)
    assert result["failed"] == {"128": 2, "160": 2} and "not finite" in result["errors"]["128"]
    assert result["needle"] == {}


def test_a_single_row_has_no_error() -> None:
    score = needle_summary(np.array([[True, False]]))
    assert (score.accuracy, score.standard_error, score.by_depth_error) == (0.5, None, [None, None])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": (1024,)}, "needle at 1024 tokens exceeds the context of tiny, 512"),
        ({"lengths": (16,)}, "3 needles need"),
        ({"text": ("nowhere",)}, "text nowhere does not exist"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(
    change: dict, message: str, subject: Subject, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "model", property(lambda self: pytest.fail("loaded")))
    asked = {"lengths": (128,), "depths": 3, "answers": 6, "text": (str(text_file),)} | change
    with pytest.raises(HyloError, match=message):
        check_needle(subject, NeedleSettings(**asked))  # type: ignore[arg-type]
