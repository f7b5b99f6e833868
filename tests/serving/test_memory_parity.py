"""The predicted cache against what vLLM's own functions make of the same layers, without a model or an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import (
    _estimate_max_model_len_from_groups,
    _max_memory_usage_bytes_from_groups,
    get_kv_cache_capacity,
    get_kv_cache_config_from_groups,
    get_kv_cache_configs,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec

from hylo.checkpoint import check_dtype
from hylo.modeling.configuration import HyloConfig
from hylo.serve.latent import LatentCPUBackend
from hylo.serve.memory import ServePlan, plan_serving
from hylo.serve.model import MIXER_CLASSES, HyloForCausalLM
from hylo.serve.supported import cached_width

GIB = 2**30
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "kv_lora_rank": 128,
    "q_lora_rank": 1344,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "gdn_num_heads": 6,
    "gdn_head_dim": 256,
    "mamba_d_state": 64,
    "mamba_head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_d_inner": 2048,
    "mamba_d_xb": 512,
    "kda_num_heads": 32,
    "kda_head_dim": 64,
    "max_position_embeddings": 65536,
}
LLAMA_3B = LLAMA_1B | {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "head_dim": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "gdn_num_heads": 9,
    "mamba_d_state": 128,
    "mamba_head_dim": 128,
    "mamba_num_heads": 24,
    "mamba_d_inner": 3072,
    "mamba_d_xb": 1024,
    "kda_num_heads": 24,
    "kda_head_dim": 128,
    "max_position_embeddings": 2**21,
}
TINY: dict[str, Any] = {"max_position_embeddings": 4096}  # HyloConfig's own widths
MLA, GDN, M2, KDA, A = "mla", "gated_deltanet", "mamba2", "kda", "attention"
CASES = {
    "1B 4MLA12GDN": (LLAMA_1B, [MLA] * 4 + [GDN] * 12, {}),
    "1B 4MLA12GDN, bf16 state": (LLAMA_1B, [MLA] * 4 + [GDN] * 12, {"state_dtype": "bfloat16"}),
    "1B 4MLA12GDN on a CPU": (LLAMA_1B, [MLA] * 4 + [GDN] * 12, {"platform": "cpu", "dtype": "float32"}),
    "1B 4MLA12GDN, prefix caching": (LLAMA_1B, [MLA] * 4 + [GDN] * 12, {"prefix_caching": True}),
    "1B 8MLA8M2": (LLAMA_1B, [MLA, M2] * 8, {}),
    "1B 8MLA8M2 on two": (LLAMA_1B, [MLA, M2] * 8, {"tensor_parallel": 2}),
    "1B 4MLA12KDA": (LLAMA_1B, [MLA] * 4 + [KDA] * 12, {}),
    "1B all KDA": (LLAMA_1B, [KDA] * 16, {}),
    "3B 6MLA22KDA on eight": (LLAMA_3B, [MLA] * 6 + [KDA] * 22, {"tensor_parallel": 8}),
    "1B 8A8GDN": (LLAMA_1B, [A, GDN] * 8, {}),
    "1B 8A8GDN, blocks of 64 asked for": (LLAMA_1B, [A, GDN] * 8, {"block_size": 64}),
    "1B 8A8GDN on two": (LLAMA_1B, [A, GDN] * 8, {"tensor_parallel": 2}),
    "1B 8A8GDN on a CPU": (LLAMA_1B, [A, GDN] * 8, {"platform": "cpu", "dtype": "float32"}),
    "1B all MLA": (LLAMA_1B, [MLA] * 16, {}),
    "1B all MLA on a CPU": (LLAMA_1B, [MLA] * 16, {"platform": "cpu"}),
    "1B dense": (LLAMA_1B, [A] * 16, {}),
    "1B all GDN": (LLAMA_1B, [GDN] * 16, {}),
    "1B GDN and M2": (LLAMA_1B, [GDN] * 10 + [M2] * 6, {}),
    "1B 4MLA7GDN5M2": (LLAMA_1B, [MLA] * 4 + [GDN] * 7 + [M2] * 5, {}),
    "3B 6MLA22GDN": (LLAMA_3B, ([MLA] + [GDN] * 4) * 5 + [MLA] + [GDN] * 2, {}),
    "3B 6MLA22GDN on three": (LLAMA_3B | {"intermediate_size": 8193}, [MLA] * 6 + [GDN] * 22, {"tensor_parallel": 3}),
    "3B 14MLA14GDN": (LLAMA_3B, [MLA, GDN] * 14, {}),
    "3B dense": (LLAMA_3B, [A] * 28, {}),
    "tiny 1MLA3GDN": (TINY, [GDN, GDN, MLA, GDN], {"dtype": "float32"}),
    "tiny 1MLA3GDN on two": (TINY, [GDN, GDN, MLA, GDN], {"tensor_parallel": 2}),
    "tiny 2MLA2M2 on two": (TINY, [MLA, M2, MLA, M2], {"tensor_parallel": 2}),
    "tiny 3MLA4GDN": (TINY, [MLA, GDN] * 3 + [GDN], {}),
    "tiny ranks": (TINY | {"kv_lora_ranks": [32, 0, 64, 0]}, [MLA, GDN, MLA, GDN], {}),
    "tiny A on four": (TINY | {"gdn_num_heads": 4}, [A, GDN, GDN, A] * 2, {"tensor_parallel": 4}),
}


class GPUKernel:
    """The smallest blocks of vLLM's Triton and flash attention."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def customize_spec(spec: Any) -> Any:
        return spec


