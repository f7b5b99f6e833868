"""Where conversion computes: on the GPU where there is one."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(record: Record, device: torch.device) -> Record:
    """A dataclass with every tensor in its fields, and in their tuples and dictionaries, on `device`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: _on(value, device) for name, value in values.items()})


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(item, device) for item in value)
    return {key: _on(item, device) for key, item in value.items()} if isinstance(value, dict) else value
