"""vLLM's own engine, timed: its steps are taken here, so that every token's arrival is seen."""

import time
from pathlib import Path
from typing import Any

from hylo.serve.child import prompts, run
from hylo.serve.directory import read_served
from hylo.serve.latency import OUT_OF_MEMORY, Job, Point, measured


class EngineSession:
    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job = job
        beyond = job.longest > read_served(Path(job.directory)).supported
        self.engine: Any = LLM(
            job.directory,
            dtype=job.dtype,
            mamba_ssm_cache_dtype=job.state_dtype,
            max_model_len=job.longest,
            max_num_seqs=max(requests for _, requests in job.points),
            kv_cache_memory_bytes=job.cache_bytes,
            enable_prefix_caching=False,
            enforce_eager=job.eager,
            skip_tokenizer_init=True,
            hf_overrides={"max_position_embeddings": job.longest} if beyond else {},
            seed=job.seed,
            disable_log_stats=True,
        ).llm_engine
        self.cache = self.engine.engine_core.engine_core.scheduler.kv_cache_config
        self.about = {"engine": describe_cache(self.cache, self.engine.vllm_config)}

    def measure(self, length: int, concurrency: int) -> Point:
        fit = (self.cache.num_blocks - 1) // blocks_for(self.cache, length)  # vLLM keeps one block for itself
        if fit < concurrency:
            reason = f"the cache holds {fit} of {concurrency} sequences"
            return {"length": length, "concurrency": concurrency, "status": OUT_OF_MEMORY, "reason": reason}
        repeats = []
        for repeat in range(-self.job.warmup, self.job.repeats):
            times = self._serve(length, concurrency, repeat)
            if repeat >= 0:
                repeats.append(times)
        return measured((length, concurrency), repeats)

    def _serve(self, length: int, concurrency: int, repeat: int) -> list[list[float]]:
        """Requests that arrive together; seconds after that at which each of them got each of its tokens."""
        from vllm import SamplingParams

        how = SamplingParams(
            temperature=0.0,
            max_tokens=self.job.new_tokens,
            min_tokens=self.job.new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        vocabulary = self.engine.model_config.get_vocab_size()
        start = time.perf_counter()
        stamps: dict[str, list[float]] = {}
        for i, ids in enumerate(prompts(self.job, length, concurrency, vocabulary, repeat)):
            stamps[str(i)] = []
            self.engine.add_request(str(i), {"prompt_token_ids": ids}, how)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                times = stamps[output.request_id]
                times += [now] * (len(output.outputs[0].token_ids) - len(times))
        return list(stamps.values())


def blocks_for(cache: Any, length: int) -> int:
    """Blocks that one sequence takes: one a state, and as many as its tokens fill in every group that caches them."""
    return sum(
        1 if _is_state(group.kv_cache_spec) else -(-length // group.kv_cache_spec.block_size)
        for group in cache.kv_cache_groups
    )


def describe_cache(cache: Any, vllm_config: Any) -> dict[str, Any]:
    """What the engine made of the model: bytes a token and a sequence, as the layers need them and as paged."""
    groups, bytes_of = [], {"token": 0.0, "paged_token": 0.0, "state": 0, "paged_state": 0}
    for group in cache.kv_cache_groups:
        specs = _layer_specs(group)
        for spec in specs:
            if _is_state(spec):
                bytes_of["state"] += spec.real_page_size_bytes
                bytes_of["paged_state"] += spec.page_size_bytes
            else:
                bytes_of["token"] += spec.real_page_size_bytes / spec.block_size
                bytes_of["paged_token"] += spec.page_size_bytes / spec.block_size
        groups.append(
            {
                "layers": len(group.layer_names),
                "kind": type(specs[0]).__name__,
                "block_size": group.kv_cache_spec.block_size,
                "page_bytes": specs[0].page_size_bytes,
            }
        )
    return {
        "groups": groups,
        "num_blocks": cache.num_blocks,
        "kv_bytes_per_token": bytes_of["token"],
        "kv_bytes_per_token_paged": bytes_of["paged_token"],
        "state_bytes_per_sequence": bytes_of["state"],
        "state_bytes_per_sequence_paged": bytes_of["paged_state"],
        "chunked_prefill": vllm_config.scheduler_config.enable_chunked_prefill,
        "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
    }


def _layer_specs(group: Any) -> list[Any]:
    """One specification a layer, also where the group has several kinds."""
    own = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return list(own.values()) if own else [group.kv_cache_spec] * len(group.layer_names)


def _is_state(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import MambaSpec

    return isinstance(spec, MambaSpec)


def main() -> None:
    run(EngineSession)
