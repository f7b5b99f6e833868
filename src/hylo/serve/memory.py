"""What vLLM 0.32 will do with a hybrid's memory: block size, pages, waste, and how many tokens and requests fit.

`plan_serving` needs only a configuration. The cache follows vLLM's own rules (hylo.serve.pages); the weights are
counted, the workspace is an estimate (hylo.serve.footprint), which vLLM measures when it starts.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console

from hylo.checkpoint import check_dtype
from hylo.errors import HyloError
from hylo.geometry import cached_values_per_token
from hylo.layout import layout_name
from hylo.modeling.configuration import CACHE_KIND, HyloConfig
from hylo.report.names import in_bytes
from hylo.serve import footprint
from hylo.serve.pages import Pages, Platform, lay_out, layer_state_bytes
from hylo.serve.supported import check_servable, check_state_dtype, served_rank

UTILIZATION = 0.92  # vLLM's --gpu-memory-utilization where nothing is asked for
LARGE_BLOCK = 1024  # tokens: requests may well be shorter
LARGE_SHARE = 10  # per cent of a sequence's cache that a single kind of padding should not exceed


@dataclass(frozen=True)
class ServePlan:
    """Bytes of one device but for `kv_bytes_per_token` and `state_bytes_per_sequence`, which are `hylo plan`'s.

    A sequence of `max_model_len` tokens takes `sequence_bytes` of blocks, and wastes `padding` (bytes by cause, the
    last block counted as half empty). `workspace_bytes` is an estimate. `cache_bytes` and what follows from it are None
    where no memory was given; `largest_context` is None, too, where no layer caches tokens: any length fits.
    """

    layout: str
    platform: Platform
    dtype: str
    state_dtype: str
    tensor_parallel: int
    max_model_len: int
    pages: Pages
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    padding: dict[str, int]
    weight_bytes: int
    workspace_bytes: int
    step_tokens: int
    step_sequences: int
    memory_bytes: int | None
    utilization: float
    cache_bytes: int | None
    warnings: list[str] = field(default_factory=list)

    @property
    def sequence_bytes(self) -> int:
        return self.pages.blocks(self.max_model_len) * self.pages.block_bytes

    @property
    def waste_bytes(self) -> int:
        return sum(self.padding.values())

    @property
    def waste_percent(self) -> float:
        """Of a sequence's blocks at max_model_len."""
        return 100 * self.waste_bytes / self.sequence_bytes

    @property
    def num_blocks(self) -> int | None:
        """Blocks of the pool; vLLM keeps one of them for itself."""
        return None if self.cache_bytes is None else self.cache_bytes // self.pages.block_bytes

    @property
    def concurrency(self) -> float | None:
        """Requests of max_model_len tokens that fit, as vLLM logs it."""
        return None if self.num_blocks is None else self.num_blocks / self.pages.blocks(self.max_model_len)

    @property
    def concurrent_requests(self) -> int | None:
        """Whole requests of max_model_len tokens that run at once."""
        if self.num_blocks is None:
            return None
        return min(max(0, self.num_blocks - 1) // self.pages.blocks(self.max_model_len), self.step_sequences)

    @property
    def max_num_seqs(self) -> int:
        """Sequences of a step that vLLM starts with: its GPU graphs want a block for each where there are states."""
        if self.num_blocks is None or self.platform == "cpu" or not self.pages.state_blocks:
            return self.step_sequences
        return min(self.step_sequences, self.num_blocks)

    @property
    def tokens(self) -> int | None:
        """The cache's tokens in requests of max_model_len, as vLLM logs it."""
        return None if self.concurrency is None else int(self.concurrency * self.max_model_len)

    @property
    def largest_context(self) -> int | None:
        return None if self.num_blocks is None else self.pages.longest(self.num_blocks - 1)

    def to_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key not in ("pages", "padding", "warnings")}
        return own | {
            "block_size": self.pages.block_size,
            "page_bytes": self.pages.page_bytes,
            "block_bytes": self.pages.block_bytes,
            "groups": [f"{group.layers} {group.mixer}" for group in self.pages.groups],
            "places_per_group": self.pages.places,
            **{f"padding_{cause}_bytes": n for cause, n in self.padding.items()},
            "sequence_bytes": self.sequence_bytes,
            "waste_bytes": self.waste_bytes,
            "waste_percent": self.waste_percent,
            "num_blocks": self.num_blocks,
            "tokens": self.tokens,
            "concurrency": self.concurrency,
            "concurrent_requests": self.concurrent_requests,
            "largest_context": self.largest_context,
            "max_num_seqs": self.max_num_seqs,
            "warnings": list(self.warnings),
        }

    def print(self, console: Console) -> None:
        """A line for each question, then the warnings."""
        pages, length = self.pages, self.max_model_len
        write = partial(console.print, soft_wrap=True)
        devices = f", each of {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        write(f"served by vLLM ({self.platform}, {self.dtype}, state {self.state_dtype}{devices}):")
        if pages.token_groups:
            write(f"  block: {pages.block_size:,} tokens; page: {pages.page_bytes:,} bytes a layer")
        else:
            write(f"  no layer caches tokens; page: {pages.page_bytes:,} bytes a layer, one a sequence")
        groups = ", ".join(f"{group.layers} {group.mixer}" for group in pages.groups)
        write(f"  groups: {groups}; a block has {pages.places} pages, {in_bytes(pages.block_bytes)}")
        if pages.state_bytes and pages.states_per_sequence > 1:
            write(f"  a sequence holds {pages.states_per_sequence} states of every layer, for the prefix cache")
        write(
            f"  cache: {self.kv_bytes_per_token:,} bytes a token and {self.state_bytes_per_sequence:,} a sequence as "
            f"planned; in blocks {in_bytes(self.sequence_bytes)} for {length:,} tokens"
        )
        causes = ", ".join(f"{cause.replace('_', ' ')} {in_bytes(n)}" for cause, n in self.padding.items() if n)
        write(f"  waste: {in_bytes(self.waste_bytes)}, {self.waste_percent:.1f} %{f' ({causes})' * bool(causes)}")
        write(
            f"  weights: {in_bytes(self.weight_bytes)}; workspace: about {in_bytes(self.workspace_bytes)} for steps of "
            f"{self.step_tokens:,} tokens, {self.step_sequences:,} sequences (an estimate)"
        )
        if self.cache_bytes is not None:
            write(
                f"  cache memory: {in_bytes(self.cache_bytes)}, {self.num_blocks:,} blocks: {self.tokens:,} tokens, "
                f"{self.concurrent_requests:,} requests of {length:,} at once; largest context: "
                + ("any" if self.largest_context is None else f"{self.largest_context:,}")
            )
        for warning in self.warnings:
            write(f"warning: {warning}", style="yellow")


