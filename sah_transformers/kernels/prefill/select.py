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
def search(p_list, p_count, inside, wanted, BC: tl.constexpr):
    """(cut, need) of the ``wanted`` best of a row's lists, by counting at interpolated pivots.

    Pivots are integers in the order of the scores, so that the search ends; the scores themselves stay floats.
    """
    b_x, m_x = listed_scores(p_list, p_count, BC)
    low = ordered(tl.min(tl.where(m_x, b_x, float("inf")))).to(tl.int64)
    high = ordered(tl.max(b_x)).to(tl.int64) + 1
    at_low, at_high = inside, inside * 0  # at or above low: enough; at or above high: too few
    aside = 0.0
    step = 0
    while (high - low > 1) & (at_low != wanted):
        left = (at_low - at_high).to(tl.float32)
        share = ((at_low - wanted).to(tl.float32) + aside * tl.sqrt(left)) / left
        share = tl.where((step >= 8) & (step % 2 == 0), 0.5, share)  # whatever the values: the range is halved
        middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count = tl.sum((b_x >= restored(middle.to(tl.int32))).to(tl.float32)).to(tl.int32)
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, count, at_low)
        high = tl.where(enough, high, middle)
        at_high = tl.where(enough, at_high, count)
        aside = tl.where(enough, 0.7, -0.7)  # aim beyond the cut, so that both ends come close to it
        step += 1
    return restored(low.to(tl.int32)), tl.where(at_low == wanted, ALL, wanted - at_high)


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
