"""A model that answers over an OpenAI address, as `hylo serve` and vLLM give it: asked with token ids, many at once."""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hylo.checkpoint import model_hash, read_tokenizer
from hylo.errors import HyloError
from hylo.evaluate.generation import Prompt

IN_FLIGHT = 16  # requests at once, which the server makes batches of
ANSWER_SECONDS = 1800.0  # a long prompt may wait for others
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Served:
    """Stands where a `Subject` stands.

    `address`: http://HOST:PORT, with or without /v1; `directory`: of the model, or of its tokenizer alone; `model`: as
    the server calls it, not needed where it serves one.
    """

    name: str
    address: str
    directory: Path
    model: str | None = None

    @property
    def url(self) -> str:
        return self.address.rstrip("/").removesuffix("/v1") + "/v1"

    @cached_property
    def card(self) -> dict[str, Any]:
        """What the server says of the model. HyloError if it does not answer or does not have it."""
        try:
            listed = _ask(f"{self.url}/models", None)["data"]
            cards = {card["id"]: card for card in listed}
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise HyloError(
                f"no server answers at {self.address} ({_reason(error)}); start it, or mend the address"
            ) from (error)
        except (KeyError, TypeError) as error:
            raise HyloError(f"{self.url}/models lists no models; give the address of an OpenAI server") from error
        if self.model is None and len(cards) == 1:
            return dict(*cards.values())
        if self.model not in cards:
            asked = f"does not serve {self.model}" if self.model else "serves several models"
            raise HyloError(f"{self.address} {asked}; choose one of {', '.join(sorted(cards))}")
        return dict(cards[self.model])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.directory)

    @property
    def context(self) -> int | None:
        """Tokens that the server takes; None where it does not say, as vLLM does."""
        return self.card.get("max_model_len")

    @cached_property
    def hash(self) -> str:
        """Of what the server says the model is, of the tokenizer, and of the weights where they lie on this machine."""
        root = self.card.get("root")
        weights = model_hash(Path(root)) if root and (Path(root) / "config.json").is_file() else None
        said = [self.url, self.card["id"], root, weights, self.tokenizer.get_vocab()]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def check_context(self, lengths: list[int], what: str) -> None:
        """Raises HyloError for a length beyond the server's."""
        if self.context is not None and lengths and max(lengths) > self.context:
            raise HyloError(
                f"{what} at {max(lengths)} tokens exceeds what {self.address} takes, {self.context}; ask for shorter "
                "lengths, or start the server with a larger --max-model-len"
            )

    def identity(self) -> dict[str, Any]:
        return {"address": self.url, "model": self.card["id"]}

    def release(self) -> None:
        pass

    def complete(self, asked: dict[str, Any]) -> dict[str, Any] | Exception:
        """The choice that POST /v1/completions makes at temperature 0, with a "text"; or why this request failed.

        Raises HyloError where the server no longer answers at all.
        """
        try:
            answer = _ask(f"{self.url}/completions", {"model": self.card["id"], "temperature": 0, **asked})
            choice = answer["choices"][0]
            return {**choice, "text": str(choice["text"])}
        except (OSError, http.client.HTTPException) as error:
            if not isinstance(error, urllib.error.HTTPError):
                self._check_alive()
            return RuntimeError(_reason(error))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return RuntimeError(f"the server's answer is no completion ({error!r})")

    def _check_alive(self) -> None:
        try:
            _ask(f"{self.url}/models", None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise HyloError(
                f"{self.address} answers no more ({_reason(error)}); start it again and run this again: "
                "what it has answered is kept"
            ) from error


class ServedGenerator:
    """Greedy answers over POST /v1/completions. A request that fails is that prompt's exception.

    Raises HyloError where the server no longer answers at all.
    """

    def __init__(self, served: Served) -> None:
        self.served = served

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | Exception]]:
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            numbers = {pool.submit(self._complete, prompt): i for i, prompt in enumerate(prompts)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete(self, prompt: Prompt) -> str | Exception:
        found = self.served.complete({"prompt": prompt.ids, "max_tokens": prompt.new_tokens})
        return found if isinstance(found, Exception) else str(found["text"])


def _ask(url: str, value: Any) -> Any:
    """GET, or POST of a JSON value. Raises OSError (HTTPError for a status), HTTPException, or ValueError."""
    request = urllib.request.Request(url, None if value is None else json.dumps(value).encode())
    request.add_header("Content-Type", "application/json")
    if key := os.environ.get("OPENAI_API_KEY"):  # what `vllm serve --api-key` asks for
        request.add_header("Authorization", f"Bearer {key}")
    with _DIRECT.open(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        said = " ".join(error.read().decode(errors="replace").split())
        return f"HTTP status {error.code}: {said[:300]}"
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
