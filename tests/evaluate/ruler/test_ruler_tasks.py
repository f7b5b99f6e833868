"""The thirteen tasks: texts as the public benchmark has them, held to lm-eval's copy, and what each sample hides."""

import ast
import random
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruler_sources import write_sources
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hylo.evaluate.ruler import TASKS, Sample, Sources, niah, question_answering, ruler_samples, score, tracking, words
from hylo.evaluate.ruler.sources import Essays
from hylo.evaluate.ruler.task import Setting
from hylo.evaluate.ruler.vocabulary import all_words

LENGTH, SAMPLES = 2048, 5
NIAH = [name for name in TASKS if name.startswith("niah")]
ONE_VALUE = [name for name in NIAH if name not in ("niah_multivalue", "niah_multiquery")]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerBase, sources: Sources) -> dict[str, list[Sample]]:
    return {name: list(ruler_samples(name, LENGTH, SAMPLES, tokenizer, 0, sources)) for name in TASKS}


def texts_of(module: str) -> set[str]:
    """Every string in a file of lm-eval's RULER, with {} where an f-string has a value."""
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        pytest.skip("lm-eval is not installed")
    tree = ast.parse((Path(package.origin).parent / "tasks" / "ruler" / f"{module}.py").read_text())
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.add("".join(map(str, parts)))
    return found


def test_needle_texts_are_lm_evals() -> None:
    kind = niah.TEMPLATE.replace("{kind}", "{type_needle_v}")
    assert kind in texts_of("niah_utils")
    one = kind.replace("Some", "A").replace("are all", "is").replace("are", "is")  # as the benchmark makes it
    assert niah.ONE_TEMPLATE.replace("{kind}", "{type_needle_v}") == one
    strings = texts_of("prepare_niah")
    assert {niah.NEEDLE.replace("{kind}", "{type_needle_v}"), niah.NOISE} <= strings
    for prefix in (niah.PREFIX, niah.ONE_PREFIX):
        assert re.sub(r"{\w+}", "{}", prefix).strip() in strings


def test_tracking_texts_are_lm_evals() -> None:
    strings = texts_of("vt_utils")
    assert tracking.TEMPLATE in strings and niah.NOISE + "\n" in strings
    assert tracking.PREFIX.replace("{count}", "{num_v}").replace("assigned", "assgined") in strings  # its slip


def test_word_and_question_texts_are_lm_evals() -> None:
    assert {words.COMMON_TEMPLATE, words.COMMON_PREFIX} <= texts_of("cwe_utils")
    assert {words.FREQUENT_TEMPLATE, words.FREQUENT_PREFIX} <= texts_of("fwe_utils")
    strings = texts_of("qa_utils")
    assert {question_answering.TEMPLATE, question_answering.PREFIX.strip()} <= strings
    assert question_answering.DOCUMENT.replace("{number}", "{i}").replace("{text}", "{document}") in strings


@pytest.mark.parametrize("units", [100, 1000, 7777])
def test_coded_words_stand_as_often_as_in_lm_eval(sources: Sources, units: int) -> None:
    pytest.importorskip("scipy")
    theirs = pytest.importorskip("lm_eval.tasks.ruler.fwe_utils")

    class Short:
        def __call__(self, text: str) -> "Short":
            return self

        input_ids = ()

    text, _, _ = theirs.generate_input_output(10**6, Short(), num_words=units, vocab_size=40, incremental=1)
    setting = Setting(40 * 50 + 50, 0, sources, len)
    ours = TASKS["fwe"].drafts(setting)(0).build(units).body

    def counts(text: str) -> list[int]:
        return sorted(Counter(re.findall(r"(?<= )(?:[a-z]{6}|\.\.\.)(?= |\n)", between(text))).values())

    def between(text: str) -> str:
        return " " + text.split("coded words. ")[1].split("Question:")[0].replace(" ", "  ")

    assert counts(ours) == counts(text) and len(counts(ours)) > 3


