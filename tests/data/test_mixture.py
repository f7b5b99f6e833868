"""Rows: every token of a part once an epoch, boundaries, mixtures that keep their weights, and nothing with a state."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hylo.data.mixture import MixedRows, Pool
from hylo.data.packing import Corpus, PackedStream, Pieces
from hylo.data.retrieval import FactFormat
from hylo.data.settings import JsonlSource
from hylo.data.token_cache import tokenised
from hylo.errors import HyloError

FACTS = FactFormat(
    prefix=[300, 301], keys=[[k] for k in range(310, 340)], values=[[v] for v in range(340, 360)], suffix=[302]
)
END = 256


@pytest.fixture(scope="module")
def corpus(letters: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources of 40 and 25 documents of 3 to 60 letters, each document of one letter."""
    folder, rng, caches = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for name, documents in (("a", 40), ("b", 25)):
        path = folder / f"{name}.jsonl"
        texts = [chr(33 + i + 40 * (name == "b")) * int(rng.integers(2, 60)) for i in range(documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        caches.append(tokenised(JsonlSource(kind="jsonl", paths=[str(path)]), letters, folder / "cache"))
    return Corpus(caches)


def pieces(corpus: Corpus, source: int) -> Pieces:
    offsets = corpus.caches[source].offsets
    return Pieces(offsets[:-1] + corpus.first[source], np.diff(offsets)).shuffled((source,))


def pool(corpus: Corpus, source: int, weight: float = 1.0) -> Pool:
    return Pool(f"source {source}", weight, PackedStream(corpus, pieces(corpus, source)))


def test_pieces_are_cut_without_loss(corpus: Corpus) -> None:
    whole = pieces(corpus, 0)
    stream = PackedStream(corpus, whole)[:]
    edges = [0, 1, 17, 17, 200, 201, whole.tokens - 1, whole.tokens]
    parts = [whole.cut(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    assert [part.tokens for part in parts] == np.diff(edges).tolist()
    assert (PackedStream(corpus, Pieces.joined(parts))[:] == stream).all()
    assert all((part.lengths > 0).all() for part in parts)


def test_slices_of_a_stream(corpus: Corpus) -> None:
    stream = PackedStream(corpus, Pieces.joined([pieces(corpus, 0), pieces(corpus, 1)]))
    runs = zip(stream.pieces.places, stream.pieces.lengths, strict=True)
    whole = np.concatenate([corpus.read(int(place), int(tokens)) for place, tokens in runs])
    assert len(stream) == len(whole) == sum(len(cache.tokens) for cache in corpus.caches)
    for begin, end in [(0, len(whole)), (5, 6), (100, 400), (len(whole) - 3, len(whole))]:
        assert (stream[begin:end] == whole[begin:end]).all()


@pytest.mark.parametrize("length", [7, 32, 100])
def test_an_epoch_reads_every_token_once(corpus: Corpus, length: int) -> None:
    held = pool(corpus, 0)
    count = len(held.stream) // length
    rows = MixedRows([held], length, count, seed=3)
    places = [p for i in range(count) for place, n in rows.row(i).spans for p in range(place, place + n)]
    assert len(places) == len(set(places)) == count * length
    tokens = np.concatenate([rows[i]["input_ids"] for i in range(count)])
    assert (tokens == [corpus.read(p, 1)[0] for p in places]).all()
    assert (np.bincount(tokens) <= np.bincount(held.stream[:], minlength=tokens.max() + 1)).all()


def test_epochs_have_orders_of_their_own(corpus: Corpus) -> None:
    held = pool(corpus, 0)
    count = len(held.stream) // 32
    rows = MixedRows([held], 32, 2 * count, seed=3, epochs=2)
    first, second = ([rows.row(i).spans for i in range(k * count, (k + 1) * count)] for k in range(2))
    assert first != second and rows.row(count).epoch == 1
    assert rows[0]["input_ids"].equal(MixedRows([held], 32, 1, seed=3)[0]["input_ids"])


def test_positions_restart_where_documents_do(corpus: Corpus) -> None:
    rows = MixedRows([pool(corpus, 0)], 64, 15, seed=0)
    inner = 0
    for i in range(15):
        ids, positions = rows[i]["input_ids"], rows[i]["position_ids"]
        assert ids.dtype == positions.dtype == torch.int64 and ids.shape == positions.shape == (64,)
        starts = positions == 0
        after_end = torch.cat([torch.tensor([True]), ids[:-1] == END])
        assert starts.equal(after_end)
        assert ((positions[1:] == positions[:-1] + 1) | starts[1:]).all()
        inner += int(starts[1:].sum())
    assert inner > 15


def test_without_boundaries_there_are_no_positions(corpus: Corpus) -> None:
    plain, packed = (MixedRows([pool(corpus, 0)], 64, 5, seed=0, boundaries=b) for b in (False, True))
    assert list(plain[3]) == ["input_ids"] and plain[3]["input_ids"].equal(packed[3]["input_ids"])


def test_rows_with_facts_are_one_document(corpus: Corpus) -> None:
    rows = MixedRows([pool(corpus, 0), pool(corpus, 1)], 200, 20, 0, FACTS, 1.0)
    seen = set()
    for i in range(20):
        row = rows.row(i)
        assert row.facts and rows[i]["position_ids"].equal(torch.arange(200))
        text = rows[i]["input_ids"].numpy()
        text = text[text < 300]
        assert (text == np.concatenate([corpus.read(*span) for span in row.spans])).all() and len(text) < 200
        seen.add(row.pool)
    assert seen == {0, 1}


def test_shares_hold_in_every_run_of_rows(corpus: Corpus) -> None:
    pools = [pool(corpus, 0, 3.0), pool(corpus, 1, 1.0)]
    for seed in range(5):
        kinds = MixedRows(pools, 8, 200, seed, FACTS, 0.5, epochs=9).kinds
        for kind, share in ((0, 0.5), (1, 0.375), (2, 0.125)):
            assert np.abs(np.cumsum(kinds == kind) - share * np.arange(1, 201)).max() < 3
    assert (kinds != MixedRows(pools, 8, 200, 5, FACTS, 0.5, epochs=9).kinds).any()


def test_a_row_depends_on_nothing_but_its_number(corpus: Corpus) -> None:
    def make(count: int, seed: int = 1) -> MixedRows:
        return MixedRows([pool(corpus, 0, 2.0), pool(corpus, 1, 1.0)], 40, count, seed, FACTS, 0.3, epochs=3)

    rows, longer = make(30), make(60)
    expected = [rows[i] for i in range(30)]
    sent = pickle.loads(pickle.dumps(rows))
    for i in np.random.default_rng(0).permutation(30):
        for other in (longer[int(i)], sent[int(i)]):
            assert all(other[key].equal(expected[i][key]) for key in ("input_ids", "position_ids"))
    assert any(not make(30, seed=2)[i]["input_ids"].equal(expected[i]["input_ids"]) for i in range(30))


def test_workers_read_what_one_process_reads(corpus: Corpus) -> None:
    rows = MixedRows([pool(corpus, 0)], 32, 12, 1, FACTS, 0.3)
    loaded = torch.utils.data.DataLoader(rows, batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.cat([batch["input_ids"] for batch in loaded]).equal(
        torch.stack([rows[i]["input_ids"] for i in range(12)])
    )


def test_rows_own_their_memory(corpus: Corpus) -> None:
    rows = MixedRows([pool(corpus, 0)], 8, 1, 0)
    before = rows[0]["input_ids"].clone()
    rows[0]["input_ids"][:] = -1
    assert rows[0]["input_ids"].equal(before)


def test_a_stage_longer_than_its_data(corpus: Corpus, tmp_path: Path) -> None:
    held = pool(corpus, 0)
    most = len(held.stream) // 50
    MixedRows([held], 50, 2 * most, 0, epochs=2)
    with pytest.raises(
        HyloError, match=f"source 0: the stage reads {50 * (most + 1):,} tokens, and there are {50 * most:,} in"
    ):
        MixedRows([held], 50, most + 1, 0)
    with pytest.raises(HyloError, match="source 1: the stage reads"):
        MixedRows([held, pool(corpus, 1)], 50, 2 * most, 0)
    with pytest.raises(HyloError, match=f"fewer than one sequence of {len(held.stream) + 1:,}"):
        MixedRows([held], len(held.stream) + 1, 1, 0)
