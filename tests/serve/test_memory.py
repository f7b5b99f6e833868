"""What a server's memory holds, against figures worked out by hand; tests/serving holds the rules to vLLM itself."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hylo.convert.config import planned_config
from hylo.errors import HyloError
from hylo.modeling.configuration import HyloConfig
from hylo.plan import Plan, make_plan
from hylo.serve.memory import ServePlan, plan_serving

GIB = 2**30
LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 65536,
    "rope_theta": 500000.0,
}
WIDER = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
LLAMA_3B = LLAMA_1B | WIDER | {"max_position_embeddings": 2**21}
STATE_1B = 6 * 256 * 512 * 4 + 3 * 6 * (256 + 256 + 512) * 2  # a GDN layer's: float32 state, bfloat16 columns
STATE_3B = 9 * 256 * 512 * 4 + 3 * 9 * (256 + 256 + 512) * 2


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    def plan(base: dict[str, Any], layout: str, **geometry: int) -> Plan:
        (tmp_path / "config.json").write_text(json.dumps(base))
        return make_plan(tmp_path, layout, geometry=geometry)

    return plan


@pytest.fixture
def served(planned: Any) -> Any:
    def serve(base: dict[str, Any], layout: str, geometry: dict[str, int] | None = None, **options: Any) -> ServePlan:
        config = planned_config(planned(base, layout, **geometry or {}), "pairs")
        return plan_serving(config, **{"dtype": "bfloat16"} | options)

    return serve


LAYOUTS = ["4MLA12GDN", "8MLA8M2", "4MLA12KDA", "8A8GDN", "16MLA", "16GDN", "16M2", "16KDA", "16A"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_cache_is_as_planned(planned: Any, served: Any, layout: str, tensor_parallel: int) -> None:
    plan, serving = planned(LLAMA_1B, layout), served(LLAMA_1B, layout, tensor_parallel=tensor_parallel)
    assert serving.kv_bytes_per_token == plan.kv_bytes_per_token
    assert serving.state_bytes_per_sequence == plan.state_bytes_per_sequence

    # a sequence of whole blocks is what is planned and what pads it, on one device
    length = 4 * serving.pages.block_size
    serving = served(LLAMA_1B, layout, tensor_parallel=tensor_parallel, max_model_len=length)
    kv = plan.kv_bytes_per_token // (1 if "MLA" in layout else tensor_parallel)
    state = plan.state_bytes_per_sequence // tensor_parallel
    waste = serving.waste_bytes - serving.padding["last_block"]
    assert serving.sequence_bytes == kv * length + state + waste


def test_4mla12gdn_by_hand(served: Any) -> None:
    """A latent of (128 + 32) x 2 = 320 bytes: 78 x 128 tokens of it are the first to hold a state."""
    plan = served(LLAMA_1B, "4MLA12GDN", cache_bytes=GIB)
    assert 77 * 128 * 320 < STATE_1B <= 78 * 128 * 320
    assert (plan.pages.block_size, plan.pages.page_bytes) == (9984, 9984 * 320)
    assert sorted(f"{group.layers} {group.mixer}" for group in plan.pages.groups) == ["4 gated_deltanet"] * 3 + [
        "4 mla"
    ]
    assert plan.sequence_bytes == (7 + 3) * 4 * 9984 * 320  # 7 blocks of tokens for 65536, 3 of states
    assert plan.padding == {
        "state_pages": 12 * (9984 * 320 - STATE_1B),
        "empty_places": 0,
        "last_block": 4 * 9984 * 320 // 2,
        "ranks": 0,
    }
    assert plan.num_blocks == 84
    assert plan.concurrency == 8.4
    assert plan.tokens == 550502
    assert plan.concurrent_requests == 8
    assert plan.largest_context == (83 - 3) * 9984


def test_6mla22gdn_has_empty_places(served: Any) -> None:
    """22 layers in groups of 6: four groups, two of whose 24 places stay empty."""
    plan = served(LLAMA_3B, "6MLA22GDN")
    assert plan.pages.block_size == 98 * 128
    assert sorted(group.layers for group in plan.pages.groups) == [5, 5, 6, 6, 6]
    assert plan.padding["empty_places"] == 2 * 98 * 128 * 384
    assert plan.padding["state_pages"] == 22 * (98 * 128 * 384 - STATE_3B)
    assert plan.sequence_bytes == (168 + 4) * 6 * 98 * 128 * 384


def test_groups_of_nearly_equal_counts_take_the_larger(served: Any) -> None:
    plan = served(LLAMA_1B, "7MLA9GDN")
    assert sorted(group.layers for group in plan.pages.groups) == [7, 9]
    assert plan.padding["empty_places"] == 7 * 2 * plan.pages.page_bytes  # 7 blocks of tokens, 2 places each


def test_block_follows_the_state(served: Any) -> None:
    halved = served(LLAMA_1B, "4MLA12GDN", state_dtype="bfloat16")
    assert halved.pages.block_size == 40 * 128  # 1,609,728 bytes in 40,960 a step
    cut = served(LLAMA_1B, "4MLA12GDN", tensor_parallel=2)
    assert cut.pages.block_size == 39 * 128  # 1,591,296 bytes; the latent stays whole
    dense = served(LLAMA_1B, "8A8GDN")
    assert dense.pages.block_size == 98 * 16  # 2,048 bytes a token
    assert served(LLAMA_1B, "8A8GDN", platform="cpu").pages.block_size == 13 * 128
    assert served(LLAMA_1B, "8A8GDN", block_size=2048).pages.block_size == 2048
    assert [served(LLAMA_1B, "16A", platform=platform).pages.block_size for platform in ("cuda", "cpu")] == [16, 128]


def test_linear_layers_alone_take_any_length(served: Any) -> None:
    plan = served(LLAMA_1B, "16GDN", cache_bytes=GIB, max_model_len=50)
    assert plan.pages.page_bytes == STATE_1B
    assert plan.sequence_bytes == 16 * STATE_1B
    assert plan.waste_bytes == 0
    assert plan.num_blocks == 21
    assert plan.concurrent_requests == 20
    assert plan.largest_context is None
    assert served(LLAMA_1B, "16GDN", cache_bytes=16 * STATE_1B).largest_context == 0


def test_prefix_caching_holds_two_states(served: Any) -> None:
    without, cached = (served(LLAMA_1B, "4MLA12GDN", prefix_caching=on) for on in (False, True))
    assert cached.sequence_bytes - without.sequence_bytes == 3 * without.pages.block_bytes


def test_ranks_are_padded_to_the_largest(planned: Any) -> None:
    plan = planned(LLAMA_1B, "4MLA12GDN")
    config = planned_config(plan, "pairs")
    even = plan_serving(config, dtype="bfloat16")
    config.kv_lora_ranks = [0] * 16
    for layer, rank in zip((1, 5, 10, 14), (64, 128, 96, 32), strict=True):
        config.kv_lora_ranks[layer] = rank
    uneven = plan_serving(config, dtype="bfloat16")
    assert uneven.pages == even.pages
    assert uneven.weight_bytes == even.weight_bytes
    assert uneven.kv_bytes_per_token == (64 + 128 + 96 + 32 + 4 * 32) * 2
    assert uneven.padding["ranks"] == (64 + 32 + 96) * 2 * 65536
    assert any("kv_lora_ranks" in line for line in uneven.warnings)


@pytest.mark.parametrize("layout", ["4MLA12GDN", "8MLA8M2", "4MLA12KDA", "16A", "16GDN"])
def test_weights(planned: Any, served: Any, layout: str) -> None:
    """The parameters, MLA's up-projection of 8 kv heads repeated to 32 heads; two devices cut all but what is small."""
    plan = planned(LLAMA_1B, layout)
    repeated = plan.mixers.count("mla") * (32 - 8) * (32 + 64) * 128
    one, two = (served(LLAMA_1B, layout, tensor_parallel=n).weight_bytes for n in (1, 2))
    assert one == 2 * (plan.parameters + repeated)
    whole = 2 * two - one
    down_projections = plan.mixers.count("mla") * (1344 + 128 + 32) * 2048
    down_projections += plan.mixers.count("kda") * 2 * 64 * 2048
    norms = 33 * 2048 + plan.mixers.count("gated_deltanet") * 512 + plan.mixers.count("kda") * 64
    assert whole == 2 * (down_projections + norms)


