"""Kernels that are launched while the one before still runs (programmatic dependent launch, from sm_90 on)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Let the next kernel of a chain begin, and wait until all before this one are done: first in every program."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
