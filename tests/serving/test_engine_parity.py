"""Greedy tokens and log-probabilities of vLLM's engine against transformers' generate, layout by layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ask, assert_same, counted, engine, prompts, reference, write_hybrid

from hylo.convert import Initialisation, convert
from hylo.demo import TEACHER
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.plan import make_plan
from hylo.serve.memory import plan_serving

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.1386,
}
QWEN3 = {"base_model_type": "qwen3", "qk_norm": True, "mla_k_norm": "folded"}
QWEN2 = {"base_model_type": "qwen2", "qkv_bias": True}
FAST = [1.0, 0.5, 0.1, 0.05, 0.02, 0.01, 0.004, 0.001]
WIDE = {"num_attention_heads": 2, "hidden_size": 256, "q_lora_rank": 96, "v_head_dim": 128, "head_dim": 128}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mla and gated delta": ("mgmg", {}),
    "mla and mamba-2": ("msms", {}),
    "all mla": ("mmm", {}),
    "all gated delta": ("ggg", {}),
    "all mamba-2": ("sss", {}),
    "mla and kda": ("mkmk", {}),
    "all kda": ("kkk", {}),
    "attention and kda": ("akak", {}),
    "all linear blocks": ("mgsk", {}),
    "kda with biases": ("kmk", QWEN2),
    "attention and gated delta": ("agag", {}),
    "attention and mamba-2": ("asas", {}),
    "attention": ("aaa", {}),
    "both linear blocks": ("mgs", {}),
    "qwen3, folded": ("mgs", {**QWEN3, "tie_word_embeddings": True}),
    "qwen3's own attention": ("ag", {"base_model_type": "qwen3", "qk_norm": True}),
    "biases": ("mgsm", QWEN2),
    "biases in attention": ("ag", QWEN2),
    "frequencies by layer": ("mgm", {"mla_inv_freq": [FAST, None, [f * 0.9 for f in FAST]]}),
    "ranks by layer, yarn": ("mgm", {"kv_lora_ranks": [48, 0, 32], "mla_rope_parameters": YARN}),
    "no positions": ("mgm", {"positions": "none"}),
    "no positions in attention": ("ag", {"positions": "none"}),
    "gated attention": ("mgm", {**QWEN2, "attention_gate": True}),
    "latent 128 + 32": ("mg", {"head_dim": 64, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}),
    "latent 128 + 64": ("mg", {**WIDE, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}),
    "latent 256 + 64": ("mg", {**WIDE, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}),
}
HEADS_OF_64 = {"latent 128 + 32": {"v_head_dim": 64}}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_generate(case: str, tmp_path: Path) -> None:
    """Prompts of mixed lengths in one batch, then again from the prefix cache; the cache is as planned."""
    layout, figures = CASES[case]
    directory = write_hybrid(tmp_path / "model", layout, **(figures | HEADS_OF_64.get(case, {})))
    questions = prompts()
    expected = reference(directory, questions)
    assert min(len(set(tokens)) for tokens, _ in expected) > 8
    with engine(directory) as llm:
        assert_same(ask(llm, questions), expected)
        again = ask(llm, questions)
        assert_same(again, expected)
        if layout not in ("ggg", "sss", "kkk"):
            assert sum(answer.num_cached_tokens for answer in again) > 0
        assert_as_planned(llm, HyloConfig.from_pretrained(directory))


def assert_as_planned(llm: Any, config: HyloConfig) -> None:
    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_config
    plan = plan_serving(
        config, dtype="float32", memory_bytes=None, cache_bytes=64 << 20, max_model_len=512, platform="cpu"
    )
    sizes = {spec.page_size_bytes for group in cache.kv_cache_groups for spec in [group.kv_cache_spec]}
    assert sizes == {plan.pages.page_bytes}
    assert cache.num_blocks == plan.num_blocks


@pytest.mark.parametrize("layout", ["mgms", "mm", "as", "mk"])
def test_chunks_of_prompts(layout: str, tmp_path: Path) -> None:
    directory = write_hybrid(tmp_path / "model", layout)
    questions = prompts((150, 7, 129, 200, 49, 33))
    with engine(directory, max_num_batched_tokens=48, enable_prefix_caching=False) as llm:
        assert_same(ask(llm, questions), reference(directory, questions))


@pytest.mark.parametrize(("layout", "blocks"), [("mgms", 12), ("mm", 30), ("ag", 7)])
def test_preemption(layout: str, blocks: int, tmp_path: Path) -> None:
    """A cache that holds one or two of the sequences: the others are put off and computed anew."""
    directory = write_hybrid(tmp_path / "model", layout)
    questions = prompts((100, 120, 110, 90, 125, 115))
    with engine(
        directory, num_gpu_blocks_override=blocks, max_model_len=256, block_size=16 if layout == "mm" else None
    ) as llm:
        assert_same(ask(llm, questions), reference(directory, questions))
        assert counted(llm, "vllm:num_preemptions") > 0


def test_compiled(tmp_path: Path) -> None:
    directory = write_hybrid(tmp_path / "model", "mgs")
    questions = prompts()
    with engine(directory, enforce_eager=False) as llm:
        assert_same(ask(llm, questions), reference(directory, questions))


def test_the_demo_s_checkpoint(tmp_path: Path) -> None:
    """The checkpoint that comes with the package, converted in the demo's layout; text for prompts."""
    from transformers import AutoTokenizer

    plan = make_plan(TEACHER, "2MLA4GDN", mla_layers=[0, 1])
    convert(TEACHER, tmp_path / "hybrid", plan, Initialisation())
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    texts = ("def main():\n", "# remember lilac: 42\n" * 9, "import os\nimport sys\n\n\nclass Cache:\n    ")
    questions = [tokenizer(text)["input_ids"] for text in texts]
    with engine(tmp_path / "hybrid") as llm:
        assert_same(ask(llm, questions), reference(tmp_path / "hybrid", questions))


