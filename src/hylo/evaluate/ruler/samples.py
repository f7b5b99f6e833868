"""Samples of a task: as many tokens as a length allows, counted with the model's own tokenizer.

What a sample holds is fixed by seed, task, length and its number alone: 20 samples are the first 20 of 100. How large
each is has to be found by tokenising it; that number is kept on disk, in CACHE/ruler/TASK-LENGTH-KEY.json.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hylo.errors import HyloError
from hylo.evaluate.records import evaluations_cache
from hylo.evaluate.ruler.encoding import Encoder
from hylo.evaluate.ruler.sources import Sources
from hylo.evaluate.ruler.task import Draft, Setting, Task, Text
from hylo.evaluate.ruler.tasks import TASKS
from hylo.evaluate.ruler.vocabulary import words_fingerprint
from hylo.files import write_json

VERSION = 1  # of the samples: any change to what they say makes another
SAVE_SECONDS = 5.0
SLACK = 1 / 1024  # of a length stays unused rather than that a sample is tokenised once more


@dataclass(frozen=True)
class Sample:
    """A prompt, up to where the answer begins, and what the answer must name.

    `prompt_tokens` counts what `encoding.encode` makes of the prompt; with `tokens_to_generate` it is at most `length`.
    """

    task: str
    length: int
    index: int
    prompt: str
    outputs: list[str]
    tokens_to_generate: int
    prompt_tokens: int


def check_tasks(
    names: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    seed: int = 0,
    samples: int = 1,
    chat: bool = False,
) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be run, in the order of `names`, and why the others cannot.

    Raises HyloError for unknown tasks, for files that cannot be used, for more samples than there are questions, and
    for lengths that some of the first `samples` samples of a task do not fit in, with the shortest known to work.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise HyloError(f"RULER has no task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    if chat and not tokenizer.chat_template:
        raise HyloError("the tokenizer has no chat template; run RULER without chat")
    tasks, not_run, short = [], {}, []
    prompts = _Prompts(tokenizer, chat)
    for task in (TASKS[name] for name in dict.fromkeys(names)):
        if task.source and (reason := sources.missing(task.source)):
            not_run[task.name] = reason
            continue
        tasks.append(task)
        for length in lengths:
            if (needed := _shortest(task, length, seed, sources, prompts, samples)) > length:
                short.append(f"{task.name} needs {needed} tokens, not {length}")
    if short:
        raise HyloError(f"too short for RULER: {', '.join(short)}; ask for lengths that suffice, or for other tasks")
    return tasks, not_run


def ruler_samples(
    task: Task | str,
    length: int,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    sources: Sources,
    chat: bool = False,
) -> Iterator[Sample]:
    """The first `count` samples of a task. Raises HyloError if one does not fit, or if the questions do not suffice."""
    task = TASKS[task] if isinstance(task, str) else task
    prompts = _Prompts(tokenizer, chat)
    setting = Setting(length, seed, sources, prompts.encoder.count_plain)
    known = _Sizes(task, setting, prompts)
    draft_of = task.drafts(setting)
    budget = length - task.tokens_to_generate
    start: tuple[int, float] | None = None
    try:
        for index in range(count):
            draft = draft_of(index)
            if index not in known.sizes:
                start = start or _start(draft_of(0), prompts.tokens, budget)
                known.add(index, _fit(draft, prompts.tokens, budget, *start, f"sample {index} of {task.name}"))
            units, tokens = known.sizes[index]
            text = draft.build(units)
            yield Sample(task.name, length, index, prompts.of(text), text.outputs, task.tokens_to_generate, tokens)
    finally:
        known.save()


class _Prompts:
    """The prompt that a tokenizer makes of a text, and its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.tokenizer, self.chat, self.encoder = tokenizer, chat, Encoder(tokenizer)

    def of(self, text: Text) -> str:
        """In a chat the body is the user's turn, and the prefix begins the assistant's."""
        if not self.chat:
            return text.body + text.prefix
        turns = [{"role": "user", "content": text.body}]
        written = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        if self.encoder.before and self.tokenizer.bos_token:  # which the encoder puts there
            written = written.removeprefix(self.tokenizer.bos_token)
        return written + text.prefix

    def tokens(self, text: Text) -> int:
        return self.encoder.count(self.of(text))


