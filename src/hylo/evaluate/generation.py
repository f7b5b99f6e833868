"""Greedy answers to many prompts: in batches, what prompts share computed once, one prefill a prompt.

A batch is read as a tree (`hylo.evaluate.prefixes`): as long as rows agree they are one row, whose cache is repeated
where they part. Rows that have ended leave the batch. Only the last position is turned into logits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hylo.evaluate.memory import cache_bytes
from hylo.evaluate.prefixes import Tree, make_tree
from hylo.evaluate.records import BAD_INPUT

CPU_TOKENS, GPU_TOKENS = 2048, 8192  # in one forward pass; on a CPU more leave its caches and are slower
MOST_ROWS = 64
CPU_CACHE_BYTES = 2**31  # of a batch's cache
GPU_CACHE_SHARE = 0.3  # of the memory that is free when the first batch is made
SIMILAR = 0.75  # a batch's shortest prompt has at least this share of its longest's tokens


@dataclass(frozen=True)
class Prompt:
    """Token ids with the special ones, and how many tokens an answer has at most."""

    ids: list[int]
    new_tokens: int


class Generator(Protocol):
    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | Exception]]:
        """Every prompt's number with its answer, or with what went wrong, in whatever order they are ready."""


class GreedyGenerator:
    """Answers end at an end-of-sequence token of the model's generation config or of the tokenizer.

    A batch has as many rows as fit in `cache_bytes` of cache (default: by device); one that runs out of memory is
    halved, as are those after it, down to single rows. A prompt that fails alone is given back with its exception.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache_bytes: int | None = None
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ends = _end_tokens(model, tokenizer)
        self._cache_bytes = cache_bytes
        self._row_bytes: tuple[int, int] | None = None

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | Exception]]:
        groups = deque(_similar(prompts))
        while groups:
            group = groups.popleft()
            longest = max(len(prompts[i].ids) + prompts[i].new_tokens for i in group)
            rows = self._rows(longest)
            batch, rest = group[:rows], group[rows:]
            if rest:
                groups.appendleft(rest)
            answers = self._try([prompts[i] for i in batch])
            if not isinstance(answers, Exception):
                for i, answer in zip(batch, answers, strict=True):
                    yield i, self.tokenizer.decode(answer, skip_special_tokens=True)
            elif len(batch) == 1:
                yield batch[0], answers
            else:  # find the row that fails, or make room
                half = len(batch) // 2
                if is_out_of_memory(answers):
                    self._cache_bytes = half * self._bytes(longest)
                groups.extendleft([batch[half:], batch[:half]])

    def _try(self, prompts: list[Prompt]) -> list[list[int]] | Exception:
        try:
            return self.answers(prompts)
        except BAD_INPUT:
            raise
        except Exception as error:
            failed = error.with_traceback(None)  # whose frames hold the batch
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """One batch: each prompt's new token ids, without the one that ends it."""
        tree = make_tree([prompt.ids for prompt in prompts])
        device = self.model.device
        logits_BV, cache = self._prefill(tree)
        alive, mask_BS = list(tree.rows), tree.mask_BN.to(device)
        answers: list[list[int]] = [[] for _ in prompts]
        while True:
            next_B = logits_BV.argmax(-1)
            going = []
            for i, (row, token) in enumerate(zip(alive, next_B.tolist(), strict=True)):
                if token in self.ends:
                    continue
                answers[row].append(token)
                if len(answers[row]) < prompts[row].new_tokens:
                    going.append(i)
            if not going:
                return answers
            if len(going) < len(alive):
                index = torch.tensor(going, device=device)
                cache.reorder_cache(index)
                alive, next_B, mask_BS = [alive[i] for i in going], next_B[index], mask_BS[index]
            mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(alive), 1)), dim=1)
            logits_BV, cache = self._forward(next_B[:, None], mask_BS, cache)

    def _prefill(self, tree: Tree) -> tuple[Tensor, Cache]:
        device = self.model.device
        cache: Cache | None = None
        for segment in tree.segments:
            if cache is not None and segment.parents is not None:
                cache.reorder_cache(segment.parents.to(device))
            ids, mask = tree.ids_BN[segment.first].to(device), tree.mask_BN[segment.first].to(device)
            columns = max(1, (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS) // len(segment.first))
            for start in range(segment.start, segment.end, columns):
                end = min(start + columns, segment.end)
                logits_BV, cache = self._forward(ids[:, start:end], mask[:, :end], cache)
        assert cache is not None
        return logits_BV, cache

    def _forward(self, ids_BT: Tensor, mask_BS: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits (B,V) of the last position."""
        positions = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BS,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values

    def _rows(self, length: int) -> int:
        if self._cache_bytes is None:
            device, self._cache_bytes = self.model.device, CPU_CACHE_BYTES
            if device.type == "cuda":
                self._cache_bytes = int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
        return min(MOST_ROWS, max(1, self._cache_bytes // self._bytes(length)))

    def _bytes(self, length: int) -> int:
        """Of the cache of one row, measured on two short ones."""
        if self._row_bytes is None:
            short, long = (self._measure(tokens) for tokens in (8, 16))
            self._row_bytes = (long - short) // 8, 2 * short - long
        per_token, state = self._row_bytes
        return max(1, per_token * length + state)

    @torch.inference_mode()
    def _measure(self, tokens: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.model.device)
        return cache_bytes(self._forward(ids, torch.ones_like(ids), None)[1])


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU or of the CPU, for which torch has no class."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {end for end in [*listed, tokenizer.eos_token_id] if end is not None}


def _similar(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Numbers of prompts by similar length, the longest first; in a group, those that begin alike are neighbours."""
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    while waiting:
        least = SIMILAR * len(prompts[waiting[0]].ids)
        group = [i for i in waiting if len(prompts[i].ids) >= least]
        waiting = waiting[len(group) :]
        yield sorted(group, key=lambda i: prompts[i].ids)