@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_vllm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, mixers, given = CASES[name]
    config = HyloConfig(**widths, mixers=mixers, num_hidden_layers=len(mixers))
    arguments: dict[str, Any] = {"dtype": "bfloat16", "cache_bytes": 3 * GIB} | given
    plan = plan_serving(config, **arguments)

    engine = engine_config(config, plan, monkeypatch, given.get("block_size"))
    specs = layer_specs(config, plan, engine)
    groups = get_kv_cache_groups(engine, dict(specs))
    cache = get_kv_cache_config_from_groups(engine, groups, 3 * GIB)
    tokens, concurrency = get_kv_cache_capacity(engine, cache)

    if plan.pages.token_groups:
        assert plan.pages.block_size == engine.cache_config.block_size
    assert {group.kv_cache_spec.page_size_bytes for group in groups} == {plan.pages.page_bytes}
    assert sorted(len(group.layer_names) for group in groups) == sorted(group.layers for group in plan.pages.groups)
    assert plan.num_blocks == cache.num_blocks
    assert plan.sequence_bytes == _max_memory_usage_bytes_from_groups(engine, groups)
    assert (plan.tokens, plan.concurrency) == (tokens, concurrency)

    usable = (cache.num_blocks - 1) * plan.pages.block_bytes
    largest = _estimate_max_model_len_from_groups(engine, groups, usable)
    longest = plan.max_model_len if plan.largest_context is None else plan.largest_context
    assert largest == min(longest, plan.max_model_len)


