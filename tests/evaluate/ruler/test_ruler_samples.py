"""Samples fill a length as nearly as their haystack allows, depend on their number alone, and are found once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruler_sources import write_sources
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hylo.errors import HyloError
from hylo.evaluate.ruler import TASKS, Sources, check_tasks, encode, ruler_samples
from hylo.evaluate.ruler.encoding import Encoder
from hylo.evaluate.ruler.niah import NOISE

TEMPLATE = "{{ bos_token }}{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>{% endfor %}"
OPENED = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that have been tokenised."""
    prompts: list[str] = []
    count = Encoder.count

    def counting(self: Encoder, prompt: str) -> int:
        prompts.append(prompt)
        return count(self, prompt)

    monkeypatch.setattr(Encoder, "count", counting)
    return prompts


def unit_tokens(name: str, tokenizer: PreTrainedTokenizerBase, sources: Sources) -> int:
    """Tokens that the largest unit of a task's haystack may take."""
    longest = {
        "niah_single_1": NOISE + "\n",
        "vt": NOISE + "\n",
        "niah_multikey_2": "One of the special magic numbers for extraordinary-grandmother is: 1234567.\n",
        "niah_multikey_3": f"One of the special magic uuids for {'a1-b2' * 8} is: {'c3-d4' * 8}.\n",
        "cwe": "1234. extraordinary " * 6,
        "fwe": " abcdef" * 4,
    }.get(name, "extraordinary ")
    if source := TASKS[name].source:
        if source != "essays":
            longest = "Document 123:\n\n" + max(sources.questions(source).documents, key=len)
    return len(encode(tokenizer, longest))


@pytest.mark.parametrize("length", [1536, 6144])
@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_to_within_a_unit(
    name: str, length: int, tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> None:
    for sample in ruler_samples(name, length, 4, tokenizer, 0, sources):
        assert sample.prompt_tokens == len(tokenizer(sample.prompt).input_ids) == len(encode(tokenizer, sample.prompt))
        unused = length - sample.prompt_tokens - sample.tokens_to_generate
        assert 0 <= unused <= unit_tokens(name, tokenizer, sources)
        assert (sample.task, sample.length) == (name, length)


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_their_number_not_on_how_many_there_are(
    name: str, tokenizer: PreTrainedTokenizerBase, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two = list(ruler_samples(name, 1536, 2, tokenizer, 0, sources))
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "another"))
    five = list(ruler_samples(name, 1536, 5, tokenizer, 0, sources))
    assert five[:2] == two and len({sample.prompt for sample in five}) == 5
    assert [sample.index for sample in five] == list(range(5))
    other = list(ruler_samples(name, 1536, 2, tokenizer, 1, sources))
    assert all(a.prompt != b.prompt for a, b in zip(two, other, strict=True))


def test_sizes_are_found_once(
    tokenizer: PreTrainedTokenizerBase, sources: Sources, counted: list[str], cache: Path
) -> None:
    first = list(ruler_samples("cwe", 1536, 3, tokenizer, 0, sources))
    assert len(counted) > 3
    counted.clear()
    assert list(ruler_samples("cwe", 1536, 3, tokenizer, 0, sources)) == first and not counted
    more = list(ruler_samples("cwe", 1536, 4, tokenizer, 0, sources))
    assert more[:3] == first and 0 < len(counted) < 12
    (file,) = (cache / "ruler").iterdir()
    file.write_text(file.read_text()[:7])
    assert list(ruler_samples("cwe", 1536, 4, tokenizer, 0, sources)) == more


def test_sizes_found_before_an_interruption_are_kept(
    tokenizer: PreTrainedTokenizerBase, sources: Sources, counted: list[str]
) -> None:
    samples: Iterator[object] = ruler_samples("fwe", 1536, 4, tokenizer, 0, sources)
    seen = [next(samples), next(samples)]
    samples.close()  # type: ignore[attr-defined]
    counted.clear()
    assert list(ruler_samples("fwe", 1536, 2, tokenizer, 0, sources)) == seen and not counted


def test_another_tokenizer_length_or_template_is_another_size(
    tokenizer: PreTrainedTokenizerBase, sources: Sources, cache: Path
) -> None:
    list(ruler_samples("fwe", 1536, 1, tokenizer, 0, sources))
    list(ruler_samples("fwe", 1537, 1, tokenizer, 0, sources))
    tokenizer.chat_template = TEMPLATE
    list(ruler_samples("fwe", 1536, 1, tokenizer, 0, sources, chat=True))
    tokenizer.add_tokens(["extra"])
    list(ruler_samples("fwe", 1536, 1, tokenizer, 0, sources))
    assert len(list((cache / "ruler").iterdir())) == 4


