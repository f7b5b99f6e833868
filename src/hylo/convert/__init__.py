"""Attention into mixers: reads a base checkpoint layer by layer and writes a hybrid initialised from it."""

from hylo.convert.base import BaseAttention, BaseCheckpoint, read_base
from hylo.convert.convert import INITS, LINEAR_INITS, check_init, convert, hylo_config

__all__ = [
    "INITS",
    "LINEAR_INITS",
    "BaseAttention",
    "BaseCheckpoint",
    "check_init",
    "convert",
    "hylo_config",
    "read_base",
]
