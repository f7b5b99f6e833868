"""Answers are those of transformers' generate, one prompt at a time: whatever is shared, padded, cut up or fails."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hylo.errors import HyloError
from hylo.evaluate import generation, prefixes
from hylo.evaluate.generation import GreedyGenerator, Prompt
from hylo.evaluate.memory import cache_bytes
from hylo.evaluate.prefixes import make_tree
from hylo.modeling import HyloConfig, HyloForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MIXERS = {
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "gdn_num_heads": 2,
    "gdn_head_dim": 12,
    "mamba_d_state": 12,
    "mamba_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_d_inner": 64,
    "mamba_d_xb": 32,
}
HYBRIDS: dict[str, list[str]] = {
    "gdn": ["gated_deltanet"] * 2,
    "mamba2": ["mamba2"] * 2,
    "mla": ["mla"] * 2,
    "mla-gdn": ["mla", "gated_deltanet"],
    "all four": ["mamba2", "attention", "gated_deltanet", "mla"],
}


class Numbers:
    """A tokenizer whose text is its token ids."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def make_model(name: str) -> PreTrainedModel:
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).double().eval()
    mixers = HYBRIDS[name]
    config = HyloConfig(**SIZES, **MIXERS, num_hidden_layers=len(mixers), mixers=mixers)
    return HyloForCausalLM(config).double().eval()


@pytest.fixture(params=["llama", *HYBRIDS])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


