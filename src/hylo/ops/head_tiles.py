"""What losses taken from hidden states share: a tile of tokens by the whole vocabulary at a time, in bounded buffers.

The logits of N tokens are h W^T / temperature (N, V). They are made tile by tile, turned into the gradient in place and
multiplied back, so that neither they nor their softmax is ever there as a whole.
"""

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from hylo.ops.kernels import runs_triton

TILE_BYTES = 2**29  # all of a tile's (tokens, V) buffers together
TILE_ROWS = 512  # tokens to a tile: every tile reads the heads anew, and adds to the head's gradient,
TILE_ELEMENTS = 2**20  # but of a small vocabulary as many more as stay in a CPU's cache
BLOCK_ELEMENTS = 2**19  # elementwise work goes through a tile by blocks of rows that do, this much to a thread


def check_choice(operation: str, name: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(f"{operation}: {name} is {got!r}, expected one of {', '.join(map(repr, known))}")


def check_temperature(operation: str, temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{operation}: temperature is {temperature}, expected a number above 0")


def check_tokens(operation: str, name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    """One number a token: a mask may be of any real type, booleans, 0 and 1, or weights."""
    if tensor is None:
        return
    if tensor.shape != hidden.shape[:1]:
        raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}, expected (N={len(hidden)})")
    if tensor.is_complex():
        raise ValueError(f"{operation}: {name} is {tensor.dtype}, expected a real type")
    if tensor.device != hidden.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {hidden.device} as the first argument")


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What matrix products run in: the hidden states' dtype, or autocast's inside it; float64 stays."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def core_dtype(product: torch.dtype) -> torch.dtype:
    """What softmax and sums run in."""
    return torch.float64 if product == torch.float64 else torch.float32


def row_kernels(hidden: Tensor) -> ModuleType | None:
    """hylo.ops.divergence_triton where its kernels are to be used: on a GPU with Triton, but for float64."""
    if not runs_triton(hidden.device) or product_dtype(hidden) == torch.float64:
        return None
    from hylo.ops import divergence_triton

    return divergence_triton


def token_weights(mask_N: Tensor | None, hidden_ND: Tensor, reduction: str, core: torch.dtype) -> Tensor:
    """What each token's loss is multiplied by, (N,); all zero for an empty mask."""
    weights_N = torch.ones(len(hidden_ND), device=hidden_ND.device) if mask_N is None else mask_N
    weights_N = weights_N.to(core)
    return weights_N / weights_N.sum().clamp_min(torch.finfo(core).tiny) if reduction == "mean" else weights_N


def tile_height(tokens: int, vocabulary: int, bytes_a_token: int) -> int:
    """Tokens to a tile, all tiles about as tall."""
    most = min(max(TILE_ROWS, TILE_ELEMENTS // vocabulary), TILE_BYTES // bytes_a_token)
    return math.ceil(tokens / math.ceil(tokens / max(1, most))) if tokens else 1


def block_height(tile: Tensor) -> int:
    if tile.device.type != "cpu":
        return 64
    threads = torch.get_num_threads()
    return min(len(tile), max(threads, min(threads, 16) * BLOCK_ELEMENTS // tile.shape[1]))


def slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Writes the rows' softmax to `out`, takes the rows' maximum off the logits and returns their log-sum-exp then."""
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.exp(logits, out=out)
    total = out.sum(-1, keepdim=True)
    out.div_(total)
    return total.log_()[:, 0]


def softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the rows of a tile in place; returns the rows' log-sum-exp and sum p log p."""
    lse, neg_entropy = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    height = block_height(logits)
    scratch = torch.empty_like(logits[:height])
    for rows in slices(len(logits), height):
        block = logits[rows]
        top, p = block.amax(-1), scratch[: len(block)]
        log_sum = softmax(block, p)
        lse[rows] = top + log_sum
        neg_entropy[rows] = torch.linalg.vecdot(p, block) - log_sum
        block.copy_(p)
    return lse, neg_entropy
