"""Latent decode, attention's memory over a long prefill, and the short convolution, each beside what others run.

`benchmarks/ops.py --only latent` runs it. Decode: a token's attention over a cache of latents, without projections
that do not depend on the cache's length and without the cache's own appending. Peers: the expanded form of the same
function; transformers' DeepSeek-V3 attention, which caches latents too and expands them for all query heads; and, as a
bound, torch's attention over keys and values that are cached expanded, which needs several times the bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from hylo.ops import absorbed_latent_attention, expanded_latent_attention, short_conv
from hylo.ops.latent_attention import attend


class Geometry(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    nope: int
    rope: int
    value: int
    rank: int
    key_norm: bool = False  # 1/rms of every kv head's key is cached too

    @property
    def cached(self) -> int:
        """Values a token."""
        return self.rank + self.rope + self.kv_heads * self.key_norm


GEOMETRIES = [
    Geometry("Llama-3.2-1B", 32, 8, 32, 32, 64, 128),
    Geometry("Llama-3.2-3B", 24, 8, 64, 64, 128, 128),
    Geometry("Qwen3-1.7B", 16, 8, 64, 64, 128, 256, key_norm=True),
]
CACHED = (1024, 4096, 16384, 32768)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ["absorbed", "expanded", "DeepSeek-V3", "cached keys and values"]
FASTER = 3.0  # than the expanded form, at the longest cache
GROWTH = 1.25  # of time over that of the cache's bytes, from the second shortest cache measured to the longest


class FullCache:
    """What transformers' attention takes for a cache: these tensors, to which nothing is added."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return self.tensors