def some_prompts(seed: int = 0) -> list[Prompt]:
    """Seven that leave one text at different places, one of them twice, and one that is much shorter."""
    rng = random.Random(seed)
    text = [rng.randrange(1, 61) for _ in range(60)]
    found = []
    for _ in range(7):
        same, length = rng.randrange(60), rng.randrange(55, 70)
        own = [rng.randrange(1, 61) for _ in range(max(3, length - same))]
        found.append(Prompt(text[:same] + own, rng.randrange(3, 9)))
    return [*found, found[0], Prompt([5, 6, 7], 4)]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: Prompt, ends: set[int] = frozenset()) -> str:
    ids = torch.tensor([prompt.ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=prompt.new_tokens)
    answer = output[0, len(prompt.ids) :].tolist()
    return " ".join(str(token) for token in answer if token not in ends)


def generator(model: PreTrainedModel, **options: Any) -> GreedyGenerator:
    return GreedyGenerator(model, Numbers(), **options)


@pytest.mark.parametrize("forward_tokens", [8192, 24])
@pytest.mark.parametrize("step", [4, 64])
def test_a_batch_is_its_prompts_alone(
    model: PreTrainedModel, forward_tokens: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a shared beginning, the prefill whole and in chunks."""
    monkeypatch.setattr(generation, "CPU_TOKENS", forward_tokens)
    monkeypatch.setattr(prefixes, "STEP", step)
    prompts = some_prompts()
    answers = dict(generator(model).generate(prompts))
    assert answers == {i: alone(model, prompt) for i, prompt in enumerate(prompts)}


def test_rows_end_by_themselves(model: PreTrainedModel) -> None:
    """At the token that one row gives in the middle of its answer: others stop elsewhere or not at all."""
    prompts = some_prompts()
    model.generation_config.eos_token_id = end = int(alone(model, prompts[1]).split()[1])
    answers = dict(generator(model).generate(prompts))
    assert answers == {i: alone(model, prompt, {end}) for i, prompt in enumerate(prompts)}
    lengths = [len(str(answers[i]).split()) for i in range(len(prompts))]
    assert lengths[1] <= 1
    assert any(n == prompt.new_tokens for n, prompt in zip(lengths, prompts, strict=True))


def test_the_tokenizer_ends_answers_too(llama: PreTrainedModel) -> None:
    prompt, tokenizer = some_prompts()[0], Numbers()
    tokenizer.eos_token_id = int(alone(llama, prompt).split()[0])
    assert dict(GreedyGenerator(llama, tokenizer).generate([prompt])) == {0: ""}


def test_what_prompts_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "STEP", 4)
    tree = make_tree([[1] * 12 + [2] * 8, [1] * 12 + [3] * 9, [1] * 4 + [4] * 18, [5] * 22])
    assert [(s.start, s.end, s.first) for s in tree.segments] == [
        (0, 4, [0, 3]),
        (4, 12, [0, 2, 3]),
        (12, 22, [0, 1, 2, 3]),
    ]
    assert tree.rows == [0, 1, 2, 3]
    assert tree.computed == 2 * 4 + 3 * 8 + 4 * 10
    assert tree.mask_BN.sum(1).tolist() == [20, 21, 22, 22]
    assert tree.ids_BN[0].tolist() == [1] * 12 + [0] * 2 + [2] * 8  # padding where it leaves the others


def test_prompts_that_are_one_keep_their_last_token(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they agree to a multiple of the step: padding stands before it, where another row is longer."""
    monkeypatch.setattr(prefixes, "STEP", 4)
    tokens = some_prompts()[0].ids
    prompts = [Prompt(tokens[:48], 5), Prompt(tokens[:48], 5), Prompt(tokens[:51], 5)]
    assert dict(generator(llama).generate(prompts)) == {i: alone(llama, prompt) for i, prompt in enumerate(prompts)}


def test_a_prefill_computes_the_tree(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "STEP", 4)
    prompts = [prompt for prompt in some_prompts() if len(prompt.ids) > 3]
    seen: list[int] = []
    llama.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    run = generator(llama)
    run.answers([Prompt(prompt.ids, 1) for prompt in prompts])
    assert sum(seen) == make_tree([prompt.ids for prompt in prompts]).computed
    assert sum(seen) < 0.7 * sum(len(prompt.ids) for prompt in prompts)


def batch_sizes(run: GreedyGenerator, monkeypatch: pytest.MonkeyPatch, fails: Any = lambda prompts: None) -> list[int]:
    """Sizes of the batches that are tried; `fails` may raise in their place."""
    sizes, answers = [], run.answers

    def watched(prompts: list[Prompt]) -> list[list[int]]:
        sizes.append(len(prompts))
        fails(prompts)
        return answers(prompts)

    monkeypatch.setattr(run, "answers", watched)
    return sizes


def test_batches_fit_in_their_cache(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(prompt.ids[:40], 4) for prompt in some_prompts() if len(prompt.ids) > 40]
    run = generator(model)
    with torch.no_grad():
        cache = model(torch.ones(3, 44, dtype=torch.long), use_cache=True).past_key_values
    sizes = batch_sizes(run, monkeypatch)
    run._cache_bytes = cache_bytes(cache)
    dict(run.generate(prompts))
    assert sizes == [3, 3, 2]
    run._cache_bytes = 1
    sizes.clear()
    dict(run.generate(prompts))
    assert sizes == [1] * 8


def test_prompts_of_other_lengths_are_other_batches(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = generator(llama)
    sizes = batch_sizes(run, monkeypatch)
    dict(run.generate([Prompt([1] * n, 1) for n in (10, 100, 11, 76, 90, 74)]))
    assert sizes == [3, 1, 2]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")],
)
def test_a_batch_without_room_is_halved_and_so_are_the_next(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prompts = [Prompt(prompt.ids[:40], 4) for prompt in some_prompts() if len(prompt.ids) > 40]
    run = generator(llama)

    def fails(batch: list[Prompt]) -> None:
        if len(batch) > 2:
            raise error

    sizes = batch_sizes(run, monkeypatch, fails)
    answers = dict(run.generate(prompts))
    assert answers == {i: alone(llama, prompt) for i, prompt in enumerate(prompts)}
    assert sizes == [8, 4, 2, 2, 2, 2]
    sizes.clear()
    dict(run.generate(prompts))
    assert sizes == [2, 2, 2, 2]


def test_no_room_for_one_row_is_that_prompts_failure(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts()
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    run = generator(llama)

    def fails(batch: list[Prompt]) -> None:
        if prompts[longest] in batch:
            raise torch.OutOfMemoryError("CUDA out of memory")

    batch_sizes(run, monkeypatch, fails)
    answers = dict(run.generate(prompts))
    assert isinstance(answers[longest], torch.OutOfMemoryError)
    others = {i: alone(llama, prompt) for i, prompt in enumerate(prompts) if prompt != prompts[longest]}
    assert {i: answer for i, answer in answers.items() if i in others} == others


def test_a_prompt_that_fails_does_so_alone(llama: PreTrainedModel) -> None:
    prompts = some_prompts()
    prompts[4] = Prompt([*prompts[4].ids[:-1], 99], 4)  # no such token
    answers = dict(generator(llama).generate(prompts))
    assert isinstance(answers[4], IndexError)
    assert all(answers[i] == alone(llama, prompt) for i, prompt in enumerate(prompts) if i != 4)


def test_bad_input_is_nobodys_failure(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = generator(llama)

    def fails(batch: list[Prompt]) -> None:
        raise HyloError("no such thing")

    batch_sizes(run, monkeypatch, fails)
    with pytest.raises(HyloError, match="no such thing"):
        dict(run.generate(some_prompts()))