def test_tasks_are_the_benchmarks() -> None:
    assert [(task.name, task.tokens_to_generate) for task in TASKS.values()] == [
        *[(name, 128) for name in NIAH],
        ("vt", 30),
        ("cwe", 120),
        ("fwe", 50),
        ("qa_1", 32),
        ("qa_2", 32),
    ]
    assert len(NIAH) == 8 and [name for name, task in TASKS.items() if task.part] == ["qa_1", "qa_2"]


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_100_random_ones_0_and_all_stand_in_the_prompt(
    name: str, samples: dict[str, list[Sample]]
) -> None:
    rng = random.Random(0)
    for sample in samples[name]:
        for output in sample.outputs:
            assert output in sample.prompt
        assert score(name, f"They are: {', '.join(sample.outputs).upper()}.", sample.outputs) == 100
        drawn = " ".join("".join(rng.choices("bcdfghjklm", k=5)) for _ in range(20))
        assert score(name, drawn, sample.outputs) == 0
    assert len({tuple(sample.outputs) for sample in samples[name]}) == SAMPLES


@pytest.mark.parametrize("name", NIAH)
def test_needles_stand_once_for_each_key_that_is_asked(name: str, samples: dict[str, list[Sample]]) -> None:
    task = TASKS[name]
    assert isinstance(task, niah.Niah)
    for sample in samples[name]:
        needles = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", sample.prompt)
        hidden = {"noise": task.keys * task.values, "essays": task.keys * task.values}.get(task.haystack)
        assert hidden is None or len(needles) == hidden
        assert {kind for kind, _, _ in needles} == {task.value}
        asked = re.findall(r"[\w-]+", sample.prompt.rsplit(" for ", 1)[1].split(" mentioned")[0].replace("and ", ""))
        assert len(asked) == task.queries
        held = [[value for _, key, value in needles if key == asked_key] for asked_key in asked]
        assert [len(values) for values in held] == [task.values] * task.queries
        assert sorted(sum(held, [])) == sorted(sample.outputs)
        singular = f"special magic {task.value.removesuffix('s')} for"
        assert (singular in sample.prompt) == (name in ONE_VALUE)
        if task.haystack == "noise":
            lines = sample.prompt.split("\n")[1:-1]
            assert all(line == niah.NOISE or line.startswith("One of the special") for line in lines)
    assert re.fullmatch(r"\d{7}" if task.value == "numbers" else r"[\da-f-]{36}", samples[name][0].outputs[0])


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_stand_at_all_depths(name: str, tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    depths = []
    for sample in ruler_samples(name, 1024, 60, tokenizer, 0, sources):
        context = sample.prompt[: sample.prompt.rindex("\n")].split("\n", 1)[1]
        depths.append(context.index(f"is: {sample.outputs[0]}") / len(context))
    share = [sum(i / 4 <= depth < (i + 1) / 4 for depth in depths) for i in range(4)]
    assert min(share) >= 6 and sum(share) == 60


def test_needles_in_essays_stand_between_sentences() -> None:
    essays = Essays("One river ran. Two boats came! Did they stay? Mr. Pike said so. " * 3)
    for seed in range(40):
        text = niah.in_essays(essays, 29, ["NEEDLE."], random.Random(seed))
        assert "Pike NEEDLE" not in text and "Mr. NEEDLE" not in text
        before, after = text.split("NEEDLE.")
        assert f"{before.strip()} {after.strip()}".split() == essays.first(29)
        assert not before.strip() or before.strip()[-1] in ".!?" or not after.strip()


def test_variables_are_one_chain_after_a_solved_example(samples: dict[str, list[Sample]]) -> None:
    for sample in samples["vt"]:
        solved, asked = sample.prompt.split("\n\nMemorize")
        for text, letters in ((solved, 3), (asked, 5)):
            (name, value), *rest = re.findall(r"VAR (\w+) = (\d{5}|VAR \w+)", text)
            assert f"assigned the value {value}, they are: " in text and len(rest) == 4
            names = [name, *(name for name, _ in rest)]
            assert [source for _, source in rest] == [f"VAR {name}" for name in names[:-1]]
            assert {len(name) for name in names} == {letters} and len(set(names)) == 5
            if letters == 3:
                assert text.rstrip().endswith("they are:  " + " ".join(names))
        assert names == sample.outputs
        assert sample.prompt.endswith(", they are: ")
    examples = [sample.prompt.split("\n\nMemorize")[0] for sample in samples["vt"]]
    lines = [[len(line) for line in example.split("\n")] for example in examples]
    assert all(other == lines[0] for other in lines) and len(set(examples)) == SAMPLES


@pytest.mark.parametrize(("length", "often", "else_", "example"), [(2048, 6, 1, (3, 1)), (6144, 30, 3, (10, 3))])
def test_common_words_stand_as_often_as_the_form_says(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    length: int,
    often: int,
    else_: int,
    example: tuple[int, int],
) -> None:
    for sample in ruler_samples("cwe", length, 2, tokenizer, 0, sources):
        parts = sample.prompt.split(words.COMMON_PREFIX)
        for part, (many, few), outputs in zip(
            parts,
            [example, (often, else_)],
            [re.findall(r"\d+\. (\S+)", parts[1].split("\n")[0]), sample.outputs],
            strict=False,
        ):
            numbered = re.findall(r"(\d+)\. (\S+)", part[part.rindex("Below is") :])
            assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
            listed = Counter(word for _, word in numbered)
            assert {word for word, count in listed.items() if count == many} == set(outputs) and len(outputs) == 10
            assert {count for count in listed.values()} == {many, few}


def test_lists_longer_than_all_words_are_compounds(sources: Sources) -> None:
    draft = TASKS["cwe"].drafts(Setting(131072, 0, sources, len))(0)
    for units, compound in ((len(all_words()), False), (len(all_words()) + 1, True)):
        text = draft.build(units)
        asked = text.body[text.body.rindex("Below is") :]
        listed = set(re.findall(r"\d+\. (\S+)", asked))
        assert len(listed) == units and all(("-" in word) == compound for word in listed)


def test_the_frequent_words_are_told_apart(samples: dict[str, list[Sample]], sources: Sources) -> None:
    for sample in samples["fwe"]:
        context = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
        ranked = Counter(context.split(" ")).most_common(5)
        assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == sample.outputs
        assert ranked[3][1] > ranked[4][1]
    smallest = TASKS["fwe"].drafts(Setting(1024, 0, sources, len))(0)
    for units in range(smallest.smallest, 600):
        text = smallest.build(units)
        ranked = Counter(text.body.split("coded words. ", 1)[1].split("\nQuestion")[0].split(" ")).most_common(5)
        assert ranked[3][1] > ranked[4][1] and {word for word, _ in ranked[1:4]} == set(text.outputs)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_of_the_question_are_there_once_and_anywhere(
    name: str, tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> None:
    data = sources.questions(TASKS[name].source or "")
    places = set()
    for seed in range(12):
        sample = next(iter(ruler_samples(name, 700, 1, tokenizer, seed, sources)))
        documents = re.split(r"Document \d+:\n", sample.prompt.split("\n\nAnswer the question")[0])[1:]
        documents = [document.rstrip("\n") for document in documents]
        own = [data.documents[i] for i in data.questions[0].documents]
        assert all(documents.count(text) == 1 for text in own) and len(documents) > len(own)
        assert len(set(documents)) == len(documents)
        assert sample.prompt.endswith(f"Question: {data.questions[0].text} Answer:")
        places.add(documents.index(own[0]))
    assert len(places) > 1


def test_other_documents_of_the_article_come_first(tmp_path: Path) -> None:
    import json

    paragraphs = [
        [{"context": f"{town} {i}", "qas": [{"question": f"{town}{i}?", "is_impossible": False,
          "answers": [{"text": town}]}]} for i in range(5)] for town in ("Ayr", "Bute")
    ]  # fmt: skip
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": str(i), "paragraphs": p} for i, p in enumerate(paragraphs)]}))
    draft = TASKS["qa_1"].drafts(Setting(4096, 0, Sources(squad=file), len))(6)
    shown = [Counter(re.findall(r"Document \d+:\n(\w+)", draft.build(units).body)) for units in (1, 4, 5, 6, 10, 12)]
    assert shown[:3] == [{"Bute": 1}, {"Bute": 4}, {"Bute": 5}]
    assert shown[3] == {"Bute": 5, "Ayr": 1} and shown[4] == {"Bute": 5, "Ayr": 5} and sum(shown[5].values()) == 12
