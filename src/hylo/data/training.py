"""The rows that training reads and the text that evaluation reads, tokenised once and mapped into memory."""

import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hylo.convert.calibration import calibration_rows
from hylo.data.mixture import MixedRows, Pool
from hylo.data.packing import Corpus, PackedStream, Pieces, training_pieces
from hylo.data.records import read_preferences, read_prompts
from hylo.data.retrieval import FactFormat
from hylo.data.settings import Data, DocumentSource, RecordSource, TextSource, source_name
from hylo.data.sources import HELD_OUT_SHARE
from hylo.data.token_cache import TokenCache, tokenised
from hylo.errors import HyloError

Part = tuple[float, float]  # of every source: from where to where, between 0 and 1

WHOLE: Part = (0.0, 1.0)
HELD_OUT_MOST = 1 << 22  # tokens of a source: more than an evaluation reads


class TrainingData:
    """What a run reads of its sources. Nothing is read before it is asked for.

    Tokens are kept in `cache`, or else in $HYLO_CACHE, or else in ~/.cache/hylo/tokens; see hylo.data.token_cache.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.data, self.tokenizer, self.console = data, tokenizer, console
        self.cache = cache or default_cache()

    def rows(self, stage: str, seed: int, part: Part = WHOLE) -> "StageRows":
        """The rows of a stage, of its part of the data; another stage, or another seed, has another order.

        Parts that do not overlap have no token in common.
        """
        return StageRows(self, stage, seed, part)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Text that is never trained on, (tokens,) int32: data.held_out, or a twentieth of every source."""
        if self.data.held_out:
            return np.concatenate([_set_aside(self._tokenised(source)) for source in self.data.held_out])
        return np.concatenate([PackedStream(self.corpus, held_out)[:] for _, held_out in self._split])

    @cached_property
    def facts(self) -> FactFormat:
        return FactFormat.of(self.tokenizer)

    @cached_property
    def corpus(self) -> Corpus:
        """All of the text, source by source. Raises HyloError for sources that cannot be read or hold nothing."""
        if not self.data.documents:
            raise HyloError("data.sources has preferences alone; name a source of text beside them")
        return Corpus([self._tokenised(source) for source in self.data.documents])

    def pieces(self, part: Part = WHOLE) -> list[Pieces]:
        """What is to be trained on of each source, in the random order that parts are cut from."""
        return [train.cut(*(round(edge * train.tokens) for edge in part)) for train, _ in self._split]

    def calibration(self, tokens: int, length: int, part: Part = WHOLE) -> Tensor:
        """About `tokens` tokens of training text as rows evenly spread over `part`, (rows, length) int64."""
        return calibration_rows(PackedStream(self.corpus, Pieces.joined(self.pieces(part))), tokens, length)

    def prompts(
        self, stage: str, seed: int, part: Part = WHOLE, tokens: int = 128, count: int | None = None
    ) -> list[dict[str, str]]:
        """What a student is to continue: at most `count` of {"prompt": str} from `part`, in a random order.

        Of conversations and questions everything before the last answer, through the chat template, where that has no
        more than `tokens` tokens; of plain text runs of `tokens` tokens.
        """
        rng = np.random.default_rng(_seed(stage, seed))
        found: list[str] = []
        for source, first, pieces in zip(self.data.documents, self.corpus.first, self.pieces(part), strict=False):
            if isinstance(source, TextSource) or source.text:
                found += self._openings(pieces, rng, tokens, count)
            else:
                found += self._questions(source, pieces.places - first, rng, tokens, count)
        return [{"prompt": found[i]} for i in rng.permutation(len(found))[:count]]

    def preferences(self, stage: str, seed: int, part: Part = WHOLE) -> list[dict[str, str]]:
        """The pairs of `part`, {"prompt", "chosen", "rejected"}, each a str, in a random order."""
        if not self.data.preferences:
            raise HyloError("data.sources has no preferences; name a source with prompt, chosen and rejected")
        pairs = [pair for source in self.data.preferences for pair in read_preferences(source, self.tokenizer)]
        order = np.random.default_rng(self.data.seed).permutation(len(pairs))
        begin, end = (round(edge * len(pairs)) for edge in part)
        order = np.random.default_rng(_seed(stage, seed)).permutation(order[begin:end])
        return [pairs[i] for i in order]

    @cached_property
    def _split(self) -> list[tuple[Pieces, Pieces]]:
        """Of every source what is trained on and what is held out."""
        given = bool(self.data.held_out)
        return [
            training_pieces(cache, first, (self.data.seed, i), HELD_OUT_SHARE, HELD_OUT_MOST, given)
            for i, (cache, first) in enumerate(zip(self.corpus.caches, self.corpus.first, strict=False))
        ]

    def _tokenised(self, source: DocumentSource) -> TokenCache:
        return tokenised(source, self.tokenizer, self.cache, self.console)

    def _openings(self, pieces: Pieces, rng: np.random.Generator, tokens: int, count: int | None) -> list[str]:
        runs = np.maximum(1, pieces.lengths // tokens)
        piece = np.repeat(np.arange(len(runs)), runs)
        skipped = (np.arange(len(piece)) - np.repeat(np.cumsum(runs) - runs, runs)) * tokens
        chosen = rng.permutation(len(piece))[:count]
        ids = [
            self.corpus.read(int(pieces.places[p] + skip), min(tokens, int(pieces.lengths[p])))
            for p, skip in zip(piece[chosen], skipped[chosen], strict=True)
        ]
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _questions(
        self, source: RecordSource, places: np.ndarray, rng: np.random.Generator, tokens: int, count: int | None
    ) -> list[str]:
        cache = self._tokenised(source)
        starts = rng.permutation(places)[: None if count is None else 2 * count]  # some will be too long
        places_of = [place for place in (cache.place(int(start)) for start in starts) if place.token == 0]
        wanted = [(place.file, place.record) for place in places_of]
        prompts = read_prompts(source, self.tokenizer, wanted)
        texts = [prompts[place] for place in wanted if prompts[place]]
        lengths = map(len, self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids) if texts else []
        return [text for text, length in zip(texts, lengths, strict=True) if length <= tokens][:count]


class StageRows:
    """The rows of one stage: a Dataset of {"input_ids", "position_ids"}, each (T,), by length and count."""

    def __init__(self, data: TrainingData, stage: str, seed: int, part: Part) -> None:
        self.data, self.stage, self.seed, self.part = data, stage, seed, part

    def __call__(self, length: int, count: int) -> MixedRows:
        """Raises HyloError if the part holds less than is asked for."""
        settings = self.data.data
        facts = self.data.facts if settings.facts else None
        seed = _seed(self.stage, self.seed)
        return MixedRows(self.pools, length, count, seed, facts, settings.facts, settings.boundaries, settings.epochs)

    @cached_property
    def pools(self) -> list[Pool]:
        """Sources with weights stand alone; without, they are one pool, so that each gives as much as it has."""
        sources, corpus, pieces = self.data.data.documents, self.data.corpus, self.data.pieces(self.part)
        weights = [source.weight for source in sources if source.weight is not None]
        if not weights:
            name = ", ".join(source_name(source) for source in sources)
            return [Pool(name, 1.0, PackedStream(corpus, Pieces.joined(pieces)))]
        return [
            Pool(source_name(source), weight, PackedStream(corpus, part))
            for source, weight, part in zip(sources, weights, pieces, strict=True)
        ]

    @property
    def identity(self) -> dict[str, Any]:
        """What fixes the rows, as JSON values: equal if a resumed run reads what it would have read."""
        settings = self.data.data
        return {
            "stage": self.stage,
            "seed": self.seed,
            "part": list(self.part),
            "sources": [f"{_brief(cache.name)} ({cache.digest[:16]})" for cache in self.data.corpus.caches],
            "weights": [source.weight for source in settings.documents],
            "held_out": bool(settings.held_out),
            "facts": settings.facts,
            "boundaries": settings.boundaries,
            "epochs": settings.epochs,
            "order": settings.seed,
        }


def default_cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HYLO_CACHE") or Path(folder) / "hylo" / "tokens")


def _set_aside(cache: TokenCache) -> np.ndarray:
    """Text given to evaluate on: all of it, but of the standard library what it never gives to train on."""
    mine = cache.held_out != 0
    return cache.tokens if mine.all() else cache.tokens[np.repeat(mine, np.diff(cache.offsets))]


def _seed(stage: str, seed: int) -> int:
    return zlib.crc32(f"{seed} {stage}".encode())


def _brief(name: str) -> str:
    """A source's name without its folders, so that a run can be moved."""
    kind, _, paths = name.partition(" ")
    return f"{kind} {', '.join(Path(path).name for path in paths.split(', '))}"
