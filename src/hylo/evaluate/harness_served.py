"""A served model as lm-eval asks it: the log-probabilities of a prompt that the server echoes, and completions."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from hylo.evaluate.harness_answers import new_tokens
from hylo.evaluate.served import IN_FLIGHT, Served

Encoded = tuple[tuple[str, str], list[int], list[int]]  # texts and tokens of a context and a continuation


class ServedLM(TemplateLM):
    """Asks over POST /v1/completions, several at once, with token ids: prompts are tokenised as lm-eval's HFLM does.

    A request that fails raises RuntimeError, a server that no longer answers HyloError.
    """

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served
        self.tokenizer: PreTrainedTokenizerBase = served.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.served.directory)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = (not begins) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _loglikelihood_tokens(self, requests: list[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._several(self._score, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._several(self._write, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError  # of no task here

    def _several(self, ask: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return list(pool.map(ask, requests))

    def _score(self, request: Encoded) -> tuple[float, bool]:
        """The sum of a continuation's log-probabilities, and whether each of its tokens is the likeliest."""
        _, before, after = request
        ids = self._fitting(before + after, 1)  # a server makes one token at least
        found = self._complete({"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1})["logprobs"]
        own = slice(max(1, len(ids) - len(after)), len(ids))
        values, tops = found["token_logprobs"][own], found["top_logprobs"][own]
        if len(values) != own.stop - own.start:
            raise RuntimeError(f"the server echoes {len(found['token_logprobs'])} of {len(ids)} tokens")
        greedy = all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
        return sum(values), greedy

    def _write(self, request: Instance) -> str:
        text, asked = request.args
        ids = self._fitting(self.tok_encode(text), new_tokens(request))
        stop = [end for end in asked.get("until") or [] if end]
        written = self._complete({"prompt": ids, "max_tokens": new_tokens(request), "stop": stop or None})["text"]
        for end in stop:
            written = written.split(end)[0]
        return written

    def _fitting(self, ids: list[int], new: int) -> list[int]:
        """The end of a prompt that leaves room for `new` tokens, as HFLM cuts it."""
        return ids if self.served.context is None else ids[-(self.served.context - new) :]

    def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        found = self.served.complete(asked)
        if isinstance(found, Exception):
            raise found
        return found