def test_memory_and_batch(served: Any) -> None:
    plan = served(LLAMA_3B, "6MLA22GDN", memory_bytes=80 * GIB, utilization=0.9)
    assert plan.cache_bytes == int(80 * GIB * 0.9) - plan.weight_bytes - plan.workspace_bytes
    assert (plan.step_tokens, plan.step_sequences) == (8192, 1024)
    rows = 6 * 98 * 128  # 65,536 in whole blocks
    context = rows * (192 + 24 * (128 + 64 + 128)) * 2
    logits = 1024 * 128256 * (2 + 4 + 4)
    gdn = 9 * (2 * 1024 + 1024 + 256 + 1024 + 512 * 256 // 64)
    assert plan.workspace_bytes == 8192 * (4 * 3072 + gdn) * 2 + context + logits
    small = served(LLAMA_3B, "6MLA22GDN", memory_bytes=24 * GIB)
    assert (small.step_tokens, small.step_sequences) == (2048, 256)
    assert served(LLAMA_3B, "6MLA22GDN", memory_bytes=80 * GIB, weight_bytes=GIB, utilization=0.9).cache_bytes == (
        plan.cache_bytes + plan.weight_bytes - GIB
    )


def test_two_million_tokens_fit_where_the_base_does_not(served: Any) -> None:
    hybrid = served(LLAMA_3B, "6MLA22GDN", memory_bytes=80 * GIB)
    assert hybrid.concurrent_requests >= 10
    base = served(LLAMA_3B, "28A", memory_bytes=80 * GIB)
    assert base.concurrent_requests == 0
    assert base.sequence_bytes == 2**21 * 28 * 2 * 8 * 128 * 2
    assert base.largest_context < 2**20
    assert f"{base.largest_context:,} tokens fit" in base.warnings[-1]
    fits = served(LLAMA_3B, "28A", cache_bytes=base.cache_bytes, max_model_len=base.largest_context)
    assert fits.concurrent_requests == 1


def test_warnings(served: Any) -> None:
    plan = served(LLAMA_1B, "4MLA12GDN", cache_bytes=GIB // 20, max_model_len=2**20, tensor_parallel=2)
    lines = "\n".join(plan.warnings)
    for words in (
        "max_model_len 1,048,576 is above the model's 65,536 tokens",
        "a block is 4,992 tokens, to hold a layer's state: a request takes at least 24.4 MiB",
        "each of the 2 devices holds MLA's latents whole",
        "51.2 MiB of cache is too little for one request of 1,048,576 tokens: 19,968 tokens fit",
    ):
        assert words in lines
    assert all("\n" not in line for line in plan.warnings)
    assert "no request fits" in served(LLAMA_1B, "4MLA12GDN", cache_bytes=2**20).warnings[-1]
    assert not served(LLAMA_1B, "16A", cache_bytes=8 * GIB).warnings


def test_sequences_are_limited_by_blocks_on_gpus(served: Any) -> None:
    plan = served(LLAMA_3B, "14MLA14GDN", memory_bytes=80 * GIB)
    assert plan.num_blocks < 1024
    assert plan.max_num_seqs == plan.num_blocks
    assert any(f"give --max-num-seqs {plan.num_blocks}" in line for line in plan.warnings)
    assert served(LLAMA_3B, "28MLA", memory_bytes=80 * GIB).max_num_seqs == 1024


def test_refusals(served: Any) -> None:
    with pytest.raises(HyloError, match=r"gdn_num_heads is 9, which 2 devices cannot share; possible here: 1"):
        served(LLAMA_3B, "6MLA22GDN", tensor_parallel=2)
    with pytest.raises(HyloError, match=r"num_attention_heads is 24, which 16 devices cannot share"):
        served(LLAMA_3B, "28A", tensor_parallel=16)
    with pytest.raises(HyloError, match=r"the vocabulary, padded to 151,936, cannot be shared by 3 devices"):
        odd = {"vocab_size": 151936, "intermediate_size": 8193}
        served(LLAMA_3B | odd, "6MLA22GDN", tensor_parallel=3)
    with pytest.raises(HyloError, match=r"6 GiB of memory, of which vLLM uses 92 %, has no room for a cache: weights"):
        served(LLAMA_3B, "6MLA22GDN", memory_bytes=6 * GIB)
    with pytest.raises(HyloError, match="max_model_len is 0"):
        served(LLAMA_1B, "16A", max_model_len=0)
    mixed = HyloConfig(mixers=["mla", "attention"], num_hidden_layers=2)
    with pytest.raises(HyloError, match="MLA and the base's attention in one model"):
        plan_serving(mixed, dtype="bfloat16")
    with pytest.raises(HyloError, match="KDA has states in float32 on GPUs, not in bfloat16"):
        served(LLAMA_1B, "4MLA12KDA", state_dtype="bfloat16")
    assert served(LLAMA_1B, "4MLA12KDA", state_dtype="bfloat16", platform="cpu").state_dtype == "bfloat16"
    exact = HyloConfig(mixers=["mla"], num_hidden_layers=1, qk_norm=True)
    with pytest.raises(HyloError, match="--k-norm folded"):
        plan_serving(exact, dtype="bfloat16")


def test_kv_heads_are_repeated_on_more_devices(served: Any) -> None:
    eight, sixteen = (served(LLAMA_1B, "16A", tensor_parallel=n) for n in (8, 16))
    assert eight.pages.token_bytes == sixteen.pages.token_bytes == 2 * 64 * 2


def test_print_and_json(served: Any) -> None:
    plan = served(LLAMA_3B, "6MLA22GDN", memory_bytes=80 * GIB)
    figures = json.loads(json.dumps(plan.to_json()))
    assert all(not isinstance(value, dict) for value in figures.values())
    assert figures["block_size"] == 12544
    assert figures["groups"].count("6 gated_deltanet") == 2
    assert figures["largest_context"] == plan.largest_context
    stream = io.StringIO()
    plan.print(Console(file=stream, width=200))
    text = stream.getvalue()
    for words in ("block: 12,544 tokens", "2,304 bytes a token and 105,025,536 a sequence", "(an estimate)", "at once"):
        assert words in text
    assert len(text.splitlines()) <= 10
    served(LLAMA_1B, "16GDN").print(Console(file=stream, width=200))
    assert "no layer caches tokens" in stream.getvalue()
