"""Outputs are complete or absent."""

from pathlib import Path

import pytest

from hylo.errors import HyloError
from hylo.files import checksum, complete_directory, differences, read_json, write_json


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with complete_directory(tmp_path / "a" / "out") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), complete_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match=f"^cannot write {tmp_path}/out: No space left on device; "):
        with complete_directory(tmp_path / "out"):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HyloError, match="exists already"), complete_directory(tmp_path / "out"):
        raise AssertionError


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HyloError, match="cannot write"), complete_directory(tmp_path / "file" / "out"):
        raise AssertionError
    with pytest.raises(HyloError, match="cannot write"):
        write_json(tmp_path / "file" / "out.json", {})


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_unreadable_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(HyloError, match="evaluation .*x.json"):
        read_json(tmp_path / "x.json", "evaluation")


def test_differences_are_named_by_their_path() -> None:
    theirs = {"seed": 0, "stages": [{"tokens": 10}, {"tokens": 20}], "gone": 1}
    ours = {"seed": 0, "stages": [{"tokens": 10}, {"tokens": 30}], "new": [1]}
    assert differences(theirs, ours) == [
        "stages.1.tokens is 20 there, 30 here",
        "gone is 1 there, None here",
        "new is None there, [1] here",
    ]
    assert differences({"x": [1, 2]}, {"x": [1]}) == ["x is [1, 2] there, [1] here"]
    assert not differences(theirs, dict(reversed(theirs.items())))


def test_the_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
