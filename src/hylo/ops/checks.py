"""What an operation says when its arguments do not fit together: which argument, what it got, what it expected."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hylo.ops.chunks import check_packed


def check_tensors(operation: str, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Checks tensors against shapes written as `q=(q, "B T Hk K")` and returns the size of each letter.

    The first argument with a letter decides its size; numbers stand for themselves, None is skipped. All tensors must
    be floating point and on the first one's device. Raises ValueError that names argument, got and expected in a line.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        dimensions, shape = letters.split(), tensor.shape
        fits = len(shape) == len(dimensions)
        if fits:
            for letter, size in zip(dimensions, shape, strict=True):
                fits = fits and size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
        if not fits:
            expected = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dimensions)
            raise ValueError(f"{operation}: {name} has shape {tuple(shape)}, expected ({expected})")
        if not tensor.is_floating_point():
            raise ValueError(f"{operation}: {name} is {tensor.dtype}, expected a floating-point type")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {device} as the first argument")
    return sizes


def check_multiple(operation: str, sizes: dict[str, int], many: str, few: str) -> None:
    """Heads that share: there must be a whole number of `many` to each of `few`."""
    if sizes[few] == 0 or sizes[many] % sizes[few]:
        raise ValueError(f"{operation}: {many}={sizes[many]}, expected a multiple of {few}={sizes[few]}")


def check_sequences(operation: str, tokens: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """How many sequences `tokens` (B,T,...) holds: rows, or documents packed in one; as many states, if there are any.

    Raises ValueError for bounds that do not fit the tokens, or another number of states.
    """
    if cu_seqlens is not None:
        check_packed(tokens, cu_seqlens)
    count = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and len(state) != count:
        of = "rows" if cu_seqlens is None else "documents in cu_seqlens"
        raise ValueError(f"{operation}: initial_state holds {len(state)} states, expected {count}, the number of {of}")
    return count


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Where an operation chooses its types itself; entering autocast for nothing would cost a decoded token."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
