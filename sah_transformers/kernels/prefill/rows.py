"""Triton: what a tile of query rows sees, which of it the bands hold, and its scores."""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32."""

LOWEST = tl.constexpr(-3.0e38)
"""Where a running maximum starts: finite, so that a row without keys subtracts nothing undefined."""

ALL = tl.constexpr(2147483647)
"""Where a row takes all keys equal to its cut, the number of them that it takes."""


@triton.jit
def granted(b_n, size, share_bits, IS_SHARE: tl.constexpr):
    """Keys that a budget grants to rows with ``b_n`` visible keys; a share arrives as the bits of a float64."""
    if IS_SHARE:
        share = tl.cast(share_bits, tl.int64).to(tl.float64, bitcast=True)
        return tl.maximum((b_n.to(tl.float64) * share).to(tl.int32), 1)
    else:
        return b_n * 0 + size


@triton.jit
def visible_keys(o_q, Q, K, CAUSAL: tl.constexpr):
    """Keys ``[0, n)`` are what rows ``o_q`` see; rows beyond Q see none."""
    if CAUSAL:
        b_n = tl.minimum(tl.maximum(o_q + 1 + (K - Q), 0), K)
    else:
        b_n = o_q * 0 + K
    return tl.where(o_q < Q, b_n, 0)


@triton.jit
def band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr):
    """Keys ``[0, stop)`` and ``[start, n)`` are in the bands, ``stop <= start``."""
    b_stop = tl.minimum(granted(b_n, first, first_bits, FIRST_IS_SHARE), b_n)
    b_last = tl.minimum(granted(b_n, last, last_bits, LAST_IS_SHARE), b_n)
    return b_stop, tl.maximum(b_n - b_last, b_stop)


@triton.jit
def row_limits(
    limits, stride_l, i_b, o_q, m_q, Q, K, first, first_bits, last, last_bits, FIELD: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr,
):  # fmt: skip
    """(n, begin, end, stop, start) of rows ``o_q``; all 0 where not ``m_q``.

    A row sees ``n`` keys, all in ``[begin, end)``; the bands hold those in ``[begin, stop)`` and in ``[start, end)``.
    MASKED: they are read from ``limits`` (see ``limits_kernel``), the bands' from FIELD on.
    """
    if MASKED:
        p = limits + i_b * stride_l + o_q
        b_n = tl.load(p, mask=m_q, other=0)
        b_begin = tl.load(p + Q, mask=m_q, other=0)
        b_end = tl.load(p + Q * 2, mask=m_q, other=0)
        b_stop = tl.load(p + Q * FIELD, mask=m_q, other=0)
        b_start = tl.load(p + Q * (FIELD + 1), mask=m_q, other=0)
        return b_n, b_begin, b_end, b_stop, b_start
    else:
        b_n = tl.where(m_q, visible_keys(o_q, Q, K, CAUSAL), 0)
        b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
        return b_n, b_n * 0, b_n, b_stop, b_start


@triton.jit
def outside(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE: tl.constexpr, LAST_IS_SHARE: tl.constexpr):
    """How many of ``n`` visible keys are in neither band."""
    b_stop, b_start = band_bounds(b_n, first, first_bits, last, last_bits, FIRST_IS_SHARE, LAST_IS_SHARE)
    return b_start - b_stop


@triton.jit
def mask_rows(mask, stride_mb, stride_mq, i_b, o_q):
    """Where the masks of rows ``o_q`` start."""
    return mask + i_b * stride_mb + o_q.to(tl.int64) * stride_mq


@triton.jit
def shown(p_mask, o_k, b_from, b_to, b_holes, MASKED: tl.constexpr):
    """Which of keys ``o_k`` rows see of ``[from, to)``; without ``holes`` they see all of it, and no mask is read."""
    m_k = (o_k[None, :] >= b_from[:, None]) & (o_k[None, :] < b_to[:, None])
    if MASKED:
        m_k = m_k & (tl.load(p_mask[:, None] + o_k[None, :], mask=m_k & b_holes[:, None], other=1) != 0)
    return m_k


@triton.jit
def tile_ranges(b_from, b_to, b_stop, b_start, m_q, b_holes, BN: tl.constexpr, MASKED: tl.constexpr):
    """(begin, inner, inner_end, end) of a tile of rows that look at keys ``[from, to)``.

    All keys of the tiles from ``inner`` to ``inner_end`` are candidates of every row: none where a mask must be read.
    """
    end = tl.max(tl.where(b_to > b_from, b_to, 0), 0)
    begin = tl.min(tl.where(b_to > b_from, b_from, 2147483647), 0)
    begin = tl.minimum(begin, end) // BN * BN
    inner = tl.cdiv(tl.max(b_stop, 0), BN) * BN
    inner_end = tl.min(tl.where(m_q, b_start, 2147483647), 0) // BN * BN
    inner = tl.maximum(tl.minimum(inner, tl.cdiv(end, BN) * BN), begin)
    if MASKED:
        inner = tl.where(tl.max(b_holes.to(tl.int32), 0) > 0, tl.cdiv(end, BN) * BN, inner)
    return begin, inner, tl.maximum(inner_end, inner), end


@triton.jit
def load_rows(p_x, o_x, m_x, stride_x, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``o_x`` of ``[*, D]``, ``[len(o_x), BD]``, zeros beyond ``m_x`` and D."""
    o_d = tl.arange(0, BD)
    p = p_x + o_x.to(tl.int64)[:, None] * stride_x + o_d[None, :]
    return tl.load(p, mask=m_x[:, None] & (o_d[None, :] < D), other=0.0)


@triton.jit
def load_columns(p_k, o_n, i_n, K, stride_k, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Keys ``i_n + o_n``, transposed: ``[BD, len(o_n)]``."""
    o_d = tl.arange(0, BD)
    p = p_k + tl.cast(i_n, tl.int64) * stride_k + (o_n[None, :] * stride_k + o_d[:, None])
    if MASKED and D != BD:
        return tl.load(p, mask=(i_n + o_n < K)[None, :] & (o_d < D)[:, None], other=0.0)
    elif MASKED:
        return tl.load(p, mask=(i_n + o_n < K)[None, :], other=0.0)
    elif D != BD:
        return tl.load(p, mask=(o_d < D)[:, None], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def products(b_q, b_k, PRECISION: tl.constexpr):
    """q·k in float32: every kernel computes it here, so that a score has the same bits in each of them."""
    return tl.dot(b_q, b_k, input_precision=PRECISION)


@triton.jit
def cap(b_s, scale, softcap):
    """tanh of ``scale / softcap`` times scores."""
    b_x = b_s * (scale / softcap)
    return 1.0 - 2.0 / (tl.exp(2.0 * b_x) + 1.0)


@triton.jit
def logits(b_s, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits of scores ``b_s`` = q·k, times log2(e)."""
    if SOFTCAP:
        return cap(b_s, scale, softcap) * (softcap * 1.4426950408889634)
    else:
        return b_s * (scale * 1.4426950408889634)


@triton.jit
def masses(b_s, b_peak, scale, softcap, SOFTCAP: tl.constexpr):
    """Softmax weights of scores relative to a row's ``peak`` among the ``logits``."""
    return tl.exp2(logits(b_s, scale, softcap, SOFTCAP) - b_peak)


@triton.jit
def ordered(b_s):
    """Float32 as int32 of the same order; -0 counts as +0."""
    b_i = (b_s + 0.0).to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def restored(b_i):
    """The float32 of an ``ordered`` int32."""
    return (b_i ^ ((b_i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
