"""A kernel's first launch, and what later ones of its kind need to go without Triton's look-up."""

from __future__ import annotations

from typing import Any


def built(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
    cap: int | None = None,
    fuse: int = True,
) -> tuple[Any, ...] | None:
    """Compile and launch.

    Args:
        cap: registers per thread at most.
        fuse: whether products and sums may be rounded once.

    Returns:
        (run, function, metadata, values of the constants), None under the interpreter. The same again is
        ``run(*grid, stream, function, metadata, None, None, None, *args, *values)``, with addresses for tensors.
    """
    limits = {} if cap is None else {"maxnreg": cap}
    compiled = kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=fuse, **limits)
    if not hasattr(compiled, "packed_metadata"):
        return None
    return compiled.run, compiled.function, compiled.packed_metadata, tuple(constants.values())