def decode_of(form: str, g: Geometry, tokens: int, batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The attention of one token a row over `tokens` cached ones."""
    torch.manual_seed(0)
    scale = (g.nope + g.rope) ** -0.5
    if form == "DeepSeek-V3":
        config = DeepseekV3Config(
            hidden_size=8,  # next to no time for the projections
            q_lora_rank=8,
            num_attention_heads=g.heads,
            num_key_value_heads=g.heads,
            kv_lora_rank=g.rank,
            qk_nope_head_dim=g.nope,
            qk_rope_head_dim=g.rope,
            v_head_dim=g.value,
            attn_implementation="sdpa",
        )
        layer = DeepseekV3Attention(config, 0).to(dtype)
        cache: Any = FullCache(*(torch.randn(batch, 1, tokens, width, dtype=dtype) for width in (g.rank, g.rope)))
        x, angles = torch.randn(batch, 1, 8, dtype=dtype), torch.ones(1, 1, g.rope, dtype=dtype)
        return lambda: layer(x, (angles, angles), None, cache)[0]
    q = torch.randn(batch, g.heads, 1, g.nope + g.rope, dtype=dtype)
    if form == "cached keys and values":
        k, v = (torch.randn(batch, g.kv_heads, tokens, width, dtype=dtype) for width in (g.nope + g.rope, g.value))
        return lambda: attend(q, k, v, None, scale)
    latent = torch.randn(batch, tokens, g.rank, dtype=dtype)
    values = torch.rand(batch, tokens, g.cached - g.rank, dtype=dtype)  # the rotated key and, beside it, 1/rms
    key_scale = values[..., g.rope :].transpose(1, 2) if g.key_norm else None
    up = torch.randn(g.kv_heads * (g.nope + g.value), g.rank, dtype=dtype) * g.rank**-0.5
    function = {"absorbed": absorbed_latent_attention, "expanded": expanded_latent_attention}[form]
    return lambda: function(q, latent, values[..., : g.rope], up, None, g.kv_heads, scale, key_scale_BKS=key_scale)


def append_of(g: Geometry, tokens: int, batch: int, dtype: torch.dtype) -> Callable[[], Any]:
    """What transformers' DynamicCache does for a token: it concatenates."""
    tensors = [torch.randn(batch, 1, tokens, width, dtype=dtype) for width in (g.rank, g.cached - g.rank)]
    return lambda: [torch.cat((t, t[:, :, :1]), dim=2) for t in tensors]


@torch.no_grad()
def decode_row(g: Geometry, tokens: int, batch: int, type_name: str, repeats: int = 5) -> dict[str, Any]:
    functions: dict[str, Callable[[], Any]] = {
        form: decode_of(form, g, tokens, batch, TYPES[type_name]) for form in FORMS
    }
    functions["append"] = append_of(g, tokens, batch, TYPES[type_name])
    size = batch * tokens * TYPES[type_name].itemsize
    return {
        "part": "decode",
        "geometry": g.name,
        "type": type_name,
        "batch": batch,
        "tokens": tokens,
        "seconds": measure.medians(measure.seconds(functions, repeats, warmup=2)),
        "cache_bytes": size * g.cached,
        "expanded_cache_bytes": size * g.kv_heads * (g.nope + g.rope + g.value),
    }


PREFILLS = [
    "hylo",
    "hylo, padded",
    "hylo, second half",
    "torch, T x T mask",
    "hylo, narrow values",
    "torch, narrow values",
]


def prefill_of(which: str, tokens: int, heads: int = 2) -> Callable[[], Tensor]:
    """Attention over `tokens` tokens in float32, two query heads to a kv head of width 64."""
    torch.manual_seed(0)
    narrow = which.endswith("narrow values")
    if which.startswith("hylo") and not narrow:
        past = tokens // 2 if which == "hylo, second half" else 0
        q, latent, rope = (
            torch.randn(1, heads, tokens - past, 64),
            torch.randn(1, tokens, 64),
            torch.randn(1, tokens, 32),
        )
        up, padding = torch.randn(heads // 2 * 96, 64) / 8, torch.arange(tokens)[None] >= 100
        padding_BS = padding if which == "hylo, padded" else None
        return lambda: expanded_latent_attention(q, latent, rope, up, None, heads // 2, 0.125, padding_BS=padding_BS)
    q, k = torch.randn(1, heads, tokens, 64), torch.randn(1, heads // 2, tokens, 64)
    v = torch.randn(1, heads // 2, tokens, 32 if narrow else 64)
    if which == "hylo, narrow values":
        return lambda: attend(q, k, v, None, 0.125)
    options: dict[str, Any] = {"scale": 0.125, "enable_gqa": True}
    if narrow:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)

    def masked() -> Tensor:
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        causal[:, :100] = False
        return F.scaled_dot_product_attention(q, k, v, causal, **options)

    return masked


def prefill_row(which: str, tokens: int, threads: int, heads: int = 2) -> dict[str, Any]:
    run = prefill_of(which, tokens, heads)
    seconds = measure.medians(measure.seconds({which: run}, 1, warmup=0))[which]
    del run
    memory = measure.peak_bytes(prefill_of, which, tokens, heads, threads=threads)
    return {"part": "prefill", "which": which, "tokens": tokens, "seconds": seconds, "bytes": memory}


def convolution_of(which: str, tokens: int, channels: int) -> Callable[[], Any]:
    """Forward and backward of a convolution over 4 tokens, in float32."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, channels, requires_grad=True)
    grad, conv = (
        torch.randn(1, tokens, channels),
        nn.Conv1d(channels, channels, 4, groups=channels, padding=3, bias=False),
    )

    def run() -> Any:
        if which == "hylo":
            y = short_conv(x, conv.weight)[0]
        else:  # as transformers' linear blocks call it, and back to (batch, tokens, channels)
            y = conv(x.transpose(1, 2))[..., :tokens].transpose(1, 2)
        return torch.autograd.grad(y, (x, conv.weight), grad)

    return run


def convolution_row(tokens: int, channels: int, threads: int, repeats: int = 5) -> dict[str, Any]:
    names = ["hylo", "conv1d"]
    functions = {name: convolution_of(name, tokens, channels) for name in names}
    seconds = measure.medians(measure.seconds(functions, repeats))
    del functions
    memory = {name: measure.peak_bytes(convolution_of, name, tokens, channels, threads=threads) for name in names}
    return {"part": "convolution", "tokens": tokens, "channels": channels, "seconds": seconds, "bytes": memory}


def rows(
    threads: int = 2,
    geometries: list[Geometry] = GEOMETRIES,
    cached: tuple[int, ...] = CACHED,
    batches: tuple[int, ...] = (1, 4),
    prefills: tuple[int, ...] = (16384, 65536),
    peers_up_to: int = 16384,
    convolutions: tuple[tuple[int, int], ...] = ((4096, 6144),),
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Everything; peers with a matrix of tokens by tokens only up to `peers_up_to` tokens."""
    result = []
    for g in geometries:
        for type_name in TYPES:
            for batch in batches:
                result += [decode_row(g, tokens, batch, type_name, repeats) for tokens in cached]
    for tokens in prefills:
        names = [which for which in PREFILLS if which.startswith("hylo") or tokens <= peers_up_to]
        result += [prefill_row(which, tokens, threads) for which in names]
    return result + [convolution_row(*sizes, threads, repeats) for sizes in convolutions]


def targets(results: list[dict[str, Any]]) -> list[str]:
    """One line each, beginning with reached or missed."""
    lines = []
    decodes = [row for row in results if row["part"] == "decode"]
    for case in dict.fromkeys((row["geometry"], row["type"], row["batch"]) for row in decodes):
        own = sorted((r for r in decodes if (r["geometry"], r["type"], r["batch"]) == case), key=lambda r: r["tokens"])
        long, short = own[-1], own[min(1, len(own) - 1)]
        name = f"latent decode, {case[0]}, {case[1]}, batch {case[2]}"
        faster = long["seconds"]["expanded"] / long["seconds"]["absorbed"]
        lines.append(
            _line(
                faster >= FASTER,
                f"{name}: {faster:.1f} times the expanded form's speed at {long['tokens']} (at least {FASTER:g})",
            )
        )
        growth = long["seconds"]["absorbed"] / short["seconds"]["absorbed"] * short["cache_bytes"] / long["cache_bytes"]
        text = f"time grows {growth:.2f} times as much as the cache's bytes from {short['tokens']} to {long['tokens']}"
        lines.append(_line(growth <= GROWTH, f"{name}: {text} (at most {GROWTH})"))
    for row in results:
        if row["part"] == "prefill" and row["which"].startswith("hylo"):
            matrix = row["tokens"] ** 2
            text = f"prefill of {row['tokens']} tokens, {row['which']}: {row['bytes'] / 2**20:.0f} MiB"
            lines.append(_line(row["bytes"] < matrix, f"{text} (a T x T mask of one byte: {matrix / 2**20:.0f})"))
        if row["part"] == "convolution":
            for what in ("seconds", "bytes"):
                ratio = row[what]["hylo"] / row[what]["conv1d"]
                text = f"short convolution, {row['tokens']} x {row['channels']}: {ratio:.2f} of conv1d's {what}"
                lines.append(_line(ratio <= 1, f"{text} (at most 1)"))
    return lines


def _line(reached: bool, text: str) -> str:
    return f"{'reached' if reached else 'missed'}: {text}"


def report(console: Console, results: list[dict[str, Any]]) -> None:
    decodes = [row for row in results if row["part"] == "decode"]
    if decodes:
        table = []
        for row in decodes:
            seconds = row["seconds"]
            times = [f"{1e3 * seconds[form]:.2f}" for form in (*FORMS, "append")]
            sizes = [f"{row[name] / 2**20:.1f}" for name in ("cache_bytes", "expanded_cache_bytes")]
            ratio = f"{seconds['expanded'] / seconds['absorbed']:.1f}"
            names = [f"{row['geometry']}, {row['type']}", str(row["batch"]), str(row["tokens"])]
            table.append([*names, *times[:2], ratio, *times[2:], *sizes])
        columns = [
            "",
            "batch",
            "cached",
            "absorbed, ms",
            "expanded",
            "ratio",
            *FORMS[2:],
            "append",
            "latent, MiB",
            "KV, MiB",
        ]
        measure.print_table(console, "latent decode: a token's attention", columns, table)
    table = [
        [row["which"], str(row["tokens"]), f"{row['seconds']:.2f}", f"{row['bytes'] / 2**20:.0f}"]
        for row in results
        if row["part"] == "prefill"
    ]
    if table:
        measure.print_table(console, "prefill, two heads, float32", ["", "tokens", "s", "MiB over inputs"], table)
    table = [
        [
            name,
            f"{row['tokens']} x {row['channels']}",
            f"{1e3 * row['seconds'][name]:.0f}",
            f"{row['bytes'][name] / 2**20:.0f}",
        ]
        for row in results
        if row["part"] == "convolution"
        for name in row["seconds"]
    ]
    if table:
        measure.print_table(
            console, "short convolution, forward and backward", ["", "tokens x channels", "ms", "MiB"], table
        )
    for line in targets(results):
        console.print(line, highlight=False)
