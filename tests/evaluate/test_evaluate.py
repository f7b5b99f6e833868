"""Held against transformers' own loss and generate(), and torch's kl_div."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from hylo.data.retrieval import FactFormat
from hylo.errors import HyloError
from hylo.evaluate import evaluate, evaluate_model, evaluate_models, print_results
from hylo.evaluate import evaluate as run
from hylo.evaluate.evaluate import Workload
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.needle import needle_rows, needle_score, recalled
from hylo.evaluate.perplexity import text_rows, text_score
from hylo.modeling import HyloConfig, HyloForCausalLM

VOCABULARY = 96
FACTS = FactFormat(
    prefix=[1, 2],
    keys=[[k] if k % 2 else [k, 3] for k in range(10, 30)],
    values=[[v] if v % 2 else [v, 4] for v in range(30, 50)],
    suffix=[5],
)
STREAM = np.random.default_rng(0).integers(50, VOCABULARY, 4000).astype(np.int32)


def llama(seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


class Oracle(Scorer):
    """Knows every next token of the rows it reads, all of them right or `wrong`."""

    def __init__(self, wrong: bool = False) -> None:
        self.head, self.device, self.vocabulary = torch.eye(VOCABULARY), torch.device("cpu"), VOCABULARY
        self.wrong = wrong

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        following = (ids.roll(-1, 1) + self.wrong) % VOCABULARY
        return 20.0 * F.one_hot(following, VOCABULARY).float()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches and tiles, with remainders."""
    monkeypatch.setattr("hylo.evaluate.rows.BATCH_TOKENS", 100)
    monkeypatch.setattr("hylo.evaluate.perplexity.TILE_LOGITS", 7 * VOCABULARY)


def test_perplexity_is_that_of_transformers_loss(small_pieces: None) -> None:
    model, rows = llama(), text_rows(STREAM, [48], 300, seed=0)[48]
    with torch.no_grad():
        expected = model(input_ids=rows, labels=rows).loss.exp().item()
    assert text_score(Scorer(model), rows).perplexity.value == pytest.approx(expected, rel=1e-4)


def test_kl_is_that_of_torch_on_full_logits(small_pieces: None) -> None:
    student, teacher, rows = llama(1), llama(2, hidden=64), text_rows(STREAM, [48], 300, seed=0)[48]
    with torch.no_grad():
        q, p = (m(rows).logits.double().log_softmax(-1).flatten(0, 1) for m in (student, teacher))
    expected = F.kl_div(q, p, reduction="batchmean", log_target=True).item()
    score = text_score(Scorer(student), rows, Teacher(teacher))
    assert score.kl.value == pytest.approx(expected, rel=1e-4) and expected > 0.1
    assert text_score(Scorer(teacher), rows, Teacher(teacher)).kl.value == pytest.approx(0, abs=1e-5)


def test_a_teacher_reads_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, rows = Teacher(llama()), text_rows(STREAM, [48], 300, seed=0)[48]
    first = text_score(Scorer(llama(1)), rows, teacher)
    monkeypatch.setattr(teacher, "hidden", lambda ids: pytest.fail("read again"))
    assert text_score(Scorer(llama(1)), rows, teacher) == first


def test_hybrid(small_pieces: None) -> None:
    config = HyloConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=4,
        mixers=["attention", "mla", "gated_deltanet", "mamba2"],
        initializer_range=0.2,
    )
    model, rows = HyloForCausalLM(config).eval(), text_rows(STREAM, [48], 300, seed=0)[48]
    with torch.no_grad():
        output = model(input_ids=rows, labels=rows)
        p = llama()(rows).logits
    q, p = (x.double().log_softmax(-1).flatten(0, 1) for x in (output.logits, p))
    score = text_score(Scorer(model), rows, Teacher(llama()))
    assert score.perplexity.value == pytest.approx(output.loss.exp().item(), rel=1e-4)
    assert score.kl.value == pytest.approx(F.kl_div(q, p, reduction="batchmean", log_target=True).item(), rel=1e-4)


