"""The checkpoint that comes with the package keeps its promises, and the demo's checks can fail."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hylo.data.retrieval import FactFormat
from hylo.data.sources import standard_library, token_stream
from hylo.demo import HERE, TEACHER, checks
from hylo.demo.train_teacher import bits_per_byte, grow, needle_accuracy, xz_bits_per_byte
from hylo.recipe import read_recipe


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEACHER)


def test_it_is_small_and_safetensors_only() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 16 * 2**20
    assert (TEACHER / "model.safetensors").exists()
    assert not [path for path in TEACHER.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_its_tokenizer_is_lossless_and_has_a_chat_template(tokenizer: Any) -> None:
    text = standard_library(held_out=True)[0][:4000] + " naïve ☃"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = [{"role": "user", "content": "hello"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>hello<|end|><|assistant|>"
    assert FactFormat.of(tokenizer).longest < 10  # its words are single tokens


@pytest.mark.parametrize("length", [256, 512, 1024, 2048])
def test_it_retrieves_at_every_length(teacher: LlamaForCausalLM, tokenizer: Any, length: int) -> None:
    stream = token_stream(tokenizer, standard_library(held_out=True))
    assert needle_accuracy(teacher, stream, FactFormat.of(tokenizer), length) >= 0.95


def test_it_needs_fewer_bits_per_byte_of_held_out_text_than_xz(teacher: LlamaForCausalLM, tokenizer: Any) -> None:
    documents = standard_library(held_out=True)
    assert bits_per_byte(teacher, tokenizer, documents) < xz_bits_per_byte(documents)


@pytest.mark.parametrize("name", ["quick.yaml", "full.yaml", "short.yaml"])
def test_the_recipes_are_valid_and_grow_eightfold(name: str) -> None:
    recipe = read_recipe(HERE / name)
    assert recipe.base == TEACHER
    assert recipe.stages[-1].length == 8 * recipe.stages[0].length
    assert recipe.evaluate.answers >= 256


def report(**changes: float) -> dict[str, Any]:
    value = {"kv": 9.0, "short": 1.0, "long": 0.9, "extended": 0.1, "aligned": 0.2, "control": 0.3} | changes
    metrics = {
        "teacher": {"needle": {"8": 1.0, "64": 1.0}},
        "aligned": {"needle": {}, "kl": {"64": value["aligned"]}},
        "extended": {"needle": {"8": value["short"], "64": value["long"]}, "kl": {"64": value["extended"]}},
        "control": {"needle": {}, "kl": {"64": value["control"]}},
    }
    stages = [{"name": name, "metrics": m} for name, m in metrics.items()]
    return {"l_short": 8, "l_long": 64, "kv_percent_of_base": value["kv"], "stages": stages}


def test_the_checks_pass_on_a_good_run() -> None:
    assert [check["passed"] for check in checks(report())] == [True] * 5


@pytest.mark.parametrize(
    ("change", "failing"),
    [({"kv": 10.1}, 0), ({"short": 0.94}, 1), ({"long": 0.79}, 2), ({"aligned": 0.12}, 3), ({"control": 0.19}, 4)],
)
def test_each_check_can_fail(change: dict[str, float], failing: int) -> None:
    passed = [check["passed"] for check in checks(report(**change))]
    assert [i for i, ok in enumerate(passed) if not ok] == [failing]


def test_a_grown_teacher_begins_as_the_one_it_grows_from(teacher: LlamaForCausalLM) -> None:
    grown = grow(teacher, layers=8, mlp=512).eval()
    assert grown.num_parameters() == 2_689_152
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, teacher(ids).logits, rtol=0, atol=1e-4)
    loss = grown(ids, labels=ids).loss
    loss.backward()
    new = grown.model.layers[7]
    assert new.mlp.down_proj.weight.grad.abs().max() > 0 and new.self_attn.o_proj.weight.grad.abs().max() > 0
