"""Triton, stage 1 of a cut: a bracket around each row's k-th best score, from a sample of the keys."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import (
    SMALLEST,
    band_bounds,
    granted,
    load_rows,
    products,
    visible_keys,
)


@triton.jit
def mixed(x):
    """A hash of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bracket_kernel(
    q, k, lows, highs, i_first, rows, H, Q, K, group, stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_kk,
    first, first_bits, last, last_bits, budget, budget_bits, chunks, most, deviations,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BUDGET_IS_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``lows <= k-th best score <= highs`` for nearly every row, from ``chunks`` samples of BS keys each."""
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = i_t * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_q = i_first + o_r
    b_n = tl.where(m_r, visible_keys(o_q, Q, K, CAUSAL), 0)
    b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    b_c = b_start - b_stop
    b_k = granted(b_n, budget, budget_bits, BUDGET_IS_SHARE)
    b_low = tl.full([BM], SMALLEST, tl.float32)
    b_high = tl.full([BM], float("inf"), tl.float32)
    if tl.max(b_c, 0) > most:  # else all candidates fit into the lists
        begin = tl.max(tl.where(m_r, b_stop, 0), 0)
        length = tl.maximum(tl.min(tl.where(m_r, b_start, 2147483647), 0) - begin, 1)
        b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_r, stride_qq, D, BD)
        p_k = k + i_b * stride_kb + (i_h // group) * stride_kg
        total = chunks * BS
        b_p = tl.minimum(b_k.to(tl.float32) / tl.maximum(b_c, 1).to(tl.float32), 1.0)
        b_spread = deviations * tl.sqrt(b_p * (1.0 - b_p) / total) * BS + 1.0 / chunks
        b_skew = (deviations * deviations - 1.0) * (1.0 - 2.0 * b_p) * BS / (6.0 * total)  # of the binomial's tails
        b_below = tl.ceil(b_p * BS + b_spread + b_skew)  # this many of a chunk should be at or above low
        b_above = tl.floor(b_p * BS - b_spread + b_skew)  # at most this many should be above high
        b_lows = tl.zeros([BM], tl.float32)
        b_highs = tl.zeros([BM], tl.float32)
        for i_c in range(chunks):
            o_s = tl.arange(0, BS) * chunks + i_c
            seed = (o_s + i_t * 40503).to(tl.uint32) + (i_bh * 69069).to(tl.uint32)
            b_jitter = (mixed(seed) >> 1).to(tl.int32) % length
            o_k = begin + ((o_s.to(tl.int64) * length + b_jitter) // total).to(tl.int32)
            o_k = tl.minimum(o_k, K - 1)
            o_d = tl.arange(0, BD)
            p = p_k + o_k.to(tl.int64)[None, :] * stride_kk + o_d[:, None]
            b_s = products(b_q, tl.load(p, mask=(o_d < D)[:, None], other=0.0), PRECISION)
            b_min, b_max = tl.min(b_s, 1), tl.max(b_s, 1)
            b_la, b_lb, b_ha, b_hb = b_min, b_max, b_min, b_max
            for _ in range(STEPS):
                b_mid = 0.5 * b_la + 0.5 * b_lb
                b_reached = tl.sum((b_s >= b_mid[:, None]).to(tl.float32), 1) >= b_below
                b_la = tl.where(b_reached, b_mid, b_la)
                b_lb = tl.where(b_reached, b_lb, b_mid)
                b_mid = 0.5 * b_ha + 0.5 * b_hb
                b_few = tl.sum((b_s > b_mid[:, None]).to(tl.float32), 1) <= b_above
                b_hb = tl.where(b_few, b_mid, b_hb)
                b_ha = tl.where(b_few, b_ha, b_mid)
            b_lows += b_la
            b_highs += b_hb
        b_low = tl.where(b_below <= BS, b_lows / chunks, SMALLEST)
        b_high = tl.where(b_above >= 0, b_highs / chunks, float("inf"))
        b_low = tl.where(b_c <= b_k, float("inf"), b_low)  # nothing to find: write nothing
        b_high = tl.where(b_c <= b_k, float("inf"), b_high)
    tl.store(lows + i_bh * rows + o_r, b_low, mask=m_r)
    tl.store(highs + i_bh * rows + o_r, b_high, mask=m_r)