def test_text_rows_are_distinct_windows_of_the_same_text() -> None:
    stream = np.arange(1000)
    rows = text_rows(stream, [16, 50, 64], 640, seed=3)
    assert {n: tuple(r.shape) for n, r in rows.items()} == {16: (40, 16), 50: (10, 50), 64: (10, 64)}
    assert rows[64].unique().numel() == 640 and (rows[64].diff(dim=1) == 1).all()
    assert torch.equal(rows[16].flatten(), rows[64].flatten()) and torch.equal(rows[50], rows[64][:, :50])
    assert torch.equal(rows[64], text_rows(stream, [64], 640, seed=3)[64])
    assert not torch.equal(rows[64], text_rows(stream, [64], 640, seed=4)[64])
    assert text_rows(stream, [300], 10_000, seed=3)[300].shape == (3, 300)  # all that there is
    assert text_rows(stream, [300], 10, seed=3)[300].shape == (1, 300)


@pytest.mark.parametrize("answers, rows", [(10, 3), (12, 3), (1, 2)])
def test_oracle_recalls_all_and_its_opposite_nothing(answers: int, rows: int, small_pieces: None) -> None:
    questions = needle_rows(STREAM, 80, FACTS, answers, needles=4, seed=0)
    right, wrong = needle_score(Oracle(), questions), needle_score(Oracle(wrong=True), questions)
    assert (right.accuracy, right.standard_error, right.by_depth, right.answers) == (1.0, 0.0, [1.0] * 4, 4 * rows)
    assert (wrong.accuracy, wrong.by_depth) == (0.0, [0.0] * 4)


def test_random_model_recalls_almost_nothing() -> None:
    score = needle_score(Scorer(llama()), needle_rows(STREAM, 80, FACTS, 64, needles=4, seed=0))
    assert score.accuracy < 0.15


def test_answer_counts_when_greedy_decoding_gives_it() -> None:
    """With few keys and values a random model is right now and then, so that both outcomes are compared."""
    facts = FactFormat([1], [[2], [3]], [[4], [5, 6], [7]], [8])
    model = llama(0, vocabulary=9)
    stream = np.random.default_rng(1).integers(0, 9, 400)
    rows = needle_rows(stream, 24, facts, 80, needles=2, seed=0)
    right = recalled(Scorer(model), rows)
    assert 0 < right.sum() < right.size
    for row, got in zip(rows, right, strict=True):
        in_order_of_depth = np.argsort(row.depths)
        for (start, end), found in zip([row.spans[i] for i in in_order_of_depth], got, strict=True):
            prompt = torch.from_numpy(row.ids[None, :start])
            decoded = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=end - start,
                do_sample=False,
                pad_token_id=0,
            )
            assert (decoded[0, start:].numpy() == row.ids[start:end]).all() == found


def test_standard_error_is_that_of_row_means() -> None:
    facts = FactFormat([1], [[2], [3]], [[4], [5], [7]], [8])
    rows = needle_rows(np.random.default_rng(1).integers(0, 9, 400), 24, facts, 60, needles=2, seed=0)
    scorer = Scorer(llama(0, vocabulary=9))
    means = recalled(scorer, rows).mean(1)
    assert 0 < needle_score(scorer, rows).standard_error == pytest.approx(np.sqrt(means.var(ddof=1) / len(means)))


