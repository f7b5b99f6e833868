"""A model as lm-eval asks it: answers that are on record are not asked for again, the rest come in batches."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedModel

from hylo.evaluate.generation import is_out_of_memory
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import BAD_INPUT, Records

MOST_ROWS = 64  # of a batch, as lm-eval's own
CPU_BYTES = 2 << 30  # that a batch may take where nothing tells how much is free
NEW_TOKENS = 256  # that lm-eval generates where a task does not say
FAILED_TEXT, FAILED_SCORE = "", (-1e9, False)  # what lm-eval is told of a request that failed


class RecordedLM(LM):
    """Answers from `done`, and from `asked` what is not there, a batch at a time, each recorded as it comes.

    `asked` is a TemplateLM of lm-eval's: its HFLM, or a served model. `failed` holds why requests raised, by key; they
    are asked again the next time. `truncated`: samples that are longer than the model's context, cut at their left.
    """

    def __init__(self, asked: Any, batches: "Batches", done: Records, bar: Bar, name: str, stderr: TextIO) -> None:
        super().__init__()
        self.asked, self.batches, self.done, self.bar, self.name = asked, batches, done, bar, name
        self.failed: dict[str, str] = {}
        self.truncated: set[tuple[str, int]] = set()
        self._stderr = stderr  # for our bar, where lm-eval's are silenced

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        rows = self._rows(requests)
        return [(row["loglikelihood"], row["greedy"]) if row else FAILED_SCORE for row in rows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [row["text"] if row else FAILED_TEXT for row in self._rows(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError  # of no task here

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.asked.apply_chat_template(chat_history, add_generation_prompt))

    @property
    def tokenizer_name(self) -> str:
        return str(self.asked.tokenizer_name)

    def _rows(self, requests: list[Instance]) -> list[dict[str, Any] | None]:
        """The record of each request, None of those that failed."""
        keys = [key_of(str(request.task_name), request.args) for request in requests]
        lengths = self.batches.lengths(requests)
        todo = self._missing(requests, keys, lengths)
        self.bar.begin(f"{self.name}, {_names(requests)}", sum(length for _, _, length in todo))
        with contextlib.redirect_stderr(self._stderr):
            while todo:
                rows = self.batches.rows(todo[0][1], [length for _, _, length in todo])
                batch, todo = todo[:rows], todo[rows:]
                answers = self._ask([request for _, request, _ in batch])
                for (key, _, length), record in zip(batch, answers, strict=True):
                    self.done.add(key, record)
                    self.bar.advance(length)
        self.failed |= {key: self.done[key]["error"] for key in keys if "error" in self.done[key]}
        self.truncated |= {
            _sample(request)
            for request, length in zip(requests, lengths, strict=True)
            if self.batches.context is not None and length > self.batches.context
        }
        return [None if key in self.failed else self.done[key] for key in keys]

    def _missing(
        self, requests: list[Instance], keys: list[str], lengths: list[int]
    ) -> list[tuple[str, Instance, int]]:
        """What is to be asked, the longest first, so that memory ends at once or not at all.

        The choices of a sample stay together: of those of one token, lm-eval reads their context once.
        """
        longest: dict[tuple[str, int], int] = {}
        for request, length in zip(requests, lengths, strict=True):
            longest[_sample(request)] = max(length, longest.get(_sample(request), 0))
        order = sorted(range(len(keys)), key=lambda i: (-longest[_sample(requests[i])], _sample(requests[i]), i))
        missing = {
            keys[i]: (keys[i], requests[i], lengths[i])
            for i in order
            if keys[i] not in self.done or "error" in self.done[keys[i]]
        }
        return list(missing.values())

    def _ask(self, requests: list[Instance]) -> Iterator[dict[str, Any]]:
        """A record for each request. A batch that raises is halved, until memory holds it or the culprit is alone."""
        try:
            records = self._answers(requests)
        except BAD_INPUT:
            raise
        except Exception as error:  # of any class: a request that fails is recorded, and the rest go on
            if len(requests) == 1:
                records = [{"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}]
            else:
                cut = len(requests) // 2
                if is_out_of_memory(error):
                    self.batches.halve(len(requests))
                records = []
        if records:
            yield from records
        else:  # out of the handler, whose traceback holds the tensors of the batch
            torch.cuda.empty_cache()
            yield from self._ask(requests[:cut])
            yield from self._ask(requests[cut:])

    def _answers(self, requests: list[Instance]) -> list[dict[str, Any]]:
        if requests[0].request_type == "generate_until":
            return [{"text": text} for text in self.asked.generate_until(requests, disable_tqdm=True)]
        pairs = self.asked.loglikelihood(requests, disable_tqdm=True)
        return [{"loglikelihood": value, "greedy": greedy} for value, greedy in pairs]


class Batches:
    """How many requests go at once: `batch` rows, or for "auto" as many as `tokens` of the longest row allow."""

    def __init__(
        self, tokenizer: Any, context: int | None, batch: int | str, tokens: dict[str, int] | None = None
    ) -> None:
        self._tokenizer, self.context, self._tokens = tokenizer, context, tokens if batch == "auto" else None
        self._most = MOST_ROWS if batch == "auto" else int(batch)

    def lengths(self, requests: list[Instance]) -> list[int]:
        """Tokens that each request reads and may write, those beyond the context too."""
        texts = ["".join(part for part in request.args if isinstance(part, str)) for request in requests]
        rows = self._tokenizer(texts)["input_ids"]
        return [len(row) + new_tokens(request) for row, request in zip(rows, requests, strict=True)]

    def rows(self, first: Instance, lengths: list[int]) -> int:
        """How many of the requests, `first` first, go in the next batch."""
        if self._tokens is None:
            return self._most
        longest = max(lengths[: self._most])
        return max(1, min(self._most, self._tokens[first.request_type] // min(longest, self.context or longest)))

    def halve(self, rows: int) -> None:
        """After a batch of so many rows that memory did not hold."""
        self._most = max(1, rows // 2)


def token_budget(model: PreTrainedModel) -> dict[str, int]:
    """Tokens that a batch may hold in half of the GPU's free memory, or 2 GiB on a CPU.

    A token takes its scores over the vocabulary, and their log-softmax; in a generation, its layers' activations.
    """
    config = model.config
    room = torch.cuda.mem_get_info()[0] // 2 if model.device.type == "cuda" else CPU_BYTES
    return {
        "loglikelihood": room // (12 * config.vocab_size),
        "generate_until": room // (8 * config.num_hidden_layers * config.hidden_size),
    }


def new_tokens(request: Instance) -> int:
    """Tokens that a request may generate."""
    return request.args[1].get("max_gen_toks", NEW_TOKENS) if request.request_type == "generate_until" else 0


def key_of(task: str, asked: Sequence[Any]) -> str:
    """TASK/HASH, the hash of all that the model is given."""
    return f"{task}/{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:20]}"


def _sample(request: Instance) -> tuple[str, int]:
    return str(request.task_name), int(request.doc_id or 0)


def _names(requests: list[Instance]) -> str:
    names = list(dict.fromkeys(str(request.task_name) for request in requests))
    return names[0] if len(names) == 1 else f"{len(names)} tasks"
