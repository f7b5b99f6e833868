"""vLLM's attention backends for latents of any width: its own Triton kernels on GPUs, torch on CPUs.

vLLM's compiled decoding on CPUs knows a width of 576 alone, and its metadata three widths; both are widened here.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionLayer, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.kv_cache_interface import AttentionSpec, replace

from hylo.ops.latent_attention import expanded_latent_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # also tells the logarithm of the softmax's sum
PART = 2048  # tokens that a thread takes at once, about


@cache
def latent_backend() -> type[AttentionBackend]:
    if current_platform.is_cpu():
        return LatentCPUBackend
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAMetadataBuilder

    class LatentTritonBuilder(TritonMLAMetadataBuilder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.metadata_cls = LatentMetadata

    class LatentTritonBackend(TritonMLABackend):
        @staticmethod
        def get_builder_cls() -> type[MLACommonMetadataBuilder]:
            return LatentTritonBuilder

    return LatentTritonBackend


class LatentMetadata(MLACommonMetadata):
    def __post_init__(self) -> None:
        """Without the check that the width is 320, 512 or 576."""


class LatentCPUBuilder(MLACommonMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, metadata_cls=LatentMetadata)


class LatentCPUBackend(CPUMLABackend):
    @staticmethod
    def get_name() -> str:
        return "HYLO_LATENT_CPU"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """One head per token that is key and value at once."""
        return replace(spec, num_kv_heads=1, head_size_v=0)

    @staticmethod
    def get_builder_cls() -> type[MLACommonMetadataBuilder]:
        return LatentCPUBuilder

    @staticmethod
    def get_impl_cls() -> type["LatentCPUImpl"]:
        return LatentCPUImpl


class LatentCPUImpl(CPUMLAImpl):
    def __init__(self, *args: Any, kv_heads: int, **kwargs: Any) -> None:
        """kv_heads: how many of the heads' up-projections differ."""
        super().__init__(*args, **kwargs)
        self.kv_heads = kv_heads

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        up_weight = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        self.up_weight = up_weight[:: self.num_heads // self.kv_heads].flatten(0, 1)

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Prompts, or chunks of them: q (tokens, H, nope + rope) of all requests one after the other."""
        prefill = attn_metadata.prefill
        assert prefill is not None
        starts = prefill.query_start_loc.tolist()
        context = prefill.chunked_context
        for i, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            past = 0 if context is None else context.context_lens_list[i]
            if past:  # this chunk is in the cache already
                cached = _gather(kv_c_and_k_pe_cache, prefill.block_table[i], past + end - start)
                latent, key_rope = cached.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            else:
                latent, key_rope = kv_c_normed[start:end], k_pe[start:end].flatten(1)
            q_BHTD = q[start:end].transpose(0, 1)[None]
            o_BHTV = expanded_latent_attention(
                q_BHTD, latent[None], key_rope[None], self.up_weight, None, self.kv_heads, self.scale
            )
            output[start:end] = o_BHTV[0].transpose(0, 1).flatten(1)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        """One token of each request, its queries carried into the latent: q (B,H,rank) and (B,H,rope)."""
        decode = attn_metadata.decode
        assert decode is not None
        q_BHW = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        contexts = [
            read_latents(q_HW, kv_c_and_k_pe_cache, block_table, length, self.kv_lora_rank, self.scale)
            for q_HW, block_table, length in zip(q_BHW, decode.block_table, decode.seq_lens.tolist(), strict=True)
        ]
        return torch.stack(contexts), None


def read_latents(q_HW: Tensor, cache_NSW: Tensor, blocks: Tensor, length: int, rank: int, scale: float) -> Tensor:
    """softmax(scale q K^T) C of one token over `length` cached ones, C the first `rank` columns of K: (H,rank).

    cache: blocks of S tokens, of which `blocks` (int) lists this request's in order. All heads see the same keys, so
    that they are the queries of one head for torch's kernel, and what threads share out are parts of the keys.
    """
    threads, contexts, sums = torch.get_num_threads(), [], []
    for piece in _pieces(cache_NSW, blocks[: -(-length // cache_NSW.shape[1])], length):
        parts = threads * max(1, round(len(piece) / (threads * PART)))
        shared = len(piece) // parts * parts
        for keys_PSW in (piece[:shared].unflatten(0, (parts, -1)), piece[None, shared:]):
            if keys_PSW.shape[1]:
                q_1PHW = q_HW.expand(1, len(keys_PSW), -1, -1)
                context, log_sum = _flash(q_1PHW, keys_PSW[None], keys_PSW[None], scale=scale)
                contexts.append(context[0])
                sums.append(log_sum[0])
    shares_PH1 = torch.cat(sums).softmax(0)[..., None]
    return (torch.cat(contexts) * shares_PH1).sum(0)[:, :rank].to(q_HW.dtype)


def _pieces(cache_NSW: Tensor, blocks: Tensor, length: int) -> list[Tensor]:
    """The first `length` tokens, (tokens,W) each: read where they lie if they lie in few places, or else gathered."""
    size, ids = cache_NSW.shape[1], blocks.tolist()
    breaks = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1 or not cache_NSW.is_contiguous()]
    if length < (len(breaks) + 1) * PART // 8:
        return [_gather(cache_NSW, blocks, length)]
    bounds = [0, *breaks, len(ids)]
    runs = zip(bounds[:-1], bounds[1:], strict=True)
    pieces = [cache_NSW[ids[start] : ids[end - 1] + 1].flatten(0, 1) for start, end in runs]
    pieces[-1] = pieces[-1][: length - bounds[-2] * size]
    return pieces


def naive_read_latents(q_HW: Tensor, cache_NSW: Tensor, blocks: Tensor, length: int, rank: int, scale: float) -> Tensor:
    """The same over one tensor of all cached tokens."""
    K = torch.cat([cache_NSW[block] for block in blocks.tolist()])[:length]
    return torch.softmax(scale * q_HW @ K.T, dim=-1) @ K[:, :rank]


def _gather(cache_NSW: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A request's first `length` tokens, (length,W)."""
    size = cache_NSW.shape[1]
    if length <= size:
        return cache_NSW[int(blocks[0]), :length]
    return cache_NSW[blocks[: -(-length // size)].long()].flatten(0, 1)[:length]
