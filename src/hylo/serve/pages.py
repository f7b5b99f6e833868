"""How vLLM 0.32 lays out a hybrid's cache: the block size, the bytes of a page, and which layers share a block.

All layers take pages of one size from one pool. Where layers keep a recurrent state, blocks of tokens grow until their
page holds that state, which is then padded to the page. Layers of one kind are split into groups, as many layers each
as the rarest kind has; a block of the pool has a page for every layer of a group. Read off `_align_hybrid_block_size`
(vllm/platforms/interface.py) and `get_kv_cache_groups` (vllm/v1/core/kv_cache_utils.py), to whose own results
tests/serving/test_memory_parity.py holds these.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hylo.checkpoint import check_dtype
from hylo.geometry import geometry_in, state_values
from hylo.modeling.configuration import CACHE_KIND, HyloConfig
from hylo.serve.supported import cached_width

Platform = Literal["cuda", "cpu"]
KERNEL_BLOCK = 16  # tokens: the smallest block that the attention kernels take
GPU_MLA_BLOCK = 128  # tokens: what a hybrid's MLA blocks are multiples of on GPUs
DEFAULT_BLOCK: dict[Platform, int] = {"cuda": 16, "cpu": 128}


@dataclass(frozen=True)
class Group:
    """Layers of one mixer that share a block table; `tokens`: they cache tokens, not a state."""

    mixer: str
    layers: int
    tokens: bool


@dataclass(frozen=True)
class Pages:
    """The cache on one device. `token_bytes`: of one layer; `state_bytes`: of one layer by mixer, before padding.

    `block_size` in tokens; without layers that cache tokens it is the whole sequence.
    """

    block_size: int
    page_bytes: int
    token_bytes: int
    state_bytes: Mapping[str, int]
    groups: tuple[Group, ...]
    states_per_sequence: int

    @property
    def places(self) -> int:
        """Pages in a block: the layers of the largest group."""
        return max(group.layers for group in self.groups)

    @property
    def block_bytes(self) -> int:
        return self.places * self.page_bytes

    @property
    def token_groups(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def state_blocks(self) -> int:
        """Blocks that a sequence takes at any length."""
        return (len(self.groups) - self.token_groups) * self.states_per_sequence

    def blocks(self, length: int) -> int:
        """Blocks that one sequence of this length takes."""
        return self.token_groups * -(-length // self.block_size) + self.state_blocks

    def longest(self, blocks: int) -> int | None:
        """Tokens of the longest sequence in so many blocks; None: any length, as nothing grows with it."""
        if not self.token_groups:
            return None if blocks >= self.state_blocks else 0
        return max(0, (blocks - self.state_blocks) // self.token_groups) * self.block_size


def lay_out(
    config: HyloConfig,
    dtype: str,
    state_dtype: str,
    max_model_len: int,
    tensor_parallel: int = 1,
    block_size: int | None = None,
    platform: Platform = "cuda",
    prefix_caching: bool = False,
) -> Pages:
    """The cache of one of `tensor_parallel` devices; `block_size`: what --block-size asks for.

    With `prefix_caching`, a sequence holds two states of every layer, the current one and that at the last block's end.
    """
    counts = Counter(config.mixers)
    tokens = layer_token_bytes(config, dtype, tensor_parallel)
    states = {
        mixer: layer_state_bytes(config, mixer, dtype, state_dtype, tensor_parallel)
        for mixer in counts
        if CACHE_KIND[mixer] == "linear_attention"
    }
    if tokens:
        block = block_size or DEFAULT_BLOCK[platform]
        if states:
            step = max(block, GPU_MLA_BLOCK if "mla" in counts and platform == "cuda" else KERNEL_BLOCK)
            block = max(block, step * -(-max(states.values()) // (step * tokens)))
        page = block * tokens
    else:
        block, page = max_model_len, max(states.values())
    if not tokens and len(set(states.values())) == 1:  # one size without padding: all in one block
        groups = [Group(next(iter(states)), len(config.mixers), False)]
    else:
        groups = [
            Group(mixer, layers, mixer not in states)
            for mixer, count in counts.items()
            for layers in _split(count, _group_size(list(counts.values())))
        ]
    return Pages(block, page, tokens, states, tuple(groups), 2 if prefix_caching else 1)


def layer_token_bytes(config: HyloConfig, dtype: str, tensor_parallel: int = 1) -> int:
    """What a layer that caches tokens takes for one: MLA's latent, whole on every device, or a device's keys and
    values; 0 where no layer does."""
    itemsize = check_dtype(dtype).itemsize
    if "mla" in config.mixers:
        return cached_width(config) * itemsize
    if "attention" in config.mixers:
        return 2 * max(1, config.num_key_value_heads // tensor_parallel) * config.head_dim * itemsize
    return 0


def layer_state_bytes(config: HyloConfig, mixer: str, dtype: str, state_dtype: str, tensor_parallel: int = 1) -> int:
    """The recurrent state and the convolution's columns of one layer, of which a device has its heads' share."""
    state, columns = state_values(mixer, geometry_in(config))
    whole = state * check_dtype(state_dtype).itemsize + columns * check_dtype(dtype).itemsize
    return whole // tensor_parallel


def _group_size(counts: list[int]) -> int:
    """The rarest kind's number of layers; that of the commonest where it is less than half more."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def _split(count: int, size: int) -> list[int]:
    """Layers dealt out one by one to as few groups as hold them."""
    groups = -(-count // size)
    return [len(range(start, count, groups)) for start in range(groups)]
