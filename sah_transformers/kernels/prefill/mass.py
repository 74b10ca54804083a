"""Triton, before a cut by mass: what each row's candidates weigh, and how much of that is wanted."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import (
    LOWEST,
    load_columns,
    load_rows,
    logits,
    mask_rows,
    products,
    row_limits,
    shown,
    tile_ranges,
)


@triton.jit
def mass_tiles(
    b_m, b_free, b_band, b_q, p_k, p_mask, b_holes, b_begin, b_end, b_stop, b_start, i_first, i_last, K, stride_k,
    scale,
    softcap, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr,
    TOTAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys from ``i_first`` to ``i_last``; EDGE tiles hold other than candidates."""
    o_n = tl.arange(0, BN)
    for i_n in range(i_first, i_last, BN):
        i_n = tl.multiple_of(i_n, BN)
        b_k = load_columns(p_k, o_n, i_n, K, stride_k, D, BD, EDGE)
        b_x = logits(products(b_q, b_k, PRECISION), scale, softcap, SOFTCAP)
        if EDGE:
            m_free = shown(p_mask, i_n + o_n, b_stop, b_start, b_holes, MASKED)
            if TOTAL:
                b_x = tl.where(shown(p_mask, i_n + o_n, b_begin, b_end, b_holes, MASKED), b_x, float("-inf"))
            else:
                b_x = tl.where(m_free, b_x, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_x, 1))
        b_w = tl.exp2(b_x - b_new[:, None])
        b_alpha = tl.exp2(b_m - b_new).to(tl.float64)
        if TOTAL:
            b_band = b_band * b_alpha
            if EDGE:
                b_band += tl.sum(tl.where(m_free, 0.0, b_w), 1)
                b_w = tl.where(m_free, b_w, 0.0)
        b_free = b_free * b_alpha + tl.sum(b_w, 1)
        b_m = b_new
    return b_m, b_free, b_band


@triton.jit
def mass_kernel(
    q, k, stats, mask, limits, H, Q, K, group, stride_mb, stride_mq, stride_l, stride_qb, stride_qh, stride_qq,
    stride_kb, stride_kg, stride_kk, first, first_bits, last, last_bits, target_bits, scale, softcap,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, MASKED: tl.constexpr, TOTAL: tl.constexpr,
    SOFTCAP: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head, into ``stats`` ``[3, B*H, Q]``.

    The highest logit of the candidates (TOTAL: of all visible keys) times log2(e); relative to it the mass that the
    candidates must add to reach the target, at most 0 where the bands hold it already; and the mass to leave out.
    Sums over tiles are float64: the share must not drift with their number.
    SHARE, with TOTAL: instead log2 of the mass of all visible keys and the candidates' share of it, ``[2, B*H, Q]``.
    """
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_q = i_t * BM + tl.arange(0, BM)
    m_q = o_q < Q
    b_n, b_begin, b_end, b_stop, b_start = row_limits(
        limits, stride_l, i_b, o_q, m_q, Q, K, first, first_bits, last, last_bits, 5, MASKED, CAUSAL,
        FIRST_IS_SHARE, LAST_IS_SHARE,
    )  # fmt: skip
    p_mask = mask_rows(mask, stride_mb, stride_mq, i_b, o_q)
    b_holes = b_end - b_begin > b_n
    b_from = b_begin if TOTAL else b_stop
    b_to = b_end if TOTAL else b_start
    begin, inner, inner_end, end = tile_ranges(b_from, b_to, b_stop, b_start, m_q, b_holes, BN, MASKED)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_q, stride_qq, D, BD)
    p_k = k + i_b * stride_kb + (i_h // group) * stride_kg
    b_m = tl.full([BM], LOWEST, tl.float32)
    b_free = tl.zeros([BM], tl.float64)
    b_band = tl.zeros([BM], tl.float64)
    b_m, b_free, b_band = mass_tiles(
        b_m, b_free, b_band, b_q, p_k, p_mask, b_holes, b_begin, b_end, b_stop, b_start, begin, inner, K, stride_kk,
        scale, softcap, D, BD, BN, True, MASKED, TOTAL, SOFTCAP, PRECISION,
    )  # fmt: skip
    b_m, b_free, b_band = mass_tiles(
        b_m, b_free, b_band, b_q, p_k, p_mask, b_holes, b_begin, b_end, b_stop, b_start, inner, inner_end, K, stride_kk,
        scale, softcap, D, BD, BN, False, MASKED, TOTAL, SOFTCAP, PRECISION,
    )  # fmt: skip
    b_m, b_free, b_band = mass_tiles(
        b_m, b_free, b_band, b_q, p_k, p_mask, b_holes, b_begin, b_end, b_stop, b_start, inner_end, end, K, stride_kk,
        scale, softcap, D, BD, BN, True, MASKED, TOTAL, SOFTCAP, PRECISION,
    )  # fmt: skip
    if SHARE:
        b_sum = tl.where(b_n > 0, b_free + b_band, 1.0)
        p_stats = stats + i_bh * Q + o_q
        tl.store(p_stats, tl.where(b_n > 0, b_m + tl.log2(b_sum.to(tl.float32)), float("inf")), mask=m_q)
        tl.store(p_stats + tl.num_programs(1).to(tl.int64) * Q, (b_free / b_sum).to(tl.float32), mask=m_q)
    else:
        target = tl.cast(target_bits, tl.int64).to(tl.float64, bitcast=True)
        b_goal = target * (b_free + b_band) - b_band
        p_stats = stats + i_bh * Q + o_q
        size = tl.num_programs(1).to(tl.int64) * Q
        tl.store(p_stats, tl.where(b_m > LOWEST, b_m, 0.0), mask=m_q)
        tl.store(p_stats + size, b_goal.to(tl.float32), mask=m_q)
        tl.store(p_stats + size * 2, (b_free - b_goal).to(tl.float32), mask=m_q)
