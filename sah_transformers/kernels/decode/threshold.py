"""The cut of each selection row: from the histogram, or, where the bracket failed, by an exact search."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, size_of
from sah_transformers.kernels.decode.values import NEVER, line_of, sortable, unit_of, unsortable, wanted_mass

LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def candidates_of(p_row, start, K, first_end, last_start, BLOCK: tl.constexpr):
    """(values, positions, which are candidates) of one block of a row."""
    o_k = start + tl.arange(0, BLOCK)
    b_v = tl.load(p_row + o_k, mask=o_k < K, other=float("-inf"))
    return b_v, o_k, (b_v > float("-inf")) & (o_k >= first_end) & (o_k < last_start)


@triton.jit
def exact_cut(
    p_row, K, first_end, last_start, peak, target, scale, offset, least, most,
    MASS: tl.constexpr, LOGARITHMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(value, last position of the ties at it) of a row's cut, whatever the data.

    The value is the largest ``t`` such that the candidates ``>= t`` number (or hold) at least ``target``; it is known
    to lie on ``[least, most)`` of the line. A 17-way search over the integer form of floats finds it, and the
    same search over positions the ties.
    """
    b_low, b_high = tl.full([BLOCK], LARGEST, tl.int32), tl.full([BLOCK], -LARGEST, tl.int32)
    for start in tl.range(0, K, BLOCK, num_stages=4):
        b_v, o_k, m = candidates_of(p_row, start, K, first_end, last_start, BLOCK)
        b_x = line_of(b_v, scale, offset, LOGARITHMIC)
        m = m & (b_x >= least) & (b_x < most)
        b_low = tl.minimum(b_low, tl.where(m, sortable(b_v), LARGEST))
        b_high = tl.maximum(b_high, tl.where(m, sortable(b_v), -LARGEST))
    low, high = tl.min(b_low).to(tl.int64), tl.max(b_high).to(tl.int64)
    o = tl.arange(0, 16) + 1
    while low < high:
        step = (high - low + 17) // 17
        pivot = tl.minimum(low + step * o, LARGEST).to(tl.int32)
        b_held = tl.zeros([BLOCK, 16], tl.float32 if MASS else tl.int32)
        for start in tl.range(0, K, BLOCK, num_stages=4):
            b_v, o_k, m = candidates_of(p_row, start, K, first_end, last_start, BLOCK)
            m_pivot = m[:, None] & (sortable(b_v)[:, None] >= pivot[None, :])
            if MASS:
                b_held += tl.where(m_pivot, tl.exp(b_v - peak)[:, None], 0.0)
            else:
                b_held += m_pivot.to(tl.int32)
        reached = (tl.sum(b_held, 0) >= target) & (low + step * o <= high)
        low += step * tl.sum(reached.to(tl.int32))
        high = tl.minimum(high, low + step - 1)
    cut = low.to(tl.int32)
    tie = K + 0
    if not MASS:
        b_more, b_same = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, K, BLOCK, num_stages=4):
            b_v, o_k, m = candidates_of(p_row, start, K, first_end, last_start, BLOCK)
            b_more += (m & (sortable(b_v) > cut)).to(tl.int32)
            b_same += (m & (sortable(b_v) == cut)).to(tl.int32)
        need = target - tl.sum(b_more)
        if need < tl.sum(b_same):
            tie, end = first_end + 0, last_start - 1
            while tie < end:  # the smallest position up to which `need` ties lie
                step = (end - tie + 17) // 17
                pivot = tie + step * o - 1
                b_held = tl.zeros([BLOCK, 16], tl.int32)
                for start in tl.range(0, K, BLOCK, num_stages=4):
                    b_v, o_k, m = candidates_of(p_row, start, K, first_end, last_start, BLOCK)
                    m = m & (sortable(b_v) == cut)
                    b_held += (m[:, None] & (o_k[:, None] <= pivot[None, :])).to(tl.int32)
                short = (tl.sum(b_held, 0) < need) & (pivot < end)
                tie += step * tl.sum(short.to(tl.int32))
                end = tl.minimum(end, tie + step - 1)
    return cut, tie


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "stride",
        "chunks",
        "top_p",
        "first",
        "first_share",
        "last",
        "last_share",
        "size",
        "share",
    ]
)
def threshold_kernel(
    ranking, limits, lines, histogram, peaks, aboves, masses, stats, cuts, bounds, needs, list_count,
    K, B, stride, chunks, top_p, first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr, TOTAL: tl.constexpr, BINS: tl.constexpr, FIXED: tl.constexpr, COUNT_BITS: tl.constexpr,
    CHUNKS: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One selection row (``KIND``: "best" of a head, best of a "group", "mass" of a head).

    Writes ``cuts [4, E]``: scale and offset of the line, low and top of the boundary on it; ``bounds [4, E]``: end of
    the first keys, start of the last keys, last position of ties (-1: the boundary's keys are listed and cut later),
    keys kept (about); ``needs [E]``: keys or mass to take from the list.
    """
    i_e = tl.program_id(0)
    E = B * G * Q if KIND == "group" else B * H * Q
    i_q, i_b = i_e % Q, i_e // (E // B)
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    # Everything is asked for before the first reduction, which would wait in between.
    o_c = tl.arange(0, CHUNKS)
    p_c = i_e.to(tl.int64) * chunks + o_c
    b_above = tl.load(aboves + p_c, mask=o_c < chunks, other=0)
    b_h = tl.load(histogram + i_e.to(tl.int64) * BINS + tl.arange(0, BINS))
    scale, offset = tl.load(lines + i_e), tl.load(lines + E + i_e)
    if KIND == "mass":
        free, band, high = tl.load(stats + E + i_e), tl.load(stats + 2 * E + i_e), tl.load(lines + 2 * E + i_e)
        b_mass = tl.load(masses + p_c, mask=o_c < chunks, other=0.0)
    if KIND == "best":
        peak = tl.max(tl.load(peaks + p_c, mask=o_c < chunks, other=float("-inf")))
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(stats + i_e, peak)
    else:
        peak = tl.load(stats + i_e)
    above = tl.sum(b_above)
    b_sum = tl.cumsum(b_h, 0, reverse=True)
    banded = size_of(n, first, first_share) + size_of(n, last, last_share)
    if KIND == "mass":
        goal = wanted_mass(free, band, top_p, TOTAL)
        none = (free <= 0) | (TOTAL & (goal <= 0) & (band > 0))
        every = False
        goal = tl.maximum(goal, NEVER)
        held = tl.sum(b_mass)
        unit = unit_of(high, peak, FIXED)
        want = tl.ceil(tl.minimum((goal - held) * unit, 4.0e18)).to(tl.int64)
        b_held = b_sum >> COUNT_BITS
        b_count = (b_sum & ((1 << COUNT_BITS) - 1)).to(tl.int32)
    else:
        goal = size_of(n, size, share)
        none = n - banded <= 0
        every = n - banded <= goal
        want = (goal - above).to(tl.int64)
        b_held, b_count = b_sum.to(tl.int64), b_sum
    o = tl.arange(0, BINS)
    i_bin = tl.sum((b_held >= want).to(tl.int32)) - 1
    at = o == i_bin
    beyond = o == i_bin + 1
    need = want - tl.sum(tl.where(beyond, b_held, 0))
    listed = tl.sum(tl.where(at, b_count, 0)) - tl.sum(tl.where(beyond, b_count, 0))
    whole = (need == tl.sum(tl.where(at, b_held, 0)) - tl.sum(tl.where(beyond, b_held, 0))) & (KIND != "mass")
    missed = (want <= 0) | (i_bin < 0) | ((listed > LIST) & (not whole))
    low = i_bin.to(tl.float32)
    top = tl.where(whole, low, low + 1)
    kept = above + tl.sum(tl.where(at, b_count, 0))
    tie = -1
    if none | every:
        scale, offset, tie = 0.0, 0.0, K + 0
        low = tl.where(none, float("inf"), float("-inf"))
        top = low
        kept = tl.where(none, 0, n)
    elif missed:
        p_row = ranking + i_e.to(tl.int64) * (stride * 16)
        least = tl.where(want <= 0, BINS * 1.0, tl.where(i_bin < 0, float("-inf"), low))
        most = tl.where(want <= 0, float("inf"), tl.where(i_bin < 0, 0.0, low + 1))
        cut, tie = exact_cut(
            p_row, K, first_end, last_start, peak, goal, scale, offset, least, most,
            KIND == "mass", KIND == "group", BLOCK,
        )  # fmt: skip
        scale, offset, low, top = 0.0, 0.0, unsortable(cut), unsortable(cut + 1)
        kept = n
    tl.store(cuts + i_e, scale)
    tl.store(cuts + E + i_e, offset)
    tl.store(cuts + 2 * E + i_e, low)
    tl.store(cuts + 3 * E + i_e, top)
    tl.store(bounds + i_e, first_end)
    tl.store(bounds + E + i_e, last_start)
    tl.store(bounds + 2 * E + i_e, tie)
    tl.store(bounds + 3 * E + i_e, tl.minimum(kept + banded, n))
    tl.store(needs + i_e, need)
    tl.store(list_count + i_e, 0)
