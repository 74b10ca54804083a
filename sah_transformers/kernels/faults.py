"""What kind of failure a kernel met with."""

from __future__ import annotations

import traceback

import torch

FAULTS = ("illegal memory access", "misaligned address", "launch failure", "assert")
"""Errors of a running kernel: never taken for one that cannot be built."""


def cannot_be_built(error: Exception) -> bool:
    """Whether Triton failed to compile or load a kernel, as opposed to a fault of a running one or a lack of memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or any(fault in str(error) for fault in FAULTS):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__", "")).split(".")[0] == "triton" for frame, _ in frames)
