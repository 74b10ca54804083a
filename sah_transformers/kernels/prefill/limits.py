"""Triton, before everything else where there is a mask: what each row sees and where its bands end, by rank."""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import band_bounds, visible_keys

FIELDS = 7
"""Numbers of a row: n, begin, end, then stop and start of all bands, then of those before the scored masker."""


@triton.jit
def store_bands(
    p_limits, p_mask, n, begin, end, reach, Q, first, first_bits, last, last_bits,
    FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store where one row's bands stop and start: found by rank if what it sees has holes."""
    n_stop, n_start = band_bounds(n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    stop, start = begin + n_stop, begin + n_start
    if end - begin != n:
        o = tl.arange(0, BLOCK)
        b_stop = tl.zeros([BLOCK], tl.int32) + begin
        b_start = tl.zeros([BLOCK], tl.int32) + end
        seen = 0
        for i_k in range(0, reach, BLOCK):
            o_k = i_k + o
            m_k = tl.load(p_mask + o_k, mask=o_k < reach, other=0) != 0
            b_rank = seen + tl.cumsum(m_k.to(tl.int32), 0)
            b_stop = tl.maximum(b_stop, tl.where(m_k & (b_rank <= n_stop), o_k + 1, begin))
            b_start = tl.minimum(b_start, tl.where(m_k & (b_rank > n_start), o_k, end))
            seen += tl.sum(m_k.to(tl.int32), 0)
        stop, start = tl.max(b_stop, 0), tl.min(b_start, 0)
    tl.store(p_limits, stop)
    tl.store(p_limits + Q, start)


@triton.jit
def limits_kernel(
    mask, limits, stride_mb, stride_mq, Q, K, first, first_bits, last, last_bits, first_before, first_bits_before,
    last_before, last_bits_before, CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr,
    FIRST_BEFORE_IS_SHARE: tl.constexpr, LAST_BEFORE_IS_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of the mask ``[MB, Q, K]`` into ``limits`` ``[MB, FIELDS, Q]``."""
    i_q = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    reach = visible_keys(i_q, Q, K, CAUSAL)
    p_mask = mask + i_b * stride_mb + i_q.to(tl.int64) * stride_mq
    p_limits = limits + i_b * Q * 7 + i_q
    o = tl.arange(0, BLOCK)
    b_n = tl.zeros([BLOCK], tl.int32)
    b_end = tl.zeros([BLOCK], tl.int32)
    b_begin = tl.zeros([BLOCK], tl.int32) + K
    for i_k in range(0, reach, BLOCK):
        o_k = i_k + o
        m_k = tl.load(p_mask + o_k, mask=o_k < reach, other=0) != 0
        b_n += m_k.to(tl.int32)
        b_begin = tl.minimum(b_begin, tl.where(m_k, o_k, K))
        b_end = tl.maximum(b_end, tl.where(m_k, o_k + 1, 0))
    n, end = tl.sum(b_n, 0), tl.max(b_end, 0)
    begin = tl.minimum(tl.min(b_begin, 0), end)
    tl.store(p_limits, n)
    tl.store(p_limits + Q, begin)
    tl.store(p_limits + Q * 2, end)
    store_bands(
        p_limits + Q * 3, p_mask, n, begin, end, reach, Q, first, first_bits, last, last_bits,
        FIRST_IS_SHARE, LAST_IS_SHARE, BLOCK,
    )  # fmt: skip
    store_bands(
        p_limits + Q * 5, p_mask, n, begin, end, reach, Q, first_before, first_bits_before, last_before,
        last_bits_before, FIRST_BEFORE_IS_SHARE, LAST_BEFORE_IS_SHARE, BLOCK,
    )  # fmt: skip
