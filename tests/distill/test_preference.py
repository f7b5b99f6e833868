"""DPO through TRL on hylo's own model: what it minimises, what it writes, that it goes on, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from hylo.checkpoint import read_tokenizer
from hylo.distill.metrics import StepMetrics
from hylo.distill.preference import optimise_preferences
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling.loading import load_model

pytest.importorskip("trl")

QUIET = Console(quiet=True)
PAIRS = [
    {
        "prompt": f"The {n}th row",
        "chosen": f" says that {n * n} is the square of {n}.",
        "rejected": f" is {n} of {n}, no",
    }
    for n in range(40)
]


@pytest.fixture
def student(tiny_base: Path, tmp_path: Path, build_student: Callable[..., Any]) -> Path:
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    directory = tmp_path / "student"
    build_student(base, ["gated_deltanet", "mla", "attention"]).save_pretrained(directory)
    read_tokenizer(tiny_base).save_pretrained(directory)
    return directory


def settings(**changes: Any) -> Training:
    values = {"objective": "dpo", "length": 48, "rows": 4, "tokens": 8 * 4 * 48, "learning_rate": 1e-3, "beta": 0.1}
    return Training.model_validate(values | {"save_every": 50} | changes)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def margin(directory: Path, reference: Path, pairs: list[dict[str, str]]) -> float:
    """Mean of log-ratio differences, from full logits and one answer at a time."""
    tokenizer, total = read_tokenizer(directory), 0.0
    ours, theirs = load_model(directory), load_model(reference)
    for pair in pairs:
        for sign, key in ((1, "chosen"), (-1, "rejected")):
            start = len(tokenizer(pair["prompt"])["input_ids"])
            ids = torch.tensor([tokenizer(pair["prompt"] + pair[key] + tokenizer.eos_token)["input_ids"]])
            for model, factor in ((ours, sign), (theirs, -sign)):
                with torch.no_grad():
                    log_p = torch.log_softmax(model(ids).logits[0, :-1], -1)
                total += factor * log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()
    return total / len(pairs)


def test_chosen_answers_become_likelier_than_they_were(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "dpo"
    optimise_preferences(student, out, PAIRS, settings(), QUIET)
    steps = steps_of(out)
    assert len(steps) == 8 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the student is the reference
    assert steps[-1]["loss"] < 0.9 * math.log(2)
    assert margin(out, student, PAIRS[:4]) > 1.0
    before, after = load_model(student), load_model(out)
    ours, theirs = ({**model.config.to_dict(), "_name_or_path": ""} for model in (after, before))
    assert ours == theirs  # whatever special tokens TRL would like to see there
    assert (out / "tokenizer.json").exists() and not (tmp_path / "dpo.training").exists()


def test_the_loss_of_a_step_is_that_of_its_pairs(student: Path, tmp_path: Path) -> None:
    """The loss of step 2 from full logits of what step 1 gave, against the frozen start."""
    for name, steps in (("one", 1), ("two", 2)):
        changes = {"tokens": steps * 48, "rows": 1, "schedule": "constant", "warmup": 0.0}
        optimise_preferences(student, tmp_path / name, PAIRS, settings(**changes), QUIET)
    r = margin(tmp_path / "one", student, PAIRS[1:2])
    assert steps_of(tmp_path / "two")[1]["loss"] == pytest.approx(math.log1p(math.exp(-0.1 * r)), rel=1e-4)


def test_accumulated_passes_are_one_step(student: Path, tmp_path: Path) -> None:
    for name, micro_rows in (("whole", None), ("halves", 2)):
        optimise_preferences(student, tmp_path / name, PAIRS, settings(micro_rows=micro_rows), QUIET)
    whole, halves = ([step["loss"] for step in steps_of(tmp_path / name)] for name in ("whole", "halves"))
    assert halves == pytest.approx(whole, rel=1e-4) and len(whole) == 8


def test_a_stopped_run_goes_on_to_the_same_weights(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = settings(save_every=2)
    optimise_preferences(student, tmp_path / "whole", PAIRS, training, QUIET)
    measured, calls = StepMetrics.measured, []

    def killed(self: StepMetrics, *arguments: Any, **others: Any) -> None:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        measured(self, *arguments, **others)

    with monkeypatch.context() as patched:
        patched.setattr(StepMetrics, "measured", killed)
        with pytest.raises(KeyboardInterrupt):
            optimise_preferences(student, tmp_path / "cut", PAIRS, training, QUIET)
    assert (tmp_path / "cut.training").exists() and not (tmp_path / "cut").exists()
    with pytest.raises(HyloError, match="preferences"):
        optimise_preferences(student, tmp_path / "cut", PAIRS[::-1], training, QUIET)
    optimise_preferences(student, tmp_path / "cut", PAIRS, training, QUIET)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b
    assert [s["loss"] for s in steps_of(tmp_path / "cut")] == [s["loss"] for s in steps_of(tmp_path / "whole")]


def test_nothing_is_printed_but_by_the_console(student: Path, tmp_path: Path, capfd: Any) -> None:
    optimise_preferences(student, tmp_path / "out", PAIRS, settings(tokens=4 * 48), QUIET)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_bad_input_is_named(student: Path, tmp_path: Path) -> None:
    def fails(match: str, pairs: list[dict[str, str]] = PAIRS, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match) as error:
            optimise_preferences(student, tmp_path / "out", pairs, settings(**changes), QUIET)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    fails(r"8 steps of 4 pairs need 32 .* there are 3; lower tokens", PAIRS[:3])
    long = [pair | {"prompt": "row " * 60} for pair in PAIRS[:10]] + PAIRS[:25]
    fails(r"shorter than 48 tokens, and there are 25", long)
    plain = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in plain.items() if k != "eos_token"}))
    fails("has no eos_token")
    (student / "tokenizer_config.json").write_text(json.dumps(plain))
    fails(r"length 513 exceeds the 512 tokens", length=513)
