"""New side data into preallocated storage: nothing is allocated that grows with the keys before, nothing waits."""

from __future__ import annotations

from typing import Any

import torch

FEW = 16
"""Up to so many new keys take the append kernels; more take the masker's own operations."""


def place(storage: torch.Tensor, new: torch.Tensor, start: int | torch.Tensor) -> None:
    """``new [B, heads, n, ...]`` into rows ``start`` on of ``storage [B, heads, capacity, ...]``.

    Args:
        start: a number, or an int64 tensor of one element on the storage's device.
    """
    n = new.shape[2]
    if isinstance(start, int):
        storage[:, :, start : start + n] = new
    else:
        storage.index_copy_(2, start.view(1) + torch.arange(n, device=storage.device), new)


class Direct:
    """Launches kernels through Triton, as `decode.kernel.Launcher` does on its first call."""

    def address(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *args: Any, warps: int = 4, **constants: Any) -> None:
        kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=True)


def start_of(launch: Any, start: int | torch.Tensor) -> Any:
    """``start`` as an argument of an append kernel, which reads it there if it is a tensor (``POINT``)."""
    return launch.address(start) if isinstance(start, torch.Tensor) else start
