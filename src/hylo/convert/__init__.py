"""Attention into mixers: reads a base checkpoint layer by layer and writes a hybrid initialised from it."""

from hylo.convert.base import BaseAttention, BaseCheckpoint, read_base
from hylo.convert.config import hylo_config, planned_config
from hylo.convert.convert import convert
from hylo.convert.initialisation import (
    Init,
    Initialisation,
    LinearInit,
    RopeKey,
    measure_ranks,
    print_fits,
    print_ranks,
    with_energy,
)

__all__ = [
    "BaseAttention",
    "BaseCheckpoint",
    "Init",
    "Initialisation",
    "LinearInit",
    "RopeKey",
    "convert",
    "hylo_config",
    "measure_ranks",
    "planned_config",
    "print_fits",
    "print_ranks",
    "read_base",
    "with_energy",
]
