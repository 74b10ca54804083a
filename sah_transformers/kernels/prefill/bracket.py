"""Triton, stage 1 of a cut: a bracket around each row's k-th best score, from a sample of the keys."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.group import halfway, kv_head, load_queries, load_totals, ranking, weights
from sah_transformers.kernels.prefill.rows import (
    SMALLEST,
    granted,
    mask_rows,
    outside,
    products,
    row_limits,
    shown,
)


@triton.jit
def mixed(x):
    """A hash of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def sampled_keys(i_c, i_t, i_bh, begin, length, chunks, K, BS: tl.constexpr):
    """Every ``chunks``-th of ``chunks * BS`` jittered positions in ``[begin, begin + length)``, from ``i_c`` on."""
    o_s = tl.arange(0, BS) * chunks + i_c
    seed = (o_s + i_t * 40503).to(tl.uint32) + (i_bh * 69069).to(tl.uint32)
    b_jitter = (mixed(seed) >> 1).to(tl.int32) % length
    o_k = begin + ((o_s.to(tl.int64) * length + b_jitter) // (chunks * BS)).to(tl.int32)
    return tl.minimum(o_k, K - 1)


@triton.jit
def sampled_ranking(
    i_c, b_q, b_total, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t, i_bh, chunks, K, stride_k, scale,
    softcap, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ``ranking`` of sampled keys, ``[rows, BS]``, -inf where a row does not see them, and where it does.

    HIDDEN: rows may not see all that is sampled.
    """
    o_k = sampled_keys(i_c, i_t, i_bh, begin, length, chunks, K, BS)
    o_d = tl.arange(0, BD)
    p = p_k + o_k.to(tl.int64)[None, :] * stride_k + o_d[:, None]
    b_k = tl.load(p, mask=(o_d < D)[:, None], other=0.0)
    if HIDDEN and HEADS == 1 and PRECISION != "ieee":
        # Added to the product, whose layout the scores keep: selected by the mask they would take that of its load,
        # in which a row lies across all threads, at ten times the instructions.
        b_hidden = tl.where(shown(p_mask, o_k, b_stop, b_start, b_holes, HIDDEN), 0.0, float("-inf"))
        b_s = tl.dot(b_q, b_k, b_hidden, input_precision=PRECISION)
        return b_s, b_s > float("-inf")
    else:
        b_s = ranking(products(b_q, b_k, PRECISION), b_total, scale, softcap, HEADS, SOFTCAP)
        m_s = shown(p_mask, o_k, b_stop, b_start, b_holes, HIDDEN)
        if HIDDEN:
            b_s = tl.where(m_s, b_s, float("-inf"))
        return b_s, m_s


@triton.jit
def best_interval(
    b_q, b_total, b_center, b_spread, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t, i_bh, chunks, K,
    stride_k, scale, softcap, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ends of the rows' brackets, each the sum over ``chunks``."""
    b_lows, b_highs = b_center * 0.0, b_center * 0.0
    for i_c in range(chunks):
        b_s, m_s = sampled_ranking(
            i_c, b_q, b_total, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t, i_bh, chunks, K, stride_k,
            scale, softcap, D, BD, BS, HIDDEN, HEADS, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_size = b_center * 0.0 + BS
        b_min, b_max = tl.min(b_s, 1), tl.max(b_s, 1)
        if HIDDEN:
            b_size = tl.sum(m_s.to(tl.float32), 1)
            b_min = tl.min(tl.where(m_s, b_s, float("inf")), 1)
        b_aside = b_spread * tl.sqrt(b_size / BS)
        b_below = tl.ceil(b_center * (b_size / BS) + b_aside)  # this many should be at or above low
        b_above = tl.floor(b_center * (b_size / BS) - b_aside)  # at most this many should be above high
        b_la, b_lb, b_ha, b_hb = b_min, b_max, b_min, b_max
        for _ in range(STEPS):
            b_mid = halfway(b_la, b_lb, HEADS)
            b_reached = tl.sum((b_s >= b_mid[:, None]).to(tl.float32), 1) >= b_below
            b_la = tl.where(b_reached, b_mid, b_la)
            b_lb = tl.where(b_reached, b_lb, b_mid)
            b_mid = halfway(b_ha, b_hb, HEADS)
            b_few = tl.sum((b_s > b_mid[:, None]).to(tl.float32), 1) <= b_above
            b_hb = tl.where(b_few, b_mid, b_hb)
            b_ha = tl.where(b_few, b_ha, b_mid)
        b_lows += tl.where(b_below <= b_size, b_la, SMALLEST)
        b_highs += tl.where(b_above >= 0, b_hb, float("inf"))
    return b_lows, b_highs


@triton.jit
def bracket_kernel(
    q, k, lows, highs, mask, limits, i_first, rows, H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb,
    stride_qh,
    stride_qq, stride_kb, stride_kg, stride_kk, first, first_bits, last, last_bits, budget, budget_bits, chunks, most,
    deviations, totals, scale, softcap,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr,
    MASKED: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``lows <= k-th best score <= highs`` for nearly every row, from ``chunks`` samples of BS keys each."""
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    BQ: tl.constexpr = BM // HEADS
    o_r = i_t * BQ + tl.arange(0, BQ)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n, b_begin, b_end, b_stop, b_start = row_limits(
        limits, stride_l, i_b, o_q, m_r, Q, K, first, first_bits, last, last_bits, 5, MASKED, CAUSAL,
        FIRST_IS_SHARE, LAST_IS_SHARE,
    )  # fmt: skip
    b_c = outside(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    b_k = granted(b_n, budget, budget_bits, BUDGET_IS_SHARE)
    b_low = tl.full([BQ], SMALLEST, tl.float32)
    b_high = tl.full([BQ], float("inf"), tl.float32)
    if tl.max(b_c, 0) > most:  # else all candidates fit into the lists
        m_c = b_c > most
        begin = tl.max(tl.where(m_c, b_stop, 0), 0)
        end = tl.min(tl.where(m_c, b_start, 2147483647), 0)
        length = tl.maximum(end - begin, 1)
        b_q = load_queries(q, stride_qb, stride_qh, stride_qq, o_q, m_r, i_b, i_h, group, D, BD, HEADS)
        b_total = load_totals(totals, o_q, m_r, i_bh, group, Q, HEADS)
        p_k = k + i_b * stride_kb + kv_head(i_h, group, HEADS) * stride_kg
        total = chunks * BS
        b_p = tl.minimum(b_k.to(tl.float32) / tl.maximum(b_c, 1).to(tl.float32), 1.0)
        b_spread = deviations * tl.sqrt(b_p * (1.0 - b_p) / total) * BS + 1.0 / chunks
        b_skew = (deviations * deviations - 1.0) * (1.0 - 2.0 * b_p) * BS / (6.0 * total)  # of the binomial's tails
        b_center = b_p * BS + b_skew
        p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
        b_holes = b_end - b_begin > b_n
        if MASKED:
            hidden = tl.max((b_holes & m_c).to(tl.int32), 0)
            if (hidden != 0) | (end <= begin):
                b_lows, b_highs = best_interval(
                    b_q, b_total, b_center, b_spread, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                    i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, True, HEADS, SOFTCAP, PRECISION,
                )  # fmt: skip
            else:
                b_lows, b_highs = best_interval(
                    b_q, b_total, b_center, b_spread, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                    i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, False, HEADS, SOFTCAP, PRECISION,
                )  # fmt: skip
        else:
            b_lows, b_highs = best_interval(
                b_q, b_total, b_center, b_spread, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, False, HEADS, SOFTCAP, PRECISION,
            )  # fmt: skip
        b_low = tl.where(m_c, tl.maximum(b_lows / chunks, SMALLEST), SMALLEST)
        b_high = tl.where(m_c, b_highs / chunks, float("inf"))
        b_low = tl.where(b_c <= b_k, float("inf"), b_low)  # nothing to find: write nothing
        b_high = tl.where(b_c <= b_k, float("inf"), b_high)
    tl.store(lows + i_bh * rows + o_r, b_low, mask=m_r)
    tl.store(highs + i_bh * rows + o_r, b_high, mask=m_r)


@triton.jit
def mass_interval(
    b_q, b_total, b_peak, b_left, deviations, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t, i_bh, chunks,
    K, stride_k, scale, softcap, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``best_interval`` for a cut that leaves out the mass ``left`` per key."""
    b_lows, b_highs = b_left * 0.0, b_left * 0.0
    for i_c in range(chunks):
        b_s, m_s = sampled_ranking(
            i_c, b_q, b_total, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t, i_bh, chunks, K, stride_k,
            scale, softcap, D, BD, BS, HIDDEN, HEADS, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_min, b_max = tl.min(b_s, 1), tl.max(b_s, 1)
        b_w = weights(b_s, b_peak[:, None], scale, softcap, HEADS, SOFTCAP)
        b_out = b_left * BS  # what the sample should hold below the cut
        if HIDDEN:
            b_out = b_left * tl.sum(m_s.to(tl.float32), 1)
            b_min = tl.min(tl.where(m_s, b_s, float("inf")), 1)
            b_w = tl.where(m_s, b_w, 0.0)
        b_la, b_lb, b_ha, b_hb = b_min, b_max, b_min, b_max
        for _ in range(STEPS):
            b_mid = halfway(b_la, b_lb, HEADS)
            b_one = weights(b_mid, b_peak, scale, softcap, HEADS, SOFTCAP)
            b_below = tl.sum(tl.where(b_w < b_one[:, None], b_w, 0.0), 1)
            b_less = b_below + deviations * tl.sqrt(b_one * (b_below + b_one) / chunks) <= b_out
            b_la = tl.where(b_less, b_mid, b_la)
            b_lb = tl.where(b_less, b_lb, b_mid)
            b_mid = halfway(b_ha, b_hb, HEADS)
            b_one = weights(b_mid, b_peak, scale, softcap, HEADS, SOFTCAP)
            b_below = tl.sum(tl.where(b_w < b_one[:, None], b_w, 0.0), 1)
            b_more = b_below - deviations * tl.sqrt(b_one * (b_below + b_one) / chunks) >= b_out
            b_hb = tl.where(b_more, b_mid, b_hb)
            b_ha = tl.where(b_more, b_ha, b_mid)
        b_lows += tl.where(b_la > b_min, b_la, SMALLEST)
        b_highs += tl.where(b_hb < b_max, b_hb, float("inf"))
    return b_lows, b_highs


@triton.jit
def bracket_mass_kernel(
    q, k, stats, lows, highs, mask, limits, i_first, rows, H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb,
    stride_qh, stride_qq, stride_kb, stride_kg, stride_kk, first, first_bits, last, last_bits, chunks, most,
    deviations, scale, softcap, totals,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``lows <= cut <= highs`` for nearly every row, from ``chunks`` samples of BS keys each.

    The mass below the cut is estimated, not the one above it: it consists of many small terms. Its variance is at most
    its largest term times itself.
    """
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    BQ: tl.constexpr = BM // HEADS
    o_r = i_t * BQ + tl.arange(0, BQ)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n, b_begin, b_end, b_stop, b_start = row_limits(
        limits, stride_l, i_b, o_q, m_r, Q, K, first, first_bits, last, last_bits, 5, MASKED, CAUSAL,
        FIRST_IS_SHARE, LAST_IS_SHARE,
    )  # fmt: skip
    b_c = outside(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    b_low = tl.full([BQ], SMALLEST, tl.float32)
    b_high = tl.full([BQ], float("inf"), tl.float32)
    p_stats = stats + i_bh * Q + o_q
    size = tl.num_programs(1).to(tl.int64) * Q
    m_c = (b_c > most) & (tl.load(p_stats + size, mask=m_r, other=0.0) > 0)
    if tl.max(m_c.to(tl.int32), 0) > 0:  # else all candidates fit into the lists
        begin = tl.max(tl.where(m_c, b_stop, 0), 0)
        end = tl.min(tl.where(m_c, b_start, 2147483647), 0)
        length = tl.maximum(end - begin, 1)
        b_q = load_queries(q, stride_qb, stride_qh, stride_qq, o_q, m_r, i_b, i_h, group, D, BD, HEADS)
        b_total = load_totals(totals, o_q, m_r, i_bh, group, Q, HEADS)
        p_k = k + i_b * stride_kb + kv_head(i_h, group, HEADS) * stride_kg
        p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
        b_holes = b_end - b_begin > b_n
        b_peak = tl.load(p_stats, mask=m_r, other=0.0)
        b_left = tl.load(p_stats + size * 2, mask=m_r, other=0.0) / tl.maximum(b_c, 1).to(tl.float32)
        if MASKED:
            hidden = tl.max((b_holes & m_c).to(tl.int32), 0)
            if (hidden != 0) | (end <= begin):
                b_lows, b_highs = mass_interval(
                    b_q, b_total, b_peak, b_left, deviations, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                    i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, True, HEADS, SOFTCAP, PRECISION,
                )  # fmt: skip
            else:
                b_lows, b_highs = mass_interval(
                    b_q, b_total, b_peak, b_left, deviations, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                    i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, False, HEADS, SOFTCAP, PRECISION,
                )  # fmt: skip
        else:
            b_lows, b_highs = mass_interval(
                b_q, b_total, b_peak, b_left, deviations, p_k, p_mask, b_stop, b_start, b_holes, begin, length, i_t,
                i_bh, chunks, K, stride_kk, scale, softcap, D, BD, BS, STEPS, False, HEADS, SOFTCAP, PRECISION,
            )  # fmt: skip
        b_low = tl.where(m_c, tl.maximum(b_lows / chunks, SMALLEST), SMALLEST)
        b_high = tl.where(m_c, b_highs / chunks, float("inf"))
    m_none = tl.load(p_stats + size, mask=m_r, other=0.0) <= 0  # nothing to find: write nothing
    b_low = tl.where(m_none, float("inf"), b_low)
    tl.store(lows + i_bh * rows + o_r, b_low, mask=m_r)
    tl.store(highs + i_bh * rows + o_r, b_high, mask=m_r)
