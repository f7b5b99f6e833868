"""What transformers' cache holds after real forward passes, byte for byte what the plan of the conversion says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hylo.convert import planned_config
from hylo.modeling import HyloForCausalLM
from hylo.modeling.cache import LinearCache
from hylo.plan import Plan, make_plan

FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM", "exact"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "exact"),
    "qwen3-exact": ("qwen3", "Qwen3ForCausalLM", "exact"),
    "qwen3-folded": ("qwen3", "Qwen3ForCausalLM", "folded"),
}
LAYOUTS = ["3A", "3MLA", "3GDN", "3M2", "1MLA2GDN", "2MLA1M2", "1A2GDN"]
CHUNKS = {"prefill": [9], "chunked": [5, 4], "decoding": [7, 1, 1], "from one": [1, 1, 2]}
PlanOf = Callable[..., Plan]


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    """Plans the conversion of a small base, of which there is only a config.json."""

    def plan(family: str, layout: str, **options: Any) -> Plan:
        model_type, architecture, k_norm = FAMILIES[family]
        figures = {
            "model_type": model_type,
            "architectures": [architecture],
            "vocab_size": 31,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        (tmp_path / "config.json").write_text(json.dumps(figures | ({} if model_type == "qwen2" else {"head_dim": 16})))
        geometry = {"gdn_num_heads": 3, "gdn_head_dim": 8, "mamba_num_heads": 4}
        return make_plan(tmp_path, layout, geometry=geometry, k_norm=k_norm, **options)  # type: ignore[arg-type]

    return plan


@torch.no_grad()
def filled_cache(plan: Plan, sequences: int, chunks: list[int]) -> Any:
    """The cache after a forward pass over every chunk of random tokens, in the plan's dtype."""
    model = HyloForCausalLM(planned_config(plan, "pairs-fast")).to(getattr(torch, plan.dtype)).eval()
    cache = None
    for length in chunks:
        cache = model(torch.randint(31, (sequences, length)), past_key_values=cache, use_cache=True).past_key_values
    return cache


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def held_bytes(cache: Any) -> list[int]:
    """Bytes of every tensor that each layer of the cache keeps alive, whatever its name, and of what views look at."""
    held = []
    for layer in cache.layers:
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_in(vars(layer)) if tensor.numel()}
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        assert held[-1] == sum(tensor.nbytes for tensor in storages.values())
    return held


def planned_bytes(plan: Plan, sequences: int, tokens: int) -> list[int]:
    return [
        sequences
        * (tokens * (layer.kv_bytes_per_token + layer.kv_extra_bytes_per_token) + layer.state_bytes_per_sequence)
        for layer in plan.layers
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "sequences"), [("float32", 3), ("bfloat16", 1), ("bfloat16", 2)])
def test_a_filled_cache_holds_what_the_plan_says(
    plan_of: PlanOf, family: str, layout: str, dtype: str, sequences: int
) -> None:
    plan = plan_of(family, layout, dtype=dtype)
    for chunks in CHUNKS.values():
        cache, tokens = filled_cache(plan, sequences, chunks), sum(chunks)
        assert type(cache) is (DynamicCache if "A" in layout else LinearCache)  # A or MLA
        assert cache.get_seq_length() == tokens
        assert held_bytes(cache) == planned_bytes(plan, sequences, tokens)
        assert sum(held_bytes(cache)) == sequences * (
            tokens * (plan.kv_bytes_per_token + plan.kv_extra_bytes_per_token) + plan.state_bytes_per_sequence
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_of_their_own_are_what_layers_cache(plan_of: PlanOf, family: str) -> None:
    plan = plan_of(family, "2MLA1GDN", mla_layers=[0, 2], kv_lora_ranks=[5, 0, 21], dtype="bfloat16")
    cache = filled_cache(plan, 2, [6, 1])
    assert [cache.layers[i].keys.shape[-1] for i in (0, 2)] == [5, 21]
    assert held_bytes(cache) == planned_bytes(plan, 2, 7)


@pytest.mark.parametrize("layout", ["3A", "2MLA1GDN", "3M2"])
def test_generation_fills_the_cache_with_what_the_plan_says(plan_of: PlanOf, layout: str) -> None:
    plan = plan_of("qwen3-exact", layout, dtype="float32")
    model = HyloForCausalLM(planned_config(plan, "pairs-fast")).eval()
    generated = model.generate(
        torch.randint(1, 31, (2, 6)), max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    tokens = generated.sequences.shape[1] - 1  # the last one has not been read
    assert held_bytes(generated.past_key_values) == planned_bytes(plan, 2, tokens)