def plan_serving(
    config: HyloConfig,
    *,
    dtype: str,
    state_dtype: str = "float32",
    memory_bytes: int | None = None,
    cache_bytes: int | None = None,
    weight_bytes: int | None = None,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    block_size: int | None = None,
    platform: Platform = "cuda",
    utilization: float = UTILIZATION,
    prefix_caching: bool = False,
) -> ServePlan:
    """What vLLM will do with `config` on each of `tensor_parallel` devices of `memory_bytes`.

    `cache_bytes`: a cache of given size, as --kv-cache-memory-bytes sets it, in place of what weights and workspace
    leave of `memory_bytes` x `utilization`. `weight_bytes`: of one device, where known better. `max_model_len`: the
    model's length if left out. `prefix_caching`: every sequence then holds two states. Raises HyloError for a model
    that cannot be served or cut so, and for weights that do not fit; what fits only in part is in `warnings`.
    """
    check_servable(config, tensor_parallel)
    check_state_dtype(config, state_dtype, platform)
    length = config.max_position_embeddings if max_model_len is None else max_model_len
    if length < 1:
        raise HyloError(f"max_model_len is {length}; it must be at least 1 token")
    pages = lay_out(config, dtype, state_dtype, length, tensor_parallel, block_size, platform, prefix_caching)
    weights = footprint.weight_bytes(config, dtype, tensor_parallel) if weight_bytes is None else weight_bytes
    step_tokens, step_sequences = footprint.batch(platform, memory_bytes, tensor_parallel, length)
    workspace = footprint.workspace_bytes(
        config, dtype, pages, step_tokens, step_sequences, length, tensor_parallel, platform
    )
    if cache_bytes is None and memory_bytes is not None:
        cache_bytes = int(memory_bytes * utilization) - weights - workspace
        if cache_bytes <= 0:
            raise HyloError(
                f"{in_bytes(memory_bytes)} of memory, of which vLLM uses {100 * utilization:g} %, has no room for a "
                f"cache: weights take {in_bytes(weights)}, the workspace about {in_bytes(workspace)}; give more memory"
            )
    itemsize = check_dtype(dtype).itemsize
    plan = ServePlan(
        layout=layout_name(config.mixers),
        platform=platform,
        dtype=dtype,
        state_dtype=state_dtype,
        tensor_parallel=tensor_parallel,
        max_model_len=length,
        pages=pages,
        kv_bytes_per_token=sum(_cached_values(config, i) for i in range(len(config.mixers))) * itemsize,
        state_bytes_per_sequence=sum(layer_state_bytes(config, mixer, dtype, state_dtype) for mixer in config.mixers),
        padding=_padding(config, pages, length, itemsize),
        weight_bytes=weights,
        workspace_bytes=workspace,
        step_tokens=step_tokens,
        step_sequences=step_sequences,
        memory_bytes=memory_bytes,
        utilization=utilization,
        cache_bytes=cache_bytes,
    )
    plan.warnings.extend(_warnings(config, plan))
    return plan


