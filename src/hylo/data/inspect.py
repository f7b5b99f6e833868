"""Where a run's rows come from: the sources and what each stage reads of them, what makes up a row, and which rows a
document is in."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hylo.checkpoint import read_tokenizer
from hylo.data.mixture import MixedRows
from hylo.data.training import StageRows, TrainingData
from hylo.errors import HyloError
from hylo.recipe import Recipe

EXCERPT = 24  # tokens shown of every piece of a row


class Reading(NamedTuple):
    """A stage that reads `total` rows of `length` tokens."""

    rows: StageRows
    length: int
    total: int


class Span(NamedTuple):
    """`tokens` tokens of a document from its token `first` on; they stand in the row from `at` on.

    In a row with facts `at` counts without the facts, which are strewn in between.
    """

    source: str
    file: str
    record: int
    document: int
    first: int
    tokens: int
    at: int
    place: int


class Use(NamedTuple):
    """Tokens [first, first + tokens) of a document are in a row, as they are or with facts planted among them."""

    row: int
    first: int
    tokens: int
    facts: bool


def inspect(
    recipe: Recipe, stage: str | None, row: int | None, document: int | None, run: Path | None, console: Console
) -> None:
    """Prints what a recipe's stages read: the sources in all; or what is in row `row` of a stage, the first if `stage`
    names none by its directory; or which rows of the stages read document `document`.

    `run` is a directory whose tokens are used. Raises HyloError if there is no such stage, row or document.
    """
    data = TrainingData(recipe.data, read_tokenizer(recipe.with_models().base), run and run / "data", console)
    readings = {
        each.directory: Reading(data.rows(each.directory, each.seed, part), each.length, each.steps * each.rows)
        for each, part in zip(recipe.stages, recipe.parts(), strict=True)
        if each.kind in ("layers", "distill")
    }
    if stage is not None and stage not in readings:
        raise HyloError(f"no stage {stage} reads rows of text; there are {', '.join(readings) or 'none'}")
    chosen = list(readings.values()) if stage is None else [readings[stage]]
    if row is None and document is None:
        print_totals(data, chosen, console)
    if row is not None:
        for reading in chosen[:1]:
            print_row(reading, data.tokenizer, row, console)
    if document is not None:
        for reading in chosen:
            print_document(reading, document, console)


def trace(rows: MixedRows, index: int) -> list[Span]:
    """The documents that make up a row, in its order."""
    made = rows.row(index)
    corpus, at, spans = rows.pools[made.pool].stream.corpus, 0, []
    for place, tokens in made.spans:
        cache, found = corpus.locate(place)
        spans.append(Span(cache.name, found.file, found.record, found.document, found.token, tokens, at, place))
        at += tokens
    return spans


def uses(rows: MixedRows, document: int) -> list[Use]:
    """The rows that a document is in, by their numbers. Raises HyloError if there is no such document."""
    corpus = rows.pools[0].stream.corpus
    if not 0 <= document < (documents := corpus.first_document[-1]):
        raise HyloError(f"there is no document {document}; they are numbered from 0 to {documents - 1}")
    begin, tokens = corpus.document(document)
    found = []
    for index in rows.candidates(begin, tokens):
        made = rows.row(index)
        for place, length in made.spans:
            first, end = max(place, begin), min(place + length, begin + tokens)
            if first < end:
                found.append(Use(index, first - begin, end - first, made.facts))
    return found


def print_totals(data: TrainingData, stages: Sequence[Reading], console: Console) -> None:
    table = _table("source", "documents", "tokens", "to train on", "held out")
    corpus = data.corpus
    for cache, pieces in zip(corpus.caches, data.pieces(), strict=True):
        train = pieces.tokens
        rest = len(cache.tokens) - train
        _add(table, cache.name, len(cache), len(cache.tokens), train, rest)
    console.print(table)
    table = _table("stage", "part", "length", "rows", "facts", "source", "read", "of tokens")
    for stage in stages:
        rows = stage.rows(stage.length, stage.total)
        counts = np.bincount(rows.kinds, minlength=len(rows.pools) + 1)
        part = " to ".join(f"{edge:.0%}" for edge in stage.rows.part)
        for i, (pool, count) in enumerate(zip(rows.pools, counts[1:], strict=True)):
            own = (stage.rows.stage, part, stage.length, stage.total, counts[0]) if i == 0 else ("", "", "", "", "")
            _add(table, *own, pool.name, count * stage.length, len(pool.stream))
    console.print(table)


def print_row(stage: Reading, tokenizer: PreTrainedTokenizerBase, index: int, console: Console) -> None:
    if not 0 <= index < stage.total:
        raise HyloError(
            f"stage {stage.rows.stage} has no row {index}; its rows are numbered from 0 to {stage.total - 1}"
        )
    rows = stage.rows(stage.length, stage.total)
    made = rows.row(index)
    facts = f", with facts in {sum(tokens for _, tokens in made.spans)} tokens of text" if made.facts else ""
    console.print(Text(f"{stage.rows.stage}, row {index}: {stage.length} tokens{facts}"))
    table = _table("at", "tokens", "document", "from token", "file", "record", "text")
    for span in trace(rows, index):
        corpus = rows.pools[made.pool].stream.corpus
        text = repr(tokenizer.decode(corpus.read(span.place, min(EXCERPT, span.tokens))))
        _add(table, span.at, span.tokens, span.document, span.first, span.file, span.record, text)
    console.print(table)


def print_document(stage: Reading, document: int, console: Console) -> None:
    rows = stage.rows(stage.length, stage.total)
    found = uses(rows, document)
    corpus = rows.pools[0].stream.corpus
    begin, tokens = corpus.document(document)
    cache, place = corpus.locate(begin)
    read = sum(use.tokens for use in found if not use.facts)
    console.print(
        Text(
            f"{stage.rows.stage}: document {document} is record {place.record} of {place.file}; "
            f"{read:,} of its {tokens:,} tokens are read in order, in {sum(not use.facts for use in found)} rows"
        )
    )
    table = _table("row", "from token", "tokens", "")
    for use in found:
        _add(table, use.row, use.first, use.tokens, "with facts" if use.facts else "")
    if found:
        console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    texts = ("source", "stage", "file", "text", "part", "")
    for column in columns:
        whole = column not in ("source", "file", "text")
        table.add_column(column, justify="left" if column in texts else "right", overflow="fold", no_wrap=whole)
    return table


def _add(table: Table, *values: object) -> None:
    table.add_row(*(Text(f"{value:,}" if isinstance(value, int | np.integer) else str(value)) for value in values))
