"""On-policy distillation: the student continues prompts in its own words, and the teacher says what it would have said.

At every position that the student wrote, its next-token distribution is held against the teacher's, by default with
the reverse KL, KL(p_s || p_t); `beta` below 1 gives the generalised Jensen-Shannon divergence with the teacher's weight
beta (GKD, arXiv 2306.13649). No gradient flows through what was sampled. The loop, the sampling and the loss, averaged
over what was written in a step, are those of TRL's DistillationTrainer.
"""

from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import DistillationConfig, DistillationTrainer

from hylo.checkpoint import model_hash
from hylo.distill.arguments import training_arguments
from hylo.distill.resumable import Resumable
from hylo.distill.settings import Training
from hylo.distill.student import choose_weights, load_student, load_teacher
from hylo.distill.trainer import stage_output
from hylo.distill.trl_stage import check_context, digest, read_plain_tokenizer, trl_arguments, undisturbed
from hylo.errors import HyloError

BETA = 1.0


def distil_on_policy(
    student: Path,
    teacher: Path,
    out: Path,
    prompts: list[dict[str, str]],
    training: Training,
    console: Console | None = None,
) -> None:
    """Distils `teacher` into the model in `student` on what it makes of {"prompt"}, in order, and saves it as `out`.

    A step takes `training.rows` prompts and at most `training.new_tokens` of an answer to each, sampled at temperature
    1; prompts are cut to `training.length` - `training.new_tokens` tokens. The model's context stays what it is. Raises
    HyloError if there are too few prompts, if the length exceeds the context, if the vocabularies differ, or if losses
    are not finite.
    """
    tokenizer = read_plain_tokenizer(student)
    chosen = choose_prompts(prompts, training, tokenizer)
    model = load_student(student)
    check_context(model, student, training)
    choose_weights(model, student, training.trains)
    live = load_teacher(teacher, student, training)
    identity = {"prompts": digest(chosen), "teacher": model_hash(teacher)}
    with (
        stage_output(model, student, out, "on-policy", training, console, identity) as (work, metrics),
        undisturbed(model),
    ):
        arguments = training_arguments(
            training,
            work,
            DistillationConfig,
            beta=training.beta or BETA,
            max_completion_length=training.new_tokens,
            shuffle_dataset=False,  # the data are shuffled already
            **trl_arguments(training),
        )
        trainer = OnPolicyTrainer(
            model=model,
            teacher_model=live,
            args=arguments,
            train_dataset=Dataset.from_list(chosen),
            processing_class=tokenizer,
            work=work,
            metrics=metrics,
            training=training,
        )
        trainer.train()


def choose_prompts(
    prompts: list[dict[str, str]], training: Training, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """The prompts that a stage trains on. Raises HyloError if there are too few, or no room for any."""
    needed, room = training.steps * training.rows, training.length - training.new_tokens
    if room < 1:
        raise HyloError(f"new_tokens {training.new_tokens} leave no room for a prompt in length {training.length}")
    if len(prompts) < needed:
        raise HyloError(
            f"{training.steps} steps of {training.rows} prompts need {needed}, and there are {len(prompts)}; "
            f"lower tokens to {len(prompts) * training.length}, or add data"
        )
    return [{"prompt": shortened(prompt["prompt"], room, tokenizer)} for prompt in prompts[:needed]]


def shortened(text: str, room: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """As much of a text, from its beginning, as makes at most `room` tokens."""
    keep = room
    while len(ids := tokenizer(text, add_special_tokens=False)["input_ids"]) > room:
        text = tokenizer.decode(ids[:keep])
        keep -= 1  # a token cut in two may come back as more
    return text


class OnPolicyTrainer(Resumable, DistillationTrainer):
    """TRL's, with hylo's checkpoints and metrics."""
