"""New side data into preallocated storage: nothing is allocated that grows with the keys before, nothing waits.

New keys are those of a ``span``: the numbers (start, end), or an int64 tensor of the two on the keys' device, where the
host does not know them.
"""

from __future__ import annotations

from typing import Any

import torch

from sah_transformers.kernels.built import built
from sah_transformers.kernels.tape import note

FEW = 16
"""Up to so many new keys take the append kernels; more take the masker's own operations."""

Span = tuple[int, int] | torch.Tensor


class Direct:
    """Launches kernels on the current device, one by one; a kind of launch that was there before without Triton's
    look-up, as `decode.kernel.Launcher` does. ``args[0]`` is a tensor."""

    def address(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        *args: Any,
        warps: int = 4,
        cap: int | None = None,
        **constants: Any,
    ) -> None:
        """``cap``: registers per thread at most, the same for every launch of a kernel."""
        device = args[0].device.index
        kind = (kernel.fn, device, warps, *map(kind_of, args), *constants.values())
        known = _compiled.get(kind)
        if known is not None:
            run, function, metadata, values = known
            note(known, grid, args)
            stream = torch._C._cuda_getCurrentRawStream(device)
            given = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            run(*grid, stream, function, metadata, None, None, None, *given, *values)
            return
        note(None, grid, args)
        known = built(kernel, grid, args, constants, warps, cap)
        if known is not None:
            _compiled[kind] = known


_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def kind_of(arg: Any) -> Any:
    """What of a kernel's argument Triton compiles for, at least."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16
    return (arg == 1, arg % 16 == 0, arg < 2**31) if isinstance(arg, int) else type(arg)


def many(span: Span) -> bool:
    """Whether the host knows of more new keys than the append kernels take."""
    return not isinstance(span, torch.Tensor) and span[1] - span[0] > FEW


def programs_of(launch: Any, span: Span) -> tuple[Any, int]:
    """``span`` as an argument of an append kernel (``POINT``: an address), and its programs per sequence."""
    return (launch.address(span), 1) if isinstance(span, torch.Tensor) else (span[0], span[1] - span[0])
