"""Block shapes of the prefill kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

FUSION = {"enable_fp_fusion": True}
"""Triton's default differs between its versions."""


@dataclass(frozen=True)
class Tiles:
    """Block shapes of the kernels for one dtype and head dimension.

    Attributes:
        attend, emit, bracket: rows, keys per tile, warps, stages (``bracket``: keys per sample).
        settle: rows, keys per tile, warps, pivots per pass.
    """

    attend: tuple[int, int, int, int]
    emit: tuple[int, int, int, int]
    bracket: tuple[int, int, int, int]
    settle: tuple[int, int, int, int]


def tiles_for(dtype: torch.dtype, dim: int) -> Tiles:
    """Block shapes, measured on an H100 for 16-bit numbers and ``dim`` 128, the larger head dimension padded."""
    if dtype == torch.float32:
        keys, sample = (32, 128) if dim <= 128 else (16, 64)
        return Tiles((32, keys, 4, 2), (32, 32, 4, 2), (32, sample, 4, 1), (16, 16, 4, 16))
    if dim <= 64:
        return Tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 256, 4, 1), (16, 64, 8, 16))
    if dim <= 128:
        return Tiles((64, 64, 4, 3), (64, 64, 4, 3), (64, 256, 4, 1), (16, 64, 8, 16))
    return Tiles((128, 64, 8, 2), (128, 64, 8, 2), (64, 256, 4, 1), (16, 64, 8, 16))


def padded(dim: int) -> int:
    """The width of a tile that holds ``dim`` columns."""
    return max(16, triton.next_power_of_2(dim))


def precision_of(tensor: torch.Tensor) -> str:
    """``input_precision`` of a product: float32 must be exact."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