def _cached_values(config: HyloConfig, layer_idx: int) -> int:
    geometry = {"kv_lora_rank": config.kv_rank(layer_idx), "qk_rope_head_dim": config.qk_rope_head_dim}
    return cached_values_per_token(config, config.mixers[layer_idx], geometry)


def _padding(config: HyloConfig, pages: Pages, length: int, itemsize: int) -> dict[str, int]:
    """Bytes of one sequence's blocks that hold nothing, by cause."""
    token_blocks, held = -(-length // pages.block_size), pages.states_per_sequence
    caching = sum(CACHE_KIND[mixer] == "full_attention" for mixer in config.mixers)
    ranks = [config.kv_rank(i) for i, mixer in enumerate(config.mixers) if mixer == "mla"]
    return {
        "state_pages": sum(
            held * (pages.page_bytes - pages.state_bytes.get(mixer, pages.page_bytes)) for mixer in config.mixers
        ),
        "empty_places": sum(
            (token_blocks if group.tokens else held) * (pages.places - group.layers) * pages.page_bytes
            for group in pages.groups
        ),
        "last_block": caching * pages.page_bytes // 2,
        "ranks": sum(served_rank(config) - rank for rank in ranks) * itemsize * length,
    }


def _warnings(config: HyloConfig, plan: ServePlan) -> list[str]:
    pages, length = plan.pages, plan.max_model_len
    lines = []
    if length > config.max_position_embeddings:
        lines.append(
            f"max_model_len {length:,} is above the model's {config.max_position_embeddings:,} tokens, "
            "which vLLM refuses; extend the model first"
        )
    if pages.token_groups and pages.state_blocks and pages.block_size > LARGE_BLOCK:
        least = pages.blocks(1) * pages.block_bytes
        lines.append(
            f"a block is {pages.block_size:,} tokens, to hold a layer's state: a request takes at least "
            f"{in_bytes(least)} of cache, however short"
            + ("; --state-dtype bfloat16 about halves that" if plan.state_dtype == "float32" else "")
        )
    for cause, text in (
        ("state_pages", "of a sequence's cache pad states to a page"),
        (
            "empty_places",
            f"of a sequence's cache are empty places, as no group but the largest has {pages.places} layers",
        ),
        ("ranks", "of a sequence's cache pad latents to the largest kv_lora_ranks, as vLLM's layers must agree"),
    ):
        percent = 100 * plan.padding[cause] / plan.sequence_bytes
        if percent > LARGE_SHARE or (cause == "ranks" and percent):
            lines.append(f"{in_bytes(plan.padding[cause])} ({percent:.1f} %) {text}")
    if plan.tensor_parallel > 1 and "mla" in config.mixers:
        lines.append(
            f"each of the {plan.tensor_parallel} devices holds MLA's latents whole; states and weights are cut"
        )
    if plan.max_num_seqs < plan.step_sequences:
        lines.append(
            f"vLLM does not start with its {plan.step_sequences:,} sequences a step on {plan.num_blocks:,} blocks; "
            f"give --max-num-seqs {plan.max_num_seqs}"
        )
    if plan.concurrent_requests == 0:
        context = plan.largest_context
        fits = f"{context:,} tokens fit" if context else "no request fits"
        lines.append(
            f"{in_bytes(plan.cache_bytes or 0)} of cache is too little for one request of {length:,} tokens: {fits}"
        )
    return lines
