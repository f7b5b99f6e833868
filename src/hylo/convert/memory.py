"""Gives freed memory back, which glibc keeps otherwise: conversion's peak would grow with the number of layers."""

import ctypes
import sys


def release_freed() -> None:
    """Hands free pages of the heap to the operating system where that is Linux with glibc; elsewhere nothing."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
