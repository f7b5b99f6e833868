"""A tokenizer as prompts need it: special tokens before the text as the model knows them, and none after it."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase


class Encoder:
    """`ids` and `count` of a prompt; `count_plain` leaves out special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._backend = _backend(tokenizer) if tokenizer.is_fast else None
        whole, plain = self._ids("a", True), self._ids("a", False)
        self.before = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.after = len(whole) - self.before - len(plain)  # as some tokenizers end every text

    def ids(self, prompt: str) -> list[int]:
        ids = self._ids(prompt, True)
        return ids[: len(ids) - self.after]

    def count(self, prompt: str) -> int:
        if self._backend is None:
            return len(self.ids(prompt))
        return len(self._backend.encode_batch_fast([prompt])[0]) - self.after  # makes no list of them

    def count_plain(self, text: str) -> int:
        return self.count(text) - self.before

    def fingerprint(self) -> str:
        """Of what decides which tokens a text becomes."""
        words: Any = self._backend.to_str() if self._backend else sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]

    def _ids(self, text: str, special: bool) -> list[int]:
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))
        return list(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as `Encoder` has them."""
    return Encoder(tokenizer).ids(prompt)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What tokenises, without the cutting and filling that it may have been saved with."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