def _start(draft: Draft, count: Callable[[Text], int], budget: int) -> tuple[int, float]:
    """Where to begin looking for a sample's units, and the tokens of a unit: measured on the task's first sample."""
    units = draft.smallest
    least = count(draft.build(units))
    slope = (count(draft.build(4 * units)) - least) / (3 * units)
    for _ in range(2):
        guess = max(2 * draft.smallest, units + int((budget - least) / slope))
        slope = (count(draft.build(guess)) - least) / (guess - units)
    return units + int((budget - least) / slope), slope


def _fit(
    draft: Draft, count: Callable[[Text], int], budget: int, start: int, slope: float, what: str
) -> tuple[int, int]:
    """Units that leave less than one of them, or than SLACK, of `budget` tokens; and the tokens they make."""
    below, above = draft.smallest - 1, math.inf
    found: tuple[int, int] | None = None
    last: tuple[int, int] | None = None
    units = max(start, draft.smallest)
    while True:
        tokens = count(draft.build(units))
        if tokens <= budget:
            below, found = units, (units, tokens)
        else:
            above = units
        if above - below <= 1 or 0 <= budget - tokens < max(slope, SLACK * budget):
            break
        if last:  # the tokens of this sample's own units, where they are not far from the task's
            slope = min(max((tokens - last[1]) / (units - last[0]), slope / 2), 2 * slope)
        last = units, tokens
        units = int(min(max(units + math.floor((budget - tokens) / slope), below + 1), above - 1))
    if found is None:
        raise HyloError(f"{what} takes {tokens} tokens and more than the {budget} there are; ask for a longer length")
    return found


def _shortest(task: Task, length: int, seed: int, sources: Sources, prompts: _Prompts, samples: int) -> int:
    """`length` if the first `samples` samples fit in it, or else the next that is known to hold them."""
    while True:
        draft_of = task.drafts(Setting(length, seed, sources, prompts.encoder.count_plain))
        drafts = [draft_of(index) for index in range(samples)]
        texts = [draft.build(draft.smallest) for draft in drafts]
        room = length - task.tokens_to_generate
        # a token is at least a byte, so that most need no counting
        unclear = [text for text in texts if len(prompts.of(text).encode()) + prompts.encoder.before + 2 > room]
        needed = max((prompts.tokens(text) for text in unclear), default=0) + task.tokens_to_generate
        if needed <= length:
            return length
        length = needed  # of which the samples differ again, by some tokens


class _Sizes:
    """Units and tokens of samples, by their number, on disk."""

    def __init__(self, task: Task, setting: Setting, prompts: _Prompts) -> None:
        identity = {
            "version": VERSION,
            "task": task.name,
            "length": setting.length,
            "seed": setting.seed,
            "chat": prompts.tokenizer.chat_template if prompts.chat else None,
            "words": words_fingerprint(),
            "sources": setting.sources.fingerprint(task.source),
            "tokenizer": prompts.encoder.fingerprint(),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = evaluations_cache().parent / "ruler" / f"{task.name}-{setting.length}-{key}.json"
        self.sizes = self._read()
        self._saved, self._new = time.monotonic(), False

    def _read(self) -> dict[int, tuple[int, int]]:
        try:
            return {int(k): (int(v[0]), int(v[1])) for k, v in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError, IndexError):
            return {}  # they are found again

    def add(self, index: int, size: tuple[int, int]) -> None:
        self.sizes[index], self._new = size, True
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        if self._new:
            write_json(self.path, self._read() | self.sizes)  # another process may have found more
            self._saved, self._new = time.monotonic(), False
