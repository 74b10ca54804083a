"""Triton, stage 3 of a cut: the exact cut of each row among the scores that were written out."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import (
    ALL,
    SMALLEST,
    granted,
    ordered,
    outside,
    restored,
    visible_keys,
)


@triton.jit
def listed_scores(p_list, p_count, BC: tl.constexpr):
    """(scores ``[BC // 4, 4, 4]``, which of them there are) of a row's four lists: groups of four, quarter, score."""
    o_g = tl.arange(0, BC // 4)[:, None, None]
    o_l = tl.arange(0, 4)[None, :, None]
    o_i = tl.arange(0, 4)[None, None, :]
    m_x = o_g * 4 + o_i < tl.load(p_count + o_l)
    return tl.load(p_list + o_g * 16 + o_l * 4 + o_i, mask=m_x, other=float("-inf")), m_x


@triton.jit
def offset_of(width, share):
    """An offset strictly inside of a range of ``width`` integers, about a ``share`` of it."""
    return tl.minimum(tl.maximum((width.to(tl.float32) * share).to(tl.uint32), 1), width - 1)


@triton.jit
def narrowed(b_x, low, offset, wanted, below, above, at_low, at_high):
    """(below, above, at_low, at_high): the offsets from ``low`` that have the cut between them, and how many scores are
    at or above each, once those at or above another ``offset`` are counted; offsets come in ascending order."""
    count = tl.sum((b_x >= restored((low + offset).to(tl.int32, bitcast=True))).to(tl.int32))
    enough = count >= wanted
    below, at_low = tl.where(enough, offset, below), tl.where(enough, count, at_low)
    above = tl.where(enough, above, tl.minimum(above, offset))
    return below, above, at_low, tl.where(enough, at_high, tl.maximum(at_high, count))


@triton.jit
def search(p_list, p_count, inside, wanted, BC: tl.constexpr):
    """(cut, need) of the ``wanted`` best of a row's lists, by counting at three pivots at a time.

    Pivots are integers in the order of the scores, so that the search ends; the scores themselves stay floats. They lie
    around where the count would be ``wanted`` were the scores between the ends spread evenly, as far apart as such a
    guess is wrong, so that the next ends are close to the cut on both sides.
    """
    b_x, m_x = listed_scores(p_list, p_count, BC)
    low = ordered(tl.min(tl.where(m_x, b_x, float("inf")))).to(tl.uint32, bitcast=True)
    width = ordered(tl.max(b_x)).to(tl.uint32, bitcast=True) - low + 1
    at_low, at_high = inside, inside * 0  # at or above low: enough; at or above low + width: too few
    step = 0
    while (width > 1) & (at_low != wanted):
        left = (at_low - at_high).to(tl.float32)
        share, apart = (at_low - wanted).to(tl.float32) / left, 0.35 * tl.rsqrt(left)
        if step >= 6:  # whatever the values: a quarter of the range is left
            share, apart = share * 0.0 + 0.5, apart * 0.0 + 0.25
        below, above = width * 0, width
        for i in tl.static_range(3):
            aim = tl.minimum(tl.maximum(share + apart * (i - 1), 0.0), 1.0)
            below, above, at_low, at_high = narrowed(
                b_x, low, offset_of(width, aim), wanted, below, above, at_low, at_high
            )
        low, width = low + below, above - below
        step += 1
    return restored(low.to(tl.int32, bitcast=True)), tl.where(at_low == wanted, ALL, wanted - at_high)


@triton.jit
def select_kernel(
    lows, highs, lists, list_counts, list_reached, cuts, needs, tied, waiting, queue, limits,
    i_first, rows, H, Q, K, stride_l, first, first_bits, last, last_bits, budget, budget_bits, capacity, tiles,
    BC: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr,
    LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr, BRACKET: tl.constexpr,
    MASKED: tl.constexpr,
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
    wanted = granted(n, budget, budget_bits, BUDGET_IS_SHARE)
    cut = tl.full([], float("-inf"), tl.float32)
    need = n * 0 + ALL
    if wanted < candidates:
        i_row = i_bh * rows + i_r
        p_count = list_counts + i_row * 4
        p_list = lists + i_row * capacity * 4
        o_l = tl.arange(0, 4)
        b_count = tl.load(p_count + o_l)
        inside = tl.sum(tl.abs(b_count), 0)
        wanted -= tl.sum(tl.load(list_reached + i_row * 4 + o_l), 0) - inside
        cut = tl.full([], SMALLEST, tl.float32)
        high = tl.full([], float("inf"), tl.float32)
        if BRACKET:
            cut = tl.load(lows + i_row)
            high = tl.load(highs + i_row)
        known = (wanted > 0) & (wanted <= inside)
        short = tl.min(b_count, 0) < 0
        if known & (short == 0):
            if tl.max(b_count, 0) <= BC // 4:
                cut, need = search(p_list, p_count, inside, wanted, BC // 4)
            elif tl.max(b_count, 0) <= BC // 2:
                cut, need = search(p_list, p_count, inside, wanted, BC // 2)
            else:
                cut, need = search(p_list, p_count, inside, wanted, BC)
        elif known & (cut == high):  # all of the bracket are equal
            need = wanted
        else:
            need = high.to(tl.int32, bitcast=True)
            place = tl.atomic_add(waiting + i_bh, 1, sem="relaxed")
            tl.store(queue + i_bh * Q + place, i_q)
        if known & (need != ALL):
            tl.store(tied + i_bh * tiles + i_q // TILE, 1)
    tl.store(cuts + i_bh * Q + i_q, cut)
    tl.store(needs + i_bh * Q + i_q, need)
