"""What has been scored stays, whole, and only for the settings that it was scored with."""

from pathlib import Path

import pytest

from hylo.errors import HyloError
from hylo.select.records import Records


def test_a_second_call_reads_what_the_first_wrote(tmp_path: Path) -> None:
    identity = {"seed": 0, "models": ("a", "b")}
    first = Records(tmp_path / "records", identity)
    assert first.get("kl/0-1") is None
    assert first.add("kl/0-1", {"kl": (1.0, 2.0)}) == {"kl": [1.0, 2.0]}
    second = Records(tmp_path / "records", identity)
    assert second.get("kl/0-1") == {"kl": [1.0, 2.0]} and second.get("kl/0") is None
    calls: list[int] = []
    for _ in range(2):
        found = second.timed("kl/0", lambda: {"kl": [float(len(calls))], "tokens": calls.append(1) or 3})
    assert len(calls) == 1 and found["kl"] == [0.0] and found["seconds"] >= 0


def test_others_settings_are_refused(tmp_path: Path) -> None:
    Records(tmp_path / "out" / "records", {"seed": 0, "method": "kl"})
    with pytest.raises(HyloError, match=r"out holds a selection with other settings: method is kl there, gates here"):
        Records(tmp_path / "out" / "records", {"seed": 0, "method": "gates"})


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    records = Records(tmp_path, {})
    (tmp_path / "kl.0.json").write_text("{")
    with pytest.raises(HyloError, match=r"kl\.0\.json is not readable JSON"):
        records.get("kl/0")


def test_in_memory() -> None:
    records = Records(None)
    records.add("a", {"b": 1})
    assert records.get("a") == {"b": 1} and records.get("c") is None
