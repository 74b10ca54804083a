"""Triton, stage 4 of a cut: the rows whose bracket missed or whose lists were too short."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.group import kv_head, load_queries, load_totals, ranking, weights
from sah_transformers.kernels.prefill.rows import (
    ALL,
    granted,
    load_columns,
    mask_rows,
    ordered,
    outside,
    products,
    restored,
    row_limits,
    shown,
)


@triton.jit
def settle_kernel(
    q, k, stats, cuts, needs, tied, waiting, queue, mask, limits,
    H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    first, first_bits, last, last_bits, budget, budget_bits, tiles,
    scale, softcap, totals,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr,
    MASKED: tl.constexpr, MASS: tl.constexpr, HEADS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head's queue at a time, as there are; most queues have few, if any.

    Each pass counts (MASS: weighs) the candidates at or above PIVOTS pivots: first around the bracket that missed,
    then evenly
    between the two that enclose the cut, in the integers of the same order as the scores.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    length = tl.load(waiting + i_bh)
    BQ: tl.constexpr = BM // HEADS
    for i_p in range(tl.program_id(0) * BQ, length, tl.num_programs(0) * BQ):
        o_i = i_p + tl.arange(0, BQ)
        m_i = o_i < length
        i_b, i_h = i_bh // H, i_bh % H
        o_q = tl.load(queue + i_bh * Q + o_i, mask=m_i, other=0)
        b_q = load_queries(q, stride_qb, stride_qh, stride_qq, o_q, m_i, i_b, i_h, group, D, BD, HEADS)
        b_total = load_totals(totals, o_q, m_i, i_bh, group, Q, HEADS)
        p_k = k + i_b * stride_kb + kv_head(i_h, group, HEADS) * stride_kg
        b_n, b_begin, b_last, b_stop, b_start = row_limits(
            limits, stride_l, i_b, o_q, m_i, Q, K, first, first_bits, last, last_bits, 5, MASKED, CAUSAL,
            FIRST_IS_SHARE, LAST_IS_SHARE,
        )  # fmt: skip
        p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
        b_holes = b_last - b_begin > b_n
        if MASS:
            p_stats = stats + i_bh * Q + o_q
            b_peak = tl.load(p_stats, mask=m_i, other=0.0)
            b_wanted = tl.load(p_stats + tl.num_programs(1).to(tl.int64) * Q, mask=m_i, other=0.0)
        else:
            b_wanted = granted(b_n, budget, budget_bits, BUDGET_IS_SHARE)
        begin = tl.min(tl.where(m_i, b_stop, 2147483647), 0) // BN * BN
        end = tl.max(tl.where(m_i, b_start, 0), 0)
        o_n = tl.arange(0, BN)
        o_p = tl.arange(0, PIVOTS)[None, :]
        b_from = tl.load(cuts + i_bh * Q + o_q, mask=m_i, other=0.0)
        b_to = tl.load(needs + i_bh * Q + o_q, mask=m_i, other=0).to(tl.float32, bitcast=True)
        b_width = (b_to - b_from) * (3.0 / (PIVOTS - 1))  # inf where the bracket is open
        b_pivots = ordered(tl.minimum((b_from - (b_to - b_from))[:, None] + b_width[:, None] * o_p, 3.4e38))
        b_pivots = tl.where(b_width[:, None] < 1e37, b_pivots, ordered(b_from)[:, None] + o_p * 0)
        b_low = tl.full([BQ], -2147483648, tl.int64)  # at or above low: enough candidates
        b_high = tl.full([BQ], 2147483647, tl.int64)  # at or above high: too few
        NUMBER: tl.constexpr = tl.float32 if MASS else tl.int32
        b_at_low = tl.full([BQ], float("inf"), tl.float32)
        if not MASS:
            b_at_low = outside(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
        b_at_high = tl.zeros([BQ], NUMBER)
        m_open = m_i
        while tl.max(m_open.to(tl.int32), 0) > 0:
            b_counts = tl.zeros([BQ, BN, PIVOTS], NUMBER)
            for i_n in range(begin, end, BN):
                b_k = load_columns(p_k, o_n, i_n, K, stride_kk, D, BD, True)
                b_s = ranking(products(b_q, b_k, PRECISION), b_total, scale, softcap, HEADS, SOFTCAP)
                m_x = shown(p_mask, i_n + o_n, b_stop, b_start, b_holes, MASKED)
                b_x = tl.where(m_x, ordered(b_s), -2147483648)
                m_pivot = b_x[:, :, None] >= b_pivots[:, None, :]
                if MASS:
                    b_w = weights(b_s, b_peak[:, None], scale, softcap, HEADS, SOFTCAP)
                    b_counts += tl.where(m_pivot, b_w[:, :, None], 0.0)
                else:
                    b_counts += m_pivot.to(tl.int32)
            b_totals = tl.where(b_pivots > -2147483648, tl.sum(b_counts, 1), b_at_low[:, None])
            b_wide = b_pivots.to(tl.int64)
            m_low = m_open[:, None] & (b_totals >= b_wanted[:, None]) & (b_wide > b_low[:, None])
            m_high = m_open[:, None] & (b_totals < b_wanted[:, None]) & (b_wide < b_high[:, None])
            b_low = tl.maximum(b_low, tl.max(tl.where(m_low, b_wide, -2147483648), 1))
            b_high = tl.minimum(b_high, tl.min(tl.where(m_high, b_wide, 2147483647), 1))
            b_at_low = tl.minimum(b_at_low, tl.min(tl.where(m_low, b_totals, b_at_low[:, None]), 1))
            b_at_high = tl.maximum(b_at_high, tl.max(tl.where(m_high, b_totals, 0), 1))
            m_open = m_i & (b_high - b_low > 1) & (b_at_low != b_wanted)
            b_pivots = (b_low[:, None] + (b_high - b_low)[:, None] * (o_p + 1) // (PIVOTS + 1)).to(tl.int32)
        b_need = b_n * 0 + ALL
        if not MASS:
            b_need = tl.where(b_at_low == b_wanted, ALL, b_wanted - b_at_high)
        tl.store(cuts + i_bh * Q + o_q, restored(b_low.to(tl.int32)), mask=m_i)
        tl.store(needs + i_bh * Q + o_q, b_need, mask=m_i)
        tl.store(tied + i_bh * tiles + o_q // TILE, b_need * 0 + 1, mask=m_i & (b_need != ALL))
