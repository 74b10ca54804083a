"""New side data into preallocated storage: nothing is allocated that grows with the keys before, nothing waits.

New keys are those of a ``span``: the numbers (start, end), or an int64 tensor of the two on the keys' device, where the
host does not know them.
"""

from __future__ import annotations

from typing import Any

import torch

FEW = 16
"""Up to so many new keys take the append kernels; more take the masker's own operations."""

Span = tuple[int, int] | torch.Tensor


class Direct:
    """Launches kernels through Triton, as `decode.kernel.Launcher` does on its first call."""

    def address(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *args: Any, warps: int = 4, **constants: Any) -> None:
        kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=True)


def many(span: Span) -> bool:
    """Whether the host knows of more new keys than the append kernels take."""
    return not isinstance(span, torch.Tensor) and span[1] - span[0] > FEW


def programs_of(launch: Any, span: Span) -> tuple[Any, int]:
    """``span`` as an argument of an append kernel (``POINT``: an address), and its programs per sequence."""
    return (launch.address(span), 1) if isinstance(span, torch.Tensor) else (span[0], span[1] - span[0])
