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
    how many reach it; ``0 < room <= candidates < 2**16``.

    Four numbers at once divide the range in five, their counts packed into one sum: what a step costs is its wait. It
    ends early where a cut fits exactly.
    """
    low = tl.min(tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(b_i).to(tl.int64)
    count = candidates
    while (low < high) & (count != room):
        step = (high - low + 5) // 5
        one = tl.minimum(low + step, high).to(tl.int32)
        two = tl.minimum(low + 2 * step, high).to(tl.int32)
        three = tl.minimum(low + 3 * step, high).to(tl.int32)
        four = tl.minimum(low + 4 * step, high).to(tl.int32)
        b_few = (b_i >= one).to(tl.int32) + ((b_i >= two).to(tl.int32) << 16)
        b_more = (b_i >= three).to(tl.int32) + ((b_i >= four).to(tl.int32) << 16)
        reached = tl.sum(b_few.to(tl.int64) + (b_more.to(tl.int64) << 32))
        first, second = reached & 0xFFFF, (reached >> 16) & 0xFFFF
        third, fourth = (reached >> 32) & 0xFFFF, (reached >> 48) & 0xFFFF
        top = high
        high = tl.where(first < room, one - 1, tl.where(second < room, two - 1, top))
        high = tl.where((second >= room) & (third < room), three - 1, high)
        high = tl.where((third >= room) & (fourth < room), four - 1, high)
        low = tl.where(first >= room, one, low)
        low = tl.where(second >= room, two, low)
        low = tl.where(third >= room, three, low)
        low = tl.where(fourth >= room, four, low)
        count = tl.where(first >= room, first.to(tl.int32), count)
        count = tl.where(second >= room, second.to(tl.int32), count)
        count = tl.where(third >= room, third.to(tl.int32), count)
        count = tl.where(fourth >= room, fourth.to(tl.int32), count)
    return low.to(tl.int32), count


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
