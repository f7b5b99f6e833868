"""On-policy distillation through TRL on hylo's own model, which writes with its own caches while it trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedModel

from hylo.checkpoint import read_tokenizer
from hylo.distill.metrics import StepMetrics
from hylo.distill.on_policy import OnPolicyTrainer, distil_on_policy
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling.loading import load_model

pytest.importorskip("trl")

QUIET = Console(quiet=True)
PROMPTS = [{"prompt": "The " * (1 + n % 3) + f"{n}th row of the table"} for n in range(80)]  # of several lengths


@pytest.fixture
def student(tiny_base: Path, tmp_path: Path, build_student: Callable[..., Any]) -> Path:
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    directory = tmp_path / "student"
    build_student(base, ["gated_deltanet", "mla", "mamba2"]).save_pretrained(directory)
    read_tokenizer(tiny_base).save_pretrained(directory)
    return directory


def settings(**changes: Any) -> Training:
    values = {"objective": "on_policy", "length": 32, "new_tokens": 8, "rows": 4, "tokens": 10 * 4 * 32}
    return Training.model_validate(values | {"save_every": 50} | {"learning_rate": 3e-3} | changes)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def kl(p: PreTrainedModel, q: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """KL(p || q) from full logits, averaged over what was written, row by row and without padding."""
    total, count = 0.0, 0
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        written = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat((prompt, written))[None]
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(model(ids).logits[0], -1)[len(prompt) - 1 : -1] for model in (p, q))
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(written)
    return total / count


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Everything that students write, by batch."""
    batches: list[dict[str, torch.Tensor]] = []
    prepare = OnPolicyTrainer._prepare_inputs

    def noted(self: OnPolicyTrainer, batch: Any) -> Any:
        batches.append(prepare(self, batch))
        return batches[-1]

    monkeypatch.setattr(OnPolicyTrainer, "_prepare_inputs", noted)
    return batches


@pytest.mark.parametrize("beta", [None, 0.5])
def test_the_student_comes_closer_on_what_it_writes(
    student: Path, tiny_base: Path, tmp_path: Path, written: list[dict[str, torch.Tensor]], beta: float | None
) -> None:
    out = tmp_path / "out"
    distil_on_policy(student, tiny_base, out, PROMPTS, settings(beta=beta), QUIET)
    losses = [step["loss"] for step in steps_of(out)]
    assert len(losses) == len(written) == 10
    before, base, after = load_model(student), load_model(tiny_base), load_model(out)
    if beta is None:
        assert losses[0] == pytest.approx(kl(before, base, written[0]), rel=1e-4)
    assert kl(after, base, written[-1]) < 0.9 * kl(before, base, written[-1])
    assert after.config.max_position_embeddings == before.config.max_position_embeddings
    assert 0 < max(batch["completion_mask"].sum(1).max().item() for batch in written) <= 8
    assert len({tuple(row) for batch in written for row in batch["completion_ids"].tolist()}) > 10  # it samples


def test_a_stopped_run_goes_on_to_the_same_weights(
    student: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = settings(save_every=2, tokens=6 * 4 * 32, micro_rows=2)
    distil_on_policy(student, tiny_base, tmp_path / "whole", PROMPTS, training, QUIET)
    measured, calls = StepMetrics.measured, []

    def killed(self: StepMetrics, *arguments: Any, **others: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        measured(self, *arguments, **others)

    with monkeypatch.context() as patched:
        patched.setattr(StepMetrics, "measured", killed)
        with pytest.raises(KeyboardInterrupt):
            distil_on_policy(student, tiny_base, tmp_path / "cut", PROMPTS, training, QUIET)
    torch.manual_seed(5)  # the checkpoint brings the random state that the student writes with
    distil_on_policy(student, tiny_base, tmp_path / "cut", PROMPTS, training, QUIET)
    assert [s["loss"] for s in steps_of(tmp_path / "cut")] == [s["loss"] for s in steps_of(tmp_path / "whole")]
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_prompts_are_cut_to_the_room_there_is(
    student: Path, tiny_base: Path, tmp_path: Path, written: list[dict[str, torch.Tensor]]
) -> None:
    prompts = [{"prompt": "The row \u2603\u2603 of " * n} for n in (1, 20, 30, 40)]  # a snowman is several tokens
    distil_on_policy(student, tiny_base, tmp_path / "out", prompts, settings(tokens=4 * 32), QUIET)
    lengths = written[0]["prompt_mask"].sum(1).tolist()
    assert min(lengths) < 20 and max(lengths) <= 24 and sorted(lengths)[1] >= 20


def test_special_tokens_are_those_of_the_prompt(
    student: Path, tiny_base: Path, tmp_path: Path, written: list[dict[str, torch.Tensor]]
) -> None:
    """A tokenizer that begins texts with a token of its own, as Llama's does, whose chat template has it too."""
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(student / "tokenizer.json"))
    assert read_tokenizer(student)("The")["input_ids"][0] == 0
    prompts = [{"prompt": "The row"}, {"prompt": "<|end|>The row"}]
    distil_on_policy(student, tiny_base, tmp_path / "out", prompts, settings(tokens=2 * 32, rows=2), QUIET)
    rows = zip(written[0]["prompt_ids"], written[0]["prompt_mask"], strict=True)
    plain, begun = sorted((ids[mask.bool()].tolist() for ids, mask in rows), key=len)
    assert begun == [0, *plain] and plain[0] != 0


def test_bad_input_is_named(student: Path, tiny_base: Path, base_directory: Path, tmp_path: Path) -> None:
    def fails(match: str, teacher: Path = tiny_base, prompts: list[dict[str, str]] = PROMPTS, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match) as error:
            distil_on_policy(student, teacher, tmp_path / "out", prompts, settings(**changes), QUIET)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    fails("10 steps of 4 prompts need 40, and there are 3; lower tokens to 96", prompts=PROMPTS[:3])
    fails("new_tokens 32 leave no room", new_tokens=32)
    fails("length 513 exceeds the 512 tokens", length=513)
    fails("vocabulary of 64", teacher=base_directory)
