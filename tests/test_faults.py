"""A run that is killed (-9) at any instant and begun again ends with the same weights, byte for byte.

HYLO_FAULTS is the number of instants, each in a run of its own; they are spread evenly over conversion, every stage,
evaluation and report (make faults: 36).
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from upcycle_child import upcycle

INSTANTS = int(os.environ.get("HYLO_FAULTS", "6"))
PHASES = ("converted", "aligned", "extended-64", "extended-128", "evaluations/extended.json", "report.html")
GEOMETRY = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12}
CONTEXT = multiprocessing.get_context("forkserver")  # a fresh process for every run, without the imports' seconds
CONTEXT.set_forkserver_preload(["hylo.pipeline", "hylo.distill.align", "hylo.distill.extend", "hylo.cli"])


class Event(NamedTuple):
    """Something that appeared in the run's directory, and when, in seconds from the start."""

    what: str
    at: float


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, text_file: Path) -> Path:
    stage = {"length": 32, "rows": 2, "tokens": 3840, "learning_rate": 1e-3, "save_every": 5}  # 60 steps each
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": str(tiny_base),
                "layout": "1MLA2GDN",
                "geometry": GEOMETRY,
                "data": {"text": [str(text_file)], "facts": 0.5},
                "calibration_tokens": 64,
                "calibration_length": 32,
                "linear_steps": 3,
                "stages": [
                    stage | {"objective": "layers", "layers_at_once": 2},
                    stage | {"length": 64, "tokens": 7680, "objective": {"forward_kl": 0.9, "cross_entropy": 0.1}},
                    stage | {"length": 128, "rows": 1, "tokens": 7680, "teacher": "cache", "trains": "all_but_head"},
                ],
                "yarn_original_length": 32,
                "evaluate": {"lengths": [256], "answers": 16, "tokens": 256},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process, events, began = begin(recipe, run), list[Event](), time.monotonic()
    seen: set[str] = set()
    while process.is_alive():
        at, there = time.monotonic() - began, traces(run)
        events += [Event(what, at) for what in sorted(there - seen)]
        seen |= there
        time.sleep(0.002)
    assert process.exitcode == 0
    return run, events


@pytest.mark.parametrize("number", range(INSTANTS))
def test_a_killed_run_ends_as_the_undisturbed_one(
    number: int, recipe: Path, undisturbed: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    expected, events = undisturbed
    after, delay = instant(events, number)
    for attempt in range(6):  # a run may be faster than the one whose times we know, and over before it is killed
        run = tmp_path / f"{attempt}" / "run"
        run.parent.mkdir()
        process = begin(recipe, run)
        while process.is_alive() and after not in traces(run):
            time.sleep(0.002)
        time.sleep(delay / 2**attempt)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and not (run / "report.html").exists():
            break
    else:
        pytest.fail(f"the run was over each time, {delay:.3f} s or less after {after}")
    again = begin(recipe, run)
    again.join()
    assert again.exitcode == 0
    assert weights(run) == weights(expected)
    for stage in ("aligned", "extended-64", "extended-128"):
        assert curve(run / stage) == curve(expected / stage)
    leftovers = [path.name for path in run.rglob("*") if ".partial" in path.name or path.name.endswith(".training")]
    assert not leftovers


def instant(events: list[Event], number: int) -> tuple[str, float]:
    """The last event before the instant, and how long after it to wait; instants are spread evenly in every phase."""
    ends = {event.what: event.at for event in events if event.what in PHASES}
    times = [0.0, *(ends[phase] for phase in PHASES)]
    phase, place = number % len(PHASES), number // len(PHASES)
    places = -(-(INSTANTS - phase) // len(PHASES))
    at = times[phase] + (place + 0.7) / places * (times[phase + 1] - times[phase])
    before = [event for event in events if times[phase] <= event.at <= at]
    if place == places - 1 and phase in (1, 2, 3):  # or nothing would go on from a checkpoint
        assert any("checkpoint-" in event.what for event in before), f"no checkpoint in 70 % of {PHASES[phase]}"
    last = max(before, key=lambda event: event.at, default=Event("", 0.0))
    return last.what, at - last.at


def begin(recipe: Path, run: Path) -> Any:
    process = CONTEXT.Process(target=upcycle, args=(str(recipe), str(run)))
    process.start()
    return process


def traces(run: Path) -> set[str]:
    """What there is in a run's directory and stays for a while, and every finished step."""
    found = {""}
    for folder, directories, files in os.walk(run):  # which takes it well when folders go away meanwhile
        for name in (os.path.relpath(os.path.join(folder, entry), run) for entry in [*directories, *files]):
            if "partial" in name or re.search(r"checkpoint-\d+/|logs/", name):
                continue
            found.add(name)
            if name.endswith("metrics.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    found |= {f"{name}:{step}" for step in range((run / name).read_bytes().count(b"\n"))}
    return found


def weights(run: Path) -> dict[str, str]:
    files = [path for path in run.rglob("model*.safetensors")]
    assert len(files) == 4
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def curve(stage: Path) -> list[tuple[int, float]]:
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [(step["step"], step["loss"]) for step in steps]
