"""Triton, stage 3 of a cut by mass: the exact cut of each row among the scores that were written out."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.group import weights
from sah_transformers.kernels.prefill.rows import (
    ALL,
    SMALLEST,
    logits,
    ordered,
    outside,
    restored,
    visible_keys,
)
from sah_transformers.kernels.prefill.select import listed_scores

FIXED = tl.constexpr(30)
"""Bits of a mass at the upper end of the bracket: sums of integers do not depend on their order."""

COUNT_BITS = tl.constexpr(16)
"""Beside each mass its key is counted; ``2**16`` keys of 30 bits fit into an int64."""


@triton.jit
def search_mass(
    p_list, p_count, high, peak, wanted, scale, softcap, BC: tl.constexpr, HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(known, cut): the highest score of a row's lists at or above which they hold the mass ``wanted``."""
    b_x, m_x = listed_scores(p_list, p_count, BC)
    top = tl.log2(high) if HEADS > 1 else logits(high, scale, softcap, SOFTCAP) - peak
    top = tl.minimum(top, 0.0)
    unit = tl.exp2(tl.ceil(tl.maximum(top, -90.0)) * -1.0 + FIXED)
    b_w = ((weights(b_x, peak, scale, softcap, HEADS, SOFTCAP) * unit + 0.5).to(tl.int64) << COUNT_BITS) + 1
    b_w = tl.where(m_x, b_w, 0)
    want = tl.ceil(tl.minimum(wanted * unit.to(tl.float64), 1.0e18)).to(tl.int64)
    below = ordered(tl.min(tl.where(m_x, b_x, float("inf")))).to(tl.int64)  # at or above it: enough
    above = ordered(tl.max(b_x)).to(tl.int64) + 1  # at or above it: too little
    at_below = tl.sum(b_w)
    at_above = at_below * 0
    known = (at_below >> COUNT_BITS) >= want
    aside = 0.0
    step = 0
    while known & (above - below > 1) & (((at_below - at_above) & 0xFFFF) > 1):
        left = ((at_below - at_above) & 0xFFFF).to(tl.float32)
        span = ((at_below >> COUNT_BITS) - (at_above >> COUNT_BITS)).to(tl.float32)
        share = ((at_below >> COUNT_BITS) - want).to(tl.float32) / span + aside / tl.sqrt(left)
        share = tl.where((step >= 8) & (step % 2 == 0), 0.5, share)  # whatever the values: the range is halved
        middle = below + ((above - below).to(tl.float32) * share).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, below + 1), above - 1)
        held = tl.sum(tl.where(b_x >= restored(middle.to(tl.int32)), b_w, 0))
        enough = (held >> COUNT_BITS) >= want
        below = tl.where(enough, middle, below)
        at_below = tl.where(enough, held, at_below)
        above = tl.where(enough, above, middle)
        at_above = tl.where(enough, at_above, held)
        aside = tl.where(enough, 0.7, -0.7)  # aim beyond the cut, so that both ends come close to it
        step += 1
    return known, tl.min(tl.where(b_x >= restored(below.to(tl.int32)), b_x, float("inf")))


@triton.jit
def select_mass_kernel(
    lows, highs, lists, list_counts, list_masses, stats, cuts, needs, waiting, queue, limits,
    i_first, rows, H, Q, K, stride_l, first, first_bits, last, last_bits, capacity, scale, softcap,
    BC: tl.constexpr, CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr,
    BRACKET: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program: the cut of one row from its lists; a row that they cannot decide joins the queue.

    It leaves its bracket to ``settle_kernel``: the low in ``cuts``, the bits of the high in ``needs``.
    """
    i_r = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_q = i_first + i_r
    n = visible_keys(i_q, Q, K, CAUSAL)
    if MASKED:
        n = tl.load(limits + i_bh // H * stride_l + i_q)
    candidates = outside(n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    p_stats = stats + i_bh * Q + i_q
    peak = tl.load(p_stats)
    goal = tl.load(p_stats + tl.num_programs(1).to(tl.int64) * Q)
    cut = tl.full([], float("inf"), tl.float32)  # nothing more is wanted
    need = n * 0 + ALL
    if (candidates > 0) & (goal > 0):
        i_row = i_bh * rows + i_r
        p_count = list_counts + i_row * 4
        p_list = lists + i_row * capacity * 4
        o_l = tl.arange(0, 4)
        b_count = tl.load(p_count + o_l)
        wanted = goal.to(tl.float64) - tl.sum(tl.load(list_masses + i_row * 4 + o_l).to(tl.float64), 0)
        low = tl.full([], SMALLEST, tl.float32)
        high = tl.full([], float("inf"), tl.float32)
        if BRACKET:
            low = tl.load(lows + i_row)
            high = tl.load(highs + i_row)
        cut = low
        known = (wanted > 0) & (low == high)  # all of the bracket are equal
        known = known & (tl.sum(tl.abs(b_count), 0) * weights(low, peak, scale, softcap, HEADS, SOFTCAP) >= wanted)
        if (wanted > 0) & (tl.min(b_count, 0) >= 0) & (tl.max(b_count, 0) > 0):
            if tl.max(b_count, 0) <= BC // 4:
                known, cut = search_mass(p_list, p_count, high, peak, wanted, scale, softcap, BC // 4, HEADS, SOFTCAP)
            elif tl.max(b_count, 0) <= BC // 2:
                known, cut = search_mass(p_list, p_count, high, peak, wanted, scale, softcap, BC // 2, HEADS, SOFTCAP)
            else:
                known, cut = search_mass(p_list, p_count, high, peak, wanted, scale, softcap, BC, HEADS, SOFTCAP)
        if known == 0:
            cut = low
            need = high.to(tl.int32, bitcast=True)
            place = tl.atomic_add(waiting + i_bh, 1, sem="relaxed")
            tl.store(queue + i_bh * Q + place, i_q)
    tl.store(cuts + i_bh * Q + i_q, cut)
    tl.store(needs + i_bh * Q + i_q, need)