@pytest.mark.parametrize("layout", ["mgs", "ag"])
def test_weights_in_bfloat16(layout: str, tmp_path: Path) -> None:
    """The engine's first log-probabilities are about as near to those in float32 as transformers' in bfloat16."""
    directory = write_hybrid(tmp_path / "model", layout)
    questions = prompts()
    with engine(directory, dtype="bfloat16", max_num_batched_tokens=64) as llm:
        answers = ask(llm, questions, new=1, logprobs=20)
    model = HyloForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    engines, transformers = [], []
    for question, answer, (_, logprobs) in zip(questions, answers, reference(directory, questions, new=1), strict=True):
        with torch.no_grad():
            own = model(torch.tensor([question])).logits[0, -1].float().log_softmax(-1)
        for token, entry in answer.outputs[0].logprobs[0].items():
            engines.append(abs(entry.logprob - logprobs[0, token].item()))
            transformers.append(abs(own[token] - logprobs[0, token]).item())
    assert 0 < sum(engines) < 2 * sum(transformers)


def test_states_in_bfloat16(tmp_path: Path) -> None:
    """Half the state's bytes; log-probabilities move, but little."""
    directory = write_hybrid(tmp_path / "model", "mgms")
    questions = prompts()
    expected = reference(directory, questions, new=8)
    with engine(directory, mamba_ssm_cache_dtype="bfloat16") as llm:
        config = llm.llm_engine.vllm_config
        assert config.cache_config.mamba_ssm_cache_dtype == "bfloat16"
        layers = config.compilation_config.static_forward_context
        states = {name: layer.kv_cache[1].dtype for name, layer in layers.items() if isinstance(layer.kv_cache, tuple)}
        assert {str(dtype) for dtype in states.values()} == {"torch.bfloat16"}
        answers = ask(llm, questions, new=8)
    moved = [
        abs(entry.logprob - logprobs[0, token].item())
        for answer, (_, logprobs) in zip(answers, expected, strict=True)
        for token, entry in answer.outputs[0].logprobs[0].items()
    ]
    assert max(moved) < 0.2
