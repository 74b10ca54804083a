"""Block shapes of the prefill kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

FUSION = {"enable_fp_fusion": True}
"""Triton's default differs between its versions."""


@dataclass(frozen=True)
class Tiles:
    """Block shapes of the kernels for one dtype and head dimension.

    Attributes:
        attend, emit, bracket: rows, keys per tile, warps, stages (``bracket``: keys per sample).
        masked_bracket: with a mask, of which a tile lies in shared memory, beside that of the keys.
        settle: rows, keys per tile, warps, pivots per pass.
    """

    attend: tuple[int, int, int, int]
    emit: tuple[int, int, int, int]
    bracket: tuple[int, int, int, int]
    masked_bracket: tuple[int, int, int, int]
    settle: tuple[int, int, int, int]


def tiles_for(dtype: torch.dtype, dim: int, shared: int) -> Tiles:
    """Block shapes, measured on an H100 for 16-bit numbers and ``dim`` 128.

    Args:
        dtype: of the tensors.
        dim: the larger head dimension, padded.
        shared: bytes of shared memory that a block may have; 99 KiB are enough for all.
    """
    if dtype == torch.float32:
        keys, sample = (32, 128) if dim <= 128 else (16, 64)
        bracket = (32, sample, 4, 1)
        return Tiles((32, keys, 4, 2), (32, 32, 4, 2), bracket, bracket, (16, 16, 4, 16))
    narrow, settle = (64, 256, 4, 1), (16, 64, 8, 16)
    if dim <= 64:
        return Tiles((64, 64, 4, 3), (64, 64, 4, 3), narrow, narrow, settle)
    if dim <= 128:
        wide = (128, 256, 8, 1)
        masked = wide if shared >= 160 * 1024 else narrow
        return Tiles((64, 64, 4, 3), (64, 64, 4, 3), wide, masked, settle)
    if shared < 164 * 1024:
        return Tiles((64, 32, 4, 2), (64, 64, 4, 2), (64, 128, 4, 1), (32, 128, 4, 1), settle)
    return Tiles((128, 64, 8, 2), (128, 64, 8, 2), narrow, narrow, settle)


@lru_cache
def shared_of(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on ``device``; the interpreter knows no limit."""
    if device.type != "cuda":
        return 2**31
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def padded(dim: int) -> int:
    """The width of a tile that holds ``dim`` columns."""
    return max(16, triton.next_power_of_2(dim))


def precision_of(tensor: torch.Tensor) -> str:
    """``input_precision`` of a product: float32 must be exact."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
