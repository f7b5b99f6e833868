"""Where conversion computes: on the GPU where there is one."""

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(record: Record, device: torch.device) -> Record:
    """A dataclass with every tensor among its fields on `device`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(record, **tensors)  # type: ignore[type-var]
