"""Records on disk: appended, read again, cut where a kill cut them, and never another evaluation's."""

import json
import resource
import signal
from pathlib import Path

import pytest

from hylo.errors import HyloError
from hylo.evaluate.records import evaluations_cache, records

HASH, OTHER = "a" * 64, "b" * 64


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
        assert not done and "x" not in done
        done.add("x", {"score": 1.5})
        done.add("y", {"score": 2})
    with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
        assert dict(done) == {"x": {"score": 1.5}, "y": {"score": 2}}
        done.add("x", {"score": 3})  # tried again
    with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
        assert done["x"] == {"score": 3} and len(done) == 2


@pytest.mark.parametrize(("model", "suite", "seed"), [(OTHER, "ruler", 0), (HASH, "needle", 0), (HASH, "ruler", 1)])
def test_another_model_suite_or_setting_has_records_of_its_own(
    model: str, suite: str, seed: int, tmp_path: Path
) -> None:
    with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
        done.add("x", {})
    with records(model, suite, {"seed": seed}, tmp_path) as done:
        assert not done


def test_a_line_cut_short_is_dropped_and_the_next_is_whole(tmp_path: Path) -> None:
    with records(HASH, "ruler", {}, tmp_path) as done:
        done.add("x", {"score": 1})
        done.add("y", {"score": 2})
        path = done.path
    path.write_bytes(path.read_bytes()[:-4])
    with records(HASH, "ruler", {}, tmp_path) as done:
        assert list(done) == ["x"]
        done.add("z", {"score": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"key": "x", "score": 1},
        {"key": "z", "score": 3},
    ]


def test_killed_before_the_first_line(tmp_path: Path) -> None:
    with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
        path = done.path
    for left in (b"", b'{"model": "aa'):
        path.write_bytes(left)
        with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
            done.add("x", {})
        with records(HASH, "ruler", {"seed": 0}, tmp_path) as done:
            assert list(done) == ["x"]


def test_records_of_another_model_under_this_name(tmp_path: Path) -> None:
    with records(HASH, "ruler", {}, tmp_path) as done:
        done.add("x", {})
        path = done.path
    path.write_text(path.read_text().replace(HASH, OTHER))
    with pytest.raises(HyloError, match="of another evaluation: model is b+ there, a+ here; remove the file"):
        with records(HASH, "ruler", {}, tmp_path):
            pass
    path.write_text(path.read_text().splitlines()[0] + "\nnot JSON\n")
    with pytest.raises(HyloError, match="are damaged"), records(HASH, "ruler", {}, tmp_path):
        pass


def test_two_at_once(tmp_path: Path) -> None:
    with records(HASH, "ruler", {}, tmp_path), pytest.raises(HyloError, match="another evaluation is at work"):
        with records(HASH, "ruler", {}, tmp_path):
            pass


def test_a_full_disk_is_one_line_and_costs_one_record(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with records(HASH, "ruler", {}, tmp_path) as done:
            done.add("x", {})
            resource.setrlimit(resource.RLIMIT_FSIZE, (done.path.stat().st_size + 40, before[1]))
            with pytest.raises(HyloError, match="free the disk and run this again"):
                done.add("y", {"text": "long " * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with records(HASH, "ruler", {}, tmp_path) as done:
        assert list(done) == ["x"]


def test_where_records_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path))
    assert evaluations_cache() == tmp_path / "evaluations"
    monkeypatch.delenv("HYLO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert evaluations_cache() == tmp_path / "hylo" / "evaluations"
    (tmp_path / "file").touch()
    with pytest.raises(HyloError, match="set HYLO_CACHE to another folder"):
        with records(HASH, "ruler", {}, tmp_path / "file"):
            pass
