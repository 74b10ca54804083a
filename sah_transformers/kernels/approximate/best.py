"""The exact cut of a row that lies in registers."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.values import added_up, in_a_row, numbers_in, pivots_above, sortable

NO_CANDIDATE = tl.constexpr(-0x80000000)


@triton.jit
def rankable(b_v, m_v):
    """Values as int32 in the same order, NaN as -inf; ``NO_CANDIDATE`` where ``m_v`` is false."""
    return tl.where(m_v, sortable(tl.maximum(b_v, float("-inf"))), NO_CANDIDATE)


@triton.jit
def outer(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def ends_of(b_i):
    """(smallest, largest) candidate of a row."""
    return tl.reduce((tl.ravel(tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF)), tl.ravel(b_i)), 0, outer)


@triton.jit
def cut_of(b_i, b_rest, room, candidates):
    """(cut, count): the ``room``-th largest of ``candidates`` numbers ``b_i``, or a number between it and the next, and
    how many reach it; ``0 < room <= candidates``; the numbers are a multiple of 8.

    ``b_rest``, unless None, are more numbers behind them, half as many at most.

    A round finds three bits: its seven pivots are counted together. It ends early where a cut fits exactly.
    """
    low, high = ends_of(b_i)
    if b_rest is not None:
        low_rest, high_rest = ends_of(b_rest)
        low, high = tl.minimum(low, low_rest), tl.maximum(high, high_rest)
    low, width = low.to(tl.uint32, bitcast=True), (high - low).to(tl.uint32, bitcast=True)
    bits = (width.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # width < 2**bits
    shift = tl.where(width > 0, tl.maximum(bits - 3, 0), -1)
    b_x = b_i.to(tl.uint32, bitcast=True)
    o = tl.arange(0, 8)
    LANES: tl.constexpr = b_i.numel // 8
    count = candidates
    while (shift >= 0) & (count != room):
        b_above = added_up(pivots_above(b_x, low, shift.to(tl.uint32)), LANES)
        if b_rest is not None:
            b_more = added_up(pivots_above(b_rest.to(tl.uint32, bitcast=True), low, shift.to(tl.uint32)), LANES)
            b_above += in_a_row(b_more)
        b_below = numbers_in(b_above, 8)  # ascending
        last = tl.max(tl.where(b_below <= count - room, b_below * 8 + o, 0))
        low += (last & 7).to(tl.uint32) << shift.to(tl.uint32)
        count -= last >> 3
        shift = tl.where(shift > 0, tl.maximum(shift - 3, 0), -1)
    return low.to(tl.int32, bitcast=True), count


@triton.jit
def best_from(b_i, b_rest, room, candidates):
    """(cut, last position of a tie) of the ``room`` largest of a row's candidates, the lower position first among
    equals: see ``reaches``. The row as for ``cut_of``."""
    length = b_i.numel if b_rest is None else b_i.numel + b_rest.numel
    cut, tie = tl.where(room > 0, NO_CANDIDATE + 1, 0x7FFFFFF0), length + 0 * room
    if (room > 0) & (room < candidates):
        cut, count = cut_of(b_i, b_rest, room, candidates)
        if count > room:
            b_same = (b_i == cut).to(tl.int32)
            same = tl.sum(b_same)
            spare = room - count + same
            if b_rest is not None:
                b_same_rest = (b_rest == cut).to(tl.int32)
                spare += tl.sum(b_same_rest)
            tie = tl.max(tl.where(tl.cumsum(b_same, 0) <= spare, b_same * tl.arange(0, b_i.numel), 0))
            if b_rest is not None:
                b_at = b_same_rest * (b_i.numel + tl.arange(0, b_rest.numel))
                tie = tl.maximum(tie, tl.max(tl.where(tl.cumsum(b_same_rest, 0) + same <= spare, b_at, 0)))
    return cut, tie


@triton.jit
def reaches(b_i, o, cut, tie):
    """Which numbers ``b_i``, at the positions ``o``, are among those that ``best_from`` says."""
    return b_i >= tl.where(o > tie, cut + 1, cut)


@triton.jit
def best_of(b_i, room, candidates):
    """Which of a row's ``candidates`` are its ``room`` largest, the lower position first among equals."""
    cut, tie = best_from(b_i, None, room, candidates)
    return reaches(b_i, tl.arange(0, b_i.numel), cut, tie)
