"""Where conversion computes: on the GPU where there is one."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(record: Record, device: torch.device) -> Record:
    """A dataclass with every tensor among its fields on `device`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(record, **tensors)
