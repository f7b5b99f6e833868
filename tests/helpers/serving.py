"""Random hybrids and bases for the serving tests, and vLLM's engine around them in the test's own process."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hylo import HyloConfig, HyloForCausalLM

VOCAB = 512
MIXERS = {"m": "mla", "g": "gated_deltanet", "s": "mamba2", "k": "kda", "a": "attention"}
LENGTHS = (7, 33, 150, 1, 129, 70)
NEW = 64  # tokens of an answer
CLOSE = 1e-4  # between log-probabilities

Answer = tuple[list[int], torch.Tensor]  # tokens, and log-probabilities (tokens, vocabulary) at each


def write_hybrid(directory: Path, layout: str, **figures: Any) -> Path:
    """A random model of a few layers, m g s k or a each, whose greedy answers keep changing."""
    mixers = [MIXERS[letter] for letter in layout]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "kv_lora_rank": 48,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "gdn_num_heads": 2,
        "gdn_head_dim": 32,
        "kda_num_heads": 4,
        "kda_head_dim": 32,
        "mamba_d_state": 32,
        "mamba_head_dim": 32,
        "mamba_num_heads": 4,
        "mamba_d_inner": 128,
        "mamba_d_xb": 64,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    torch.manual_seed(0)
    model = HyloForCausalLM(HyloConfig(mixers=mixers, num_hidden_layers=len(mixers), **(sizes | figures)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        embedding = model.model.embed_tokens.weight
        if model.config.tie_word_embeddings:  # or a token's own embedding would win, and the answer repeat it
            model.model.norm.weight.normal_(std=3)
            embedding.mul_(2)
        else:
            embedding.mul_(embedding.shape[1] ** 0.5)
            model.lm_head.weight.mul_(4)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """One word per token, <t0> to <t511>, and a chat template."""
    words = Tokenizer(models.WordLevel({f"<t{i}>": i for i in range(VOCAB)}, unk_token="<t0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<t0>", bos_token="<t1>", eos_token="<t2>")
    tokenizer.chat_template = "<t1> {% for message in messages %}<t4> {{ message['content'] }} <t5> {% endfor %}<t6>"
    tokenizer.save_pretrained(directory)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, VOCAB) for _ in range(length)] for length in lengths]


@torch.no_grad()
def reference(directory: Path, questions: list[list[int]], new: int = NEW) -> list[Answer]:
    """What transformers' generate answers, each question by itself."""
    model = HyloForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for question in questions:
        ids = model.generate(
            torch.tensor([question]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=3
        )
        logprobs = model(ids[:, :-1]).logits[0, len(question) - 1 :].log_softmax(-1)
        answers.append((ids[0, len(question) :].tolist(), logprobs))
    return answers


@contextmanager
def engine(directory: Path, **options: Any) -> Iterator[Any]:
    """vllm.LLM in this process, float32 and uncompiled unless the options say otherwise; gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    plain = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
    llm = LLM(str(directory), **(plain | {"kv_cache_memory_bytes": 64 << 20, "disable_log_stats": False} | options))
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: Any, questions: list[list[int]], new: int = NEW, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    parameters = SamplingParams(**({"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": 1} | sampling))
    return llm.generate([{"prompt_token_ids": ids} for ids in questions], parameters, use_tqdm=False)


def assert_same(answers: list[Any], expected: list[Answer], close: float = CLOSE) -> None:
    """The tokens are equal and their log-probabilities `close`."""
    for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
        said = answer.outputs[0]
        assert list(said.token_ids) == tokens
        for step, entries in enumerate(said.logprobs):
            for token, entry in entries.items():
                assert abs(entry.logprob - logprobs[step, token].item()) < close


def counted(llm: Any, name: str) -> int:
    """A counter of the engine's, such as vllm:num_preemptions."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
