"""How linear blocks use transformers' cache, and what that cache lacks for models without any attention layer."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from hylo.modeling.configuration import HyloConfig


class LinearCache(DynamicCache):
    """A DynamicCache that counts its tokens: transformers' own asks an attention layer, and raises without one."""

    is_compileable = False  # or generate would ask for 4-D masks, whose sizes an attention layer would have to give
    seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


def new_cache(config: HyloConfig) -> DynamicCache:
    cache_class = DynamicCache if "full_attention" in config.layer_types else LinearCache
    return cache_class(config=config)


def read_states(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's (B,C,width-1) and the recurrent state of a linear layer; None before the first token."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer: Any = cache.layers[layer_idx]  # Cache.get_conv_state exists in later versions of transformers only
    return layer.conv_states[0], layer.recurrent_states[0]


def write_states(cache: Cache | None, layer_idx: int, conv_state: Tensor, recurrent_state: Tensor | None) -> None:
    if cache is not None:
        cache.update_conv_state(conv_state, layer_idx)
        cache.update_recurrent_state(recurrent_state, layer_idx)
