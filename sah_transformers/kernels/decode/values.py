"""Forms of a ranking value that several stages must compute bit for bit alike."""

import triton
import triton.language as tl

REACHED = tl.constexpr(1e-6)  # a share this close below top_p counts as reached
NEVER = tl.constexpr(1e-30)


@triton.jit
def order_of(b_v):
    """A monotone, roughly logarithmic form of non-negative masses: their bits as a number."""
    return b_v.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def line_of(b_v, scale, offset, LOGARITHMIC: tl.constexpr):
    """Place on the line of the bracket; ``scale == 0`` stands for the value itself."""
    b_y = order_of(tl.maximum(b_v, 0.0)) if LOGARITHMIC else b_v
    b_x = tl.fma(b_y, scale + tl.zeros_like(b_y), offset + tl.zeros_like(b_y))
    return tl.where(scale == 0, b_v, b_x)


@triton.jit
def weight_of(b_x, PRECISE: tl.constexpr):
    """``exp(x)`` for ``x <= 0``; ``PRECISE`` makes up for the rounding of ``x * log2(e)``: float32 output shows it."""
    if PRECISE:
        b_x = tl.maximum(b_x, -200.0)  # 0 in float32
        b_y = b_x * 1.4426950408889634
        b_rest = tl.fma(b_x, tl.full(b_x.shape, 1.4426950408889634, tl.float32), -b_y) + b_x * 1.9259629911e-8
        b_w = tl.exp2(b_y) * (1.0 + b_rest * 0.6931471805599453)
    else:
        b_w = tl.exp(b_x)
    return b_w


@triton.jit
def unit_of(high, peak, FIXED: tl.constexpr):
    """Fixed units per unit of mass, such that a mass at the top of the bracket has ``FIXED`` bits.

    A bracket more than 50 below the peak loses bits; its mass is below float32's resolution of the row's anyway.
    """
    return tl.exp(tl.minimum(peak - high, 50.0)) * (1 << FIXED)


@triton.jit
def fixed_mass(b_s, peak, unit):
    """Mass in fixed units as int64: sums that do not depend on their order."""
    return (tl.exp(b_s - peak) * unit + 0.5).to(tl.int64)


@triton.jit
def wanted_mass(free, band, top_p, TOTAL: tl.constexpr):
    """Mass that the selection must add (``free`` and ``band``: of candidates and of what is active already)."""
    target = tl.cast(top_p, tl.float32) - REACHED
    wanted = target * (free + band) - band if TOTAL else target * free
    return wanted


@triton.jit
def sortable(b_v):
    """Floats as int32 in the same order, -0 as +0."""
    b_i = tl.where(b_v == 0, 0.0, b_v).to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def unsortable(i):
    """The float of a ``sortable`` integer."""
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
