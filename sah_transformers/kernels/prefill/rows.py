"""Triton: what a tile of query rows sees, which of it the bands hold, and its scores."""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32."""

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
def ordered(b_s):
    """Float32 as int32 of the same order; -0 counts as +0."""
    b_i = (b_s + 0.0).to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def restored(b_i):
    """The float32 of an ``ordered`` int32."""
    return (b_i ^ ((b_i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