def test_special_tokens_stand_before_the_prompt_only(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = encode(tokenizer, "a row")
    tokenizer.bos_token = "<|end|>"
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", end)]
    )
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert encode(tokenizer, "a row") == [end, *plain]
    assert Encoder(tokenizer).count("a row") == len(plain) + 1
    assert Encoder(tokenizer).count_plain("a row") == len(plain)


@pytest.mark.parametrize("begins", [False, True])
def test_a_chat_holds_the_prompt_as_a_turn_and_the_prefix_after_it(
    begins: bool, tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> None:
    tokenizer.bos_token, tokenizer.chat_template = "<|end|>", TEMPLATE + OPENED
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
        )
    for sample in ruler_samples("qa_1", 1536, 2, tokenizer, 0, sources, chat=True):
        ids = encode(tokenizer, sample.prompt)
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[0] == tokenizer.eos_token_id
        assert sample.prompt_tokens == len(ids) <= 1536 - 32
        assert "<user>Answer the question" in sample.prompt
        assert sample.prompt.endswith("?</user><assistant> Answer:")


def test_a_chat_needs_a_template(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    with pytest.raises(HyloError, match="has no chat template; run RULER without chat"):
        check_tasks(["fwe"], [1536], tokenizer, sources, chat=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_length_under_a_tasks_template_is_refused_with_the_shortest_that_works(
    name: str, tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> None:
    with pytest.raises(HyloError, match=f"too short for RULER: {name} needs [0-9]+ tokens, not 150;") as error:
        check_tasks([name], [150, 8192], tokenizer, sources, samples=3)
    shortest = int(str(error.value).split(" tokens")[0].split()[-1])
    assert check_tasks([name], [shortest], tokenizer, sources, samples=3)[1] == {}
    assert len(list(ruler_samples(name, shortest, 3, tokenizer, 0, sources))) == 3
    with pytest.raises(HyloError, match=f"too short for RULER: {name} needs [0-9]+ tokens, not {shortest - 30};"):
        check_tasks([name], [shortest - 30], tokenizer, sources, samples=3)
    with pytest.raises(HyloError, match=f"sample 0 of {name} takes .* ask for a longer length"):
        list(ruler_samples(name, shortest - 100, 3, tokenizer, 0, sources))


def test_all_tasks_that_are_too_long_are_named(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    with pytest.raises(HyloError, match="too short for RULER: vt needs .*, cwe needs .*; ask for lengths that suffice"):
        check_tasks(["vt", "cwe"], [200], tokenizer, sources)


def test_unknown_tasks_are_refused(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    with pytest.raises(HyloError, match="RULER has no task 'niah_single_4'; choose from niah_single_1, .*qa_2"):
        check_tasks(["vt", "niah_single_4"], [4096], tokenizer, sources)


def test_tasks_without_their_source_are_not_run(tokenizer: PreTrainedTokenizerBase) -> None:
    tasks, not_run = check_tasks([*TASKS, "vt"], [8192], tokenizer, Sources())
    ready = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
    assert [task.name for task in tasks] == ready
    assert not_run["qa_1"] == "no squad: neither a local copy nor the hub (rajpurkar/squad_v2) was given"
    assert set(not_run) == set(TASKS) - set(ready)


def test_more_samples_than_questions_are_refused(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    check_tasks(["qa_1", "qa_2"], [4096], tokenizer, sources, samples=8)
    with pytest.raises(HyloError, match="qa_1 has 8 questions in .*dev-v2.0.json; ask for as many samples or fewer"):
        check_tasks(["qa_1"], [4096], tokenizer, sources, samples=9)


def test_what_is_kept_of_a_sample_is_its_size_alone(
    tokenizer: PreTrainedTokenizerBase, sources: Sources, cache: Path
) -> None:
    (sample,) = ruler_samples("vt", 1536, 1, tokenizer, 0, sources)
    (file,) = (cache / "ruler").iterdir()
    assert file.name.startswith("vt-1536-") and file.stat().st_size < 100
    assert json.loads(file.read_text())["0"][1] == sample.prompt_tokens