@pytest.mark.parametrize("name", ["1B 4MLA12GDN", "1B dense", "3B 6MLA22GDN", "tiny 2MLA2M2 on two"])
def test_the_length_that_fits_is_vllms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block less than the longest sequence needs: vLLM refuses, and the length in the warning is accepted."""
    widths, mixers, given = CASES[name]
    config = HyloConfig(**widths, mixers=mixers, num_hidden_layers=len(mixers))
    arguments: dict[str, Any] = {"dtype": "bfloat16"} | given
    need = plan_serving(config, **arguments)
    memory = need.sequence_bytes + need.pages.block_bytes  # one block is vLLM's own
    for cache_bytes, fits in ((memory, True), (memory - 1, False)):
        plan = plan_serving(config, **arguments, cache_bytes=cache_bytes)
        assert (plan.concurrent_requests == 1) is fits
        engine = engine_config(config, plan, monkeypatch)
        specs = layer_specs(config, plan, engine)
        if fits:
            get_kv_cache_configs(engine, [dict(specs)], [cache_bytes])
            continue
        with pytest.raises(ValueError, match="To serve at least one request"):
            get_kv_cache_configs(engine, [dict(specs)], [cache_bytes])
        assert plan.largest_context
        engine.model_config.max_model_len = plan.largest_context
        get_kv_cache_configs(engine, [dict(specs)], [cache_bytes])


def engine_config(
    config: HyloConfig, plan: ServePlan, monkeypatch: pytest.MonkeyPatch, asked: int | None = None
) -> Any:
    """vLLM's configuration, a stand-in for the model's in it; vLLM chooses the block size from the plugin's model."""
    engine: Any = VllmConfig()
    cache, devices = engine.cache_config, plan.tensor_parallel
    engine.parallel_config.tensor_parallel_size = devices
    cache.kv_cache_layout = "LBNHC"
    cache.block_size = asked or (16 if plan.platform == "cuda" else 128)
    cache.mamba_ssm_cache_dtype = plan.state_dtype
    align = plan.pages.states_per_sequence == 2
    cache.mamba_cache_mode = "align" if align else "none"
    latent, on_gpu = MLA in config.mixers, plan.platform == "cuda"
    kv_heads = max(1, config.num_key_value_heads // devices)
    engine.model_config = SimpleNamespace(
        hf_config=config,
        max_model_len=plan.max_model_len,
        original_max_model_len=plan.max_model_len,
        dtype=check_dtype(plan.dtype),
        use_mla=latent and on_gpu,
        architecture="HyloForCausalLM",
        get_num_kv_heads=lambda _: 1 if latent and on_gpu else kv_heads,
        get_head_size=lambda: cached_width(config) if latent else config.head_dim,
    )
    if {MLA, A} & set(config.mixers):  # vLLM leaves a model without attention as it is
        kernel = GPUKernel if on_gpu else LatentCPUBackend if latent else CPUAttentionBackend
        monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *_, **__: (HyloForCausalLM, None))
        monkeypatch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda *_: [kernel]))
        if {GDN, M2, KDA} & set(config.mixers):
            Platform._align_hybrid_block_size(engine, kernel)
    cache.mamba_block_size = cache.block_size if align else plan.max_model_len
    return engine


def layer_specs(config: HyloConfig, plan: ServePlan, engine: Any) -> dict[str, KVCacheSpec]:
    """What the plugin's layers announce."""
    cache, dtype = engine.cache_config, check_dtype(plan.dtype)
    kinds = {
        GDN: MambaAttentionBackendEnum.GDN_ATTN,
        M2: MambaAttentionBackendEnum.MAMBA2,
        KDA: MambaAttentionBackendEnum.GDN_ATTN,
    }

    def spec(mixer: str) -> KVCacheSpec:
        if mixer == MLA:
            width = cached_width(config)
            return MLAAttentionSpec(block_size=cache.block_size, num_kv_heads=1, head_size=width, dtype=dtype)
        if mixer == A:
            heads, width = max(1, config.num_key_value_heads // plan.tensor_parallel), config.head_dim
            return FullAttentionSpec(block_size=cache.block_size, num_kv_heads=heads, head_size=width, dtype=dtype)
        return MambaSpec(
            block_size=cache.mamba_block_size,
            shapes=MIXER_CLASSES[mixer].state_shapes(config, plan.tensor_parallel),
            dtypes=HyloForCausalLM.get_mamba_state_dtype_from_config(engine),
            page_size_padded=cache.mamba_page_size_padded,
            mamba_type=kinds[mixer],
            mamba_cache_mode=cache.mamba_cache_mode,
        )

    return {f"layers.{i}": spec(mixer) for i, mixer in enumerate(config.mixers)}
