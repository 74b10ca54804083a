"""Forms of a value that several stages must compute bit for bit alike, and the product that they share."""

import triton
import triton.language as tl
from packaging.version import Version

REACHED = tl.constexpr(1e-6)  # a share this close below top_p counts as reached
NEVER = tl.constexpr(1e-30)
REORDERS = tl.constexpr(Version(triton.__version__) < Version("3.9"))  # from then on deprecated


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
    """``exp(x)``; ``PRECISE`` to a unit in the last place, as float32 output needs (a GPU's own exp2: four)."""
    if PRECISE:
        b_y = tl.minimum(tl.maximum(b_x, -87.0), 88.0)
        b_n = tl.floor(b_y * 1.4426950408889634 + 0.5)  # exp(x) = 2^n exp(r), |r| <= ln(2) / 2
        b_r = b_y - b_n * 0.693359375  # the product is exact: 0.693359375 has ten bits
        b_r = b_r + b_n * 2.12194440e-4
        b_p = ((0.00019875691500 * b_r + 0.0013981999507) * b_r + 0.0083334519073) * b_r + 0.041665795894
        b_p = ((b_p * b_r + 0.16666665459) * b_r + 0.50000001201) * b_r * b_r + b_r + 1.0
        b_w = b_p * ((b_n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        b_w = tl.where(b_x < -87.0, 0.0, b_w)
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


@triton.jit
def pivots_above(b_x, low, shift):
    """Which pivots ``low + (j << shift)``, j from 0 to 7, are above each number from ``low`` on: bits 4 j. All uint32.

    Eight of these words can be added up. Numbers below ``low`` have no bits.
    """
    b_part = tl.minimum((b_x - low) >> shift, 7)  # numbers below wrap around
    return tl.full(b_x.shape, 0x11111110, tl.uint32) << (b_part * 4)


@triton.jit
def in_rows(b, ROWS: tl.constexpr):
    """Numbers as ``[ROWS, n / ROWS]``, in whichever order costs nothing."""
    if REORDERS:
        b_rows = tl.reshape(b, (ROWS, b.numel // ROWS), can_reorder=True)
    else:
        b_rows = tl.reshape(b, (ROWS, b.numel // ROWS))
    return b_rows


@triton.jit
def in_a_row(b):
    """Numbers as ``[n]``, in whichever order costs nothing."""
    if REORDERS:
        b_row = tl.reshape(b, (b.numel,), can_reorder=True)
    else:
        b_row = tl.reshape(b, (b.numel,))
    return b_row


@triton.jit
def added_up(b_above, LANES: tl.constexpr):
    """Words of `pivots_above` as ``LANES`` sums of them, in any order; zeros where there are more than words."""
    EACH: tl.constexpr = b_above.numel // LANES
    if EACH > 0:
        b_sum = tl.sum(in_rows(b_above, LANES), 1)
    else:
        b_above = in_a_row(b_above)
        o = tl.arange(0, LANES // b_above.numel)
        b_sum = tl.where(o[None, :] == 0, b_above[:, None], tl.zeros_like(b_above)[:, None])
    return b_sum


@triton.jit
def numbers_in(b_above, PIVOTS: tl.constexpr):
    """``[PIVOTS]``: to how many of the words that were `added_up` each pivot belongs."""
    b_four = (b_above[:, None] >> (tl.arange(0, PIVOTS) * 4).to(b_above.dtype)[None, :]) & 15
    return tl.sum(b_four.to(tl.int32), 0)


@triton.jit
def numbers_below(b_above, EACH: tl.constexpr, PIVOTS: tl.constexpr):
    """``[PIVOTS]``: to how many words of `pivots_above` each pivot belongs; ``EACH`` of them in a thread, at most 8."""
    return numbers_in(added_up(b_above, b_above.numel // EACH), PIVOTS)


@triton.jit
def dot_few(b_few, b_many, b_acc):
    """``b_few @ b_many + b_acc``; tensor cores take 16 rows or more, but 8 columns: few rows become columns."""
    if b_few.shape[0] < 16 and b_few.dtype != tl.float32:
        b_out = tl.trans(tl.dot(tl.trans(b_many), tl.trans(b_few), tl.trans(b_acc)))
    else:
        b_out = tl.dot(b_few, b_many, b_acc, input_precision="ieee")
    return b_out


@triton.jit
def power_above(number):
    """The power of two above each float64 >= 0, 1 for 0."""
    exponent = (number.to(tl.int64, bitcast=True) >> 52) + 1
    return tl.where(number > 0, (exponent << 52).to(tl.float64, bitcast=True), 1.0)


@triton.jit
def even(b_x):
    """float64 below 2**51, rounded to whole numbers, to even."""
    return (b_x + 6755399441055744.0) - 6755399441055744.0
