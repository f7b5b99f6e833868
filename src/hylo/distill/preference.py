"""DPO, the last stage of hylo's predecessors: answers that people chose become likelier than those they rejected.

With r = log p(answer | prompt) - log p_0(answer | prompt), p_0 the student as it was when the stage began, the loss of
a pair is -log sigmoid(beta (r_chosen - r_rejected)) (arXiv 2305.18290). The predecessors trained with beta 0.01 and
learning rate 5e-7 (X-EcoMLA, arXiv 2503.11132; Zebra-Llama, arXiv 2505.17272); hylo's own releases stop before it. The
loop, the loss and the tokens of a pair are those of TRL's DPOTrainer.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from hylo.distill.arguments import training_arguments
from hylo.distill.resumable import Resumable
from hylo.distill.settings import Training
from hylo.distill.student import choose_weights, load_student
from hylo.distill.trainer import stage_output
from hylo.distill.trl_stage import check_context, digest, read_plain_tokenizer, trl_arguments, undisturbed
from hylo.errors import HyloError

BETA = 0.01


def optimise_preferences(
    student: Path,
    out: Path,
    preferences: list[dict[str, str]],
    training: Training,
    console: Console | None = None,
) -> None:
    """Trains the model in `student` on pairs {"prompt", "chosen", "rejected"}, in their order, and saves it as `out`.

    `training.rows` are pairs here. Of a prompt and its answer the first `training.length` tokens are read, and pairs
    whose prompt has as many are left out. The model's context stays what it is. Raises HyloError if there are too few
    pairs, if the length exceeds the context, or if losses are not finite.
    """
    tokenizer = read_plain_tokenizer(student)
    pairs = choose_pairs(preferences, training, tokenizer)
    model = load_student(student)
    check_context(model, student, training)
    choose_weights(model, student, training.trains)
    reference = load_student(student).requires_grad_(False)
    identity = {"preferences": digest(pairs)}
    with stage_output(model, student, out, "dpo", training, console, identity) as (work, metrics), undisturbed(model):
        arguments = training_arguments(
            training,
            work,
            DPOConfig,
            beta=training.beta or BETA,
            max_length=training.length,
            **trl_arguments(training),
        )
        trainer = PreferenceTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            work=work,
            metrics=metrics,
            training=training,
        )
        trainer.train()


def choose_pairs(
    preferences: Iterable[dict[str, str]], training: Training, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """The pairs that a stage trains on. Raises HyloError if there are too few."""
    needed = training.steps * training.rows
    lengths = ((pair, len(tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"])) for pair in preferences)
    pairs = list(itertools.islice((pair for pair, length in lengths if length < training.length), needed))
    if len(pairs) < needed:
        raise HyloError(
            f"{training.steps} steps of {training.rows} pairs need {needed} whose prompt is shorter than "
            f"{training.length} tokens, and there are {len(pairs)}; lower tokens, or raise length"
        )
    return pairs


class PreferenceTrainer(Resumable, DPOTrainer):
    """TRL's, with pairs in order and hylo's checkpoints and metrics."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # the data are shuffled already