def test_result_in_memory(tmp_path: Path) -> None:
    work = Workload([80, 128], STREAM, FACTS, answers=10, tokens=400, needles=4, seed=5)
    read: list[int] = []
    result = evaluate_model(llama(1), llama(2), work, read.append)
    assert json.loads(json.dumps(result)) == result
    for key in ("needle", "needle_se", "needle_depth", "needle_answers", "kl", "perplexity", "tokens"):
        assert list(result[key]) == ["80", "128"], key
    assert result["needle_answers"] == {"80": 12, "128": 12}  # at least 10, in rows of 4
    assert result["tokens"] == {"80": 240, "128": 384}
    assert [len(bins) for bins in result["needle_depth"].values()] == [4, 4]
    assert sum(read) == work.tokens_read == (3 * 80 + 240 + 80) + (3 * 128 + 384 + 128)
    assert result["meta"]["seed"] == 5 and set(result["meta"]["versions"]) == {"hylo", "torch", "transformers"}
    assert "kl" not in evaluate_model(llama(1), None, work)


def test_answers_per_bin() -> None:
    work = Workload([80], STREAM, FACTS, answers=6, tokens=80, needles=4, answers_per_bin=True)
    assert evaluate_model(llama(), None, work)["needle_answers"] == {"80": 24}


def test_directories(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "student")
    llama(2).save_pretrained(tmp_path / "teacher")
    work = Workload([80], STREAM, FACTS, answers=8, tokens=160, needles=4, seed=5)
    folders = {"teacher": tmp_path / "teacher", "student": tmp_path / "student"}
    results = dict(evaluate_models(folders, tmp_path / "teacher", work))
    alone = evaluate(
        folders["student"], folders["teacher"], [80], STREAM, FACTS, answers=8, tokens=160, needles=4, seed=5
    )
    expected = evaluate_model(llama(1), llama(2), work)
    assert "kl" not in results["teacher"]
    for result in (results["student"], alone):
        result["meta"]["seconds"] = expected["meta"]["seconds"]
        assert result == expected
    assert (
        run(folders["student"], None, [80], STREAM, FACTS, 8, 160, 4, precision="bf16")["meta"]["precision"]
        == "bfloat16"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stream=STREAM[:50]), "held-out text has 50 tokens, fewer than one row of 80"),
        (dict(lengths=[20]), "4 needles need"),
        (dict(needles=21), "more than the 20 different keys"),
        (dict(precision="int3"), "precision 'int3' is unknown"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(change: dict, message: str, tmp_path: Path) -> None:
    arguments = dict(lengths=[80], stream=STREAM, facts=FACTS, answers=8, tokens=160, needles=4)
    with pytest.raises(HyloError, match=message):
        evaluate(tmp_path / "none", None, **(arguments | change))  # type: ignore[arg-type]


def test_another_vocabulary() -> None:
    work = Workload([80], STREAM, FACTS, answers=8, tokens=160, needles=4)
    with pytest.raises(HyloError, match="vocabulary has 100 tokens and the model's 96"):
        evaluate_model(llama(), llama(vocabulary=100), work)


def test_table() -> None:
    teacher = {
        "needle": {"256": 1.0, "512": 0.5},
        "needle_se": {"256": 0.0, "512": 0.031},
        "perplexity": {"256": 9.5, "512": 8},
    }
    student = {"needle": {"256": 0.25}, "kl": {"256": 0.1234}, "perplexity": {"256": 12.0}}
    console = Console(width=80, record=True, file=SimpleNamespace(write=lambda s: None, flush=lambda: None))  # type: ignore[arg-type]
    print_results({"teacher": teacher, "student": student}, console)
    text = console.export_text()
    for part in ("256", "512", "teacher", "student", "50.0 (3.1)", "25.0", "0.1234", "12.00", "nats/token"):
        assert part in text, part
    print_results({"teacher": teacher}, console)
    assert "KL" not in console.export_text()


def test_the_teacher_does_not_take_other_rows_of_the_same_tokens_for_those_it_remembers() -> None:
    teacher, rows = Teacher(llama()), text_rows(STREAM, [48], 96, seed=0)[48]
    first, cut = teacher.remembered(rows), rows.reshape(-1, 24)
    assert torch.equal(teacher.remembered(cut), teacher.hidden(cut))
    assert torch.equal(teacher.remembered(rows), first)
