"""The exact cut of a row that lies in registers."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.values import sortable

NO_CANDIDATE = tl.constexpr(-0x80000000)


@triton.jit
def rankable(b_v, m_v):
    """Values as int32 in the same order, NaN as -inf; ``NO_CANDIDATE`` where ``m_v`` is false."""
    return tl.where(m_v, sortable(tl.where(b_v == b_v, b_v, float("-inf"))), NO_CANDIDATE)


@triton.jit
def cut_of(b_i, room, candidates):
    """(cut, count): the ``room``-th largest of ``candidates`` numbers ``b_i``, or a number between it and the next, and
    how many reach it; ``0 < room <= candidates``. Bisection over the integers; it ends early where a cut fits exactly.
    """
    low = tl.min(tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF))
    high = tl.max(b_i)
    count = candidates
    while (low < high) & (count != room):
        middle = low + ((high.to(tl.int64) - low.to(tl.int64) + 1) // 2).to(tl.int32)
        reach = tl.sum((b_i >= middle).to(tl.int32))
        count = tl.where(reach >= room, reach, count)
        low = tl.where(reach >= room, middle, low)
        high = tl.where(reach >= room, high, middle - 1)
    return low, count


@triton.jit
def best_of(b_i, room, candidates):
    """Which of a row's ``candidates`` are its ``room`` largest, the lower position first among equals."""
    b_taken = b_i > NO_CANDIDATE
    if room <= 0:
        b_taken = b_taken & (b_i == NO_CANDIDATE)
    elif room < candidates:
        cut, count = cut_of(b_i, room, candidates)
        b_taken = b_i >= cut
        if count > room:
            b_same = b_i == cut
            spare = room - count + tl.sum(b_same.to(tl.int32))
            b_taken = (b_i > cut) | (b_same & (tl.cumsum(b_same.to(tl.int32), 0) <= spare))
    return b_taken
