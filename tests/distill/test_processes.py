"""Two processes train as one does: the same losses and weights, by either launcher, and through a stop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import hylo
from processes import HELPERS, accelerate, run, torchrun
from train_stages import run_job
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.checkpoint import Weights
from hylo.distill.arguments import rows_at_once
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM

STEPS = 20
SETTINGS = {"tokens": STEPS * 4 * 16, "length": 16, "rows": 4, "learning_rate": 5e-3, "clip": 0.5, "save_every": 100}
MIXTURE = {"forward_kl": 1.0, "cross_entropy": 0.5}
Job = dict[str, Any]


@pytest.fixture
def jobs(
    tmp_path: Path,
    build_base: Callable[..., LlamaForCausalLM],
    build_student: Callable[[PreTrainedModel, list[str]], HyloForCausalLM],
) -> list[Job]:
    """Both kinds of stage: embeddings tied and not, a cache, a frozen head, recomputation, two passes to a step."""
    for tied in (True, False):
        base = build_base(tie_word_embeddings=tied, vocab_size=63)  # of which one process has one row less
        base.save_pretrained(tmp_path / f"base-{tied}")
        build_student(base, ["gated_deltanet", "mla", "mamba2"]).save_pretrained(tmp_path / f"student-{tied}")

    def job(kind: str, tied: bool, **changes: object) -> Job:
        names = {"base": f"base-{tied}", "student": f"student-{tied}"}
        return {"kind": kind, "training": SETTINGS | changes} | {key: str(tmp_path / n) for key, n in names.items()}

    return [
        job("align", True, objective="layers"),
        job("extend", True, gradient_checkpointing=True, micro_rows=1),
        job("extend", True, teacher="cache", trains="all_but_head"),
        job("extend", False, objective=MIXTURE, trains="all_but_head"),
    ]


def outputs(jobs: list[Job], folder: Path) -> list[Job]:
    return [job | {"out": str(folder / f"{i}")} for i, job in enumerate(jobs)]


def curve(out: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same(got: str, want: str) -> None:
    assert len(curve(got)) == STEPS
    assert curve(got) == pytest.approx(curve(want), rel=0, abs=1e-5)
    ours, theirs = Weights(Path(got)), Weights(Path(want))
    assert ours.shapes == theirs.shapes
    for name in ours.shapes:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_two_processes_equal_one_by_either_launcher(jobs: list[Job], tmp_path: Path) -> None:
    alone = outputs(jobs, tmp_path / "alone")
    for job in alone:
        run_job(job)
        assert curve(job["out"])[-1] < 0.95 * curve(job["out"])[0]  # so that there is something to be equal
    for launcher, some in ((torchrun, jobs), (accelerate, jobs[:2])):
        together = outputs(some, tmp_path / launcher.__name__)
        told = train_together(together, launcher)
        for one, two in zip(alone, together, strict=False):
            assert_same(two["out"], one["out"])
        held = [value for what, value in told if what == "held"]
        assert len(held) == 2 * len(some)
        assert_halves(held[-2:], some[-1])


def test_a_signal_to_one_process_stops_both_and_both_go_on(jobs: list[Job], tmp_path: Path) -> None:
    undisturbed = outputs(jobs[:2], tmp_path / "undisturbed")
    stopped = [job | {"stop_at": 7} for job in outputs(jobs[:2], tmp_path / "stopped")]
    again = outputs(jobs[:2], tmp_path / "stopped")
    told = train_together([*undisturbed, *stopped, *again], torchrun)
    assert [step for what, step in told if what == "stopped"] == [8] * 4
    for one, two in zip(undisturbed, again, strict=True):
        assert curve(one["out"]) == curve(two["out"])
        ours, theirs = (Weights(Path(job["out"])) for job in (one, two))
        for name in ours.shapes:
            assert torch.equal(ours[name], theirs[name]), name


def test_both_refuse_what_is_not_finite_in_the_same_words(jobs: list[Job], tmp_path: Path) -> None:
    """A weight that only one process holds is NaN, or so large that what its layer gives overflows."""
    damaged = []
    for i, value in enumerate((math.nan, 1e38)):
        model = HyloForCausalLM.from_pretrained(jobs[0]["student"])
        model.model.layers[1].mlp.up_proj.weight.data[-1, :] = value
        model.save_pretrained(tmp_path / f"damaged-{i}")
        changes = {"student": str(tmp_path / f"damaged-{i}")}
        damaged += [job | changes | {"training": job["training"] | {"bad_batches": 0}} for job in jobs[:2]]
    told = train_together(outputs(damaged, tmp_path / "out")[1:], torchrun)
    errors = [value for what, value in told if what == "error"]
    assert len(errors) == 6 and errors[::2] == errors[1::2]
    assert "model.layers.1.mlp.up_proj.weight holds nan" in errors[0]
    assert "the loss of layer 1 is inf" in errors[2]
    for error in (errors[2], errors[4]):
        assert "what model.layers.1.mlp.up_proj gives is inf" in error


@pytest.mark.parametrize("kind", ["align", "extend"])
def test_accumulation_is_one_pass(kind: str, jobs: list[Job], tmp_path: Path) -> None:
    (job,) = [job for job in jobs[:2] if job["kind"] == kind]
    for micro_rows in (1, 4):
        training = job["training"] | {"micro_rows": micro_rows}
        run_job(job | {"training": training, "out": str(tmp_path / f"of-{micro_rows}")})
    assert_same(str(tmp_path / "of-1"), str(tmp_path / "of-4"))


def test_a_whole_run_is_the_same_in_two_processes(tiny_base: Path, text_file: Path, tmp_path: Path) -> None:
    """From the command line; what the first process refuses ends both."""
    stage = {"length": 32, "rows": 2, "tokens": 256, "learning_rate": 1e-3}
    recipe = {
        "base": str(tiny_base),
        "layout": "1MLA2GDN",
        "geometry": {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12},
        "data": {"text": [str(text_file)], "facts": 0.5},
        "stages": [stage | {"objective": "layers", "layers_at_once": 2}, stage | {"length": 64}],
        "yarn_original_length": 32,
        "evaluate": {"lengths": [256], "answers": 16, "tokens": 256},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = hylo("upcycle", tmp_path / "recipe.yaml", "--out", alone)
    assert done.returncode == 0, done.stderr
    done = run(torchrun(2, "-m", "hylo", "upcycle", tmp_path / "recipe.yaml", "--out", together))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("extended-64: done in") == 1
    for name in ("converted", "aligned", "extended-64"):
        ours, theirs = Weights(alone / name), Weights(together / name)
        assert ours.shapes == theirs.shapes
        for tensor in ours.shapes:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=1e-5, msg=f"{name} {tensor}")
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (alone, together))
    assert [stage["name"] for stage in one["stages"]] == [stage["name"] for stage in two["stages"]]
    failed = run(torchrun(2, "-m", "hylo", "upcycle", tmp_path / "recipe.yaml", "--out", together, "--set", "seed=1"))
    assert "another recipe" in failed.stderr and "Connection closed" not in failed.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 3}, "rows 3 cannot be shared out to 2 devices; change rows"),
        ({"rows": 6, "micro_rows": 2}, "rows 6 cannot be shared out to 2 devices of 2 rows at once; change rows"),
        ({"rows": 1}, "rows 1 cannot be shared out to 2 devices; change rows"),
    ],
)
def test_rows_that_do_not_divide(settings: Job, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.distill.arguments.world_size", lambda: 2)
    with pytest.raises(HyloError, match=message):
        rows_at_once(Training.model_validate(SETTINGS | settings))


def train_together(jobs: list[Job], launcher: Callable[..., list[str]]) -> list[tuple[str, Any]]:
    """What the two processes tell, in order."""
    done = run(launcher(2, HELPERS / "train_stages.py", json.dumps(jobs)))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def assert_halves(held: list[dict[str, int]], job: Job) -> None:
    """Each of two processes has half of the weights and of what belongs to them; nothing frozen has moments."""
    student, teacher = (sum(map(math.prod, Weights(Path(job[key])).shapes.values())) for key in ("student", "base"))
    frozen = 63 * 32 if job["training"].get("trains") == "all_but_head" else 0
    whole = {"student": student, "teacher": teacher, "moments": 2 * (student - frozen)}
    for key, numbers in whole.items():
        assert sum(one[key] for one in held) == numbers
        assert max(one[key] for one in held) < 0.52 * numbers
