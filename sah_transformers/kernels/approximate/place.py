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
    """Launches kernels one by one; a variant goes through Triton's look-up, dearer than all else, only once."""

    def address(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *args: Any, warps: int = 4, **constants: Any) -> None:
        device, values = args[0].device, tuple(constants.values())
        key = (kernel, device, warps, values, *map(_form, args))
        known = _compiled.get(key)
        if known is None:
            compiled = kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=True)
            if hasattr(compiled, "packed_metadata"):  # not under the interpreter
                _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = known
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        plain = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        run(*grid, stream, function, metadata, None, None, None, *plain, *values)


_compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


def _form(arg: Any) -> Any:
    """What of an argument Triton compiles another variant for."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return (arg == 1, arg % 16 == 0, arg >= 2**31) if isinstance(arg, int) else None


def start_of(launch: Any, start: int | torch.Tensor) -> Any:
    """``start`` as an argument of an append kernel, which reads it there if it is a tensor (``POINT``)."""
    return launch.address(start) if isinstance(start, torch.Tensor) else start
