"""Triton: tiles that hold all heads of a KV head, and the score by which these rank a key together.

A tile of BM rows holds ``BM / HEADS`` queries, each with HEADS heads: a power of two, rows of heads that there are not
are zero. HEADS = 1: every head ranks alone. Of 16 rows, the height of a matrix unit's tile, the highest bits of a
row's number are its head and the lowest its query: the scores of two heads then lie in one thread, of four in two.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.prefill.rows import cap, load_rows, masses


@triton.jit
def kv_head(i_h, group, HEADS: tl.constexpr):
    """The KV head of what ranks keys: of query head ``i_h`` or, with HEADS, the KV head ``i_h`` itself."""
    return i_h // group if HEADS == 1 else i_h


@triton.jit
def each_head(b_x, HEADS: tl.constexpr):
    """What queries have, ``[BM / HEADS]`` or ``[BM / HEADS, BN]``, for each of their rows ``[BM, ...]``."""
    LOW: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
    HIGH: tl.constexpr = b_x.shape[0] // LOW
    if len(b_x.shape) == 1:
        return tl.reshape(tl.broadcast_to(tl.reshape(b_x, [HIGH, 1, LOW]), [HIGH, HEADS, LOW]), [HIGH * HEADS * LOW])
    else:
        BN: tl.constexpr = b_x.shape[1]
        b_each = tl.broadcast_to(tl.reshape(b_x, [HIGH, 1, LOW, BN]), [HIGH, HEADS, LOW, BN])
        return tl.reshape(b_each, [HIGH * HEADS * LOW, BN])


@triton.jit
def tile_rows(o_q, m_q, i_g, group, HEADS: tl.constexpr):
    """(query, whether there is such a row, head) of each row of a tile: the ``group`` heads of KV head ``i_g``."""
    LOW: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
    o_h = tl.arange(0, o_q.shape[0] * HEADS) // LOW % HEADS
    return each_head(o_q, HEADS), each_head(m_q, HEADS) & (o_h < group), i_g * group + o_h


@triton.jit
def load_queries(
    q, stride_qb, stride_qh, stride_qq, o_q, m_q, i_b, i_h, group, D: tl.constexpr, BD: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Queries ``o_q`` of head ``i_h`` or, with HEADS, of all heads of KV head ``i_h``: ``[BM, BD]``."""
    if HEADS == 1:
        return load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_q, stride_qq, D, BD)
    else:
        o_x, m_x, b_h = tile_rows(o_q, m_q, i_h, group, HEADS)
        return load_rows(q + i_b * stride_qb + b_h[:, None] * stride_qh, o_x, m_x, stride_qq, D, BD)


@triton.jit
def load_totals(totals, o_q, m_q, i_bh, group, Q, HEADS: tl.constexpr):
    """log2 of the mass that each row of a tile with HEADS sees, inf where there is no row; else nothing."""
    if HEADS == 1:
        return 0
    else:
        o_x, m_x, b_h = tile_rows(o_q, m_q, i_bh, group, HEADS)
        return tl.load(totals + b_h * Q + o_x, mask=m_x, other=float("inf"))


@triton.jit
def summed(b_x, HIGH: tl.constexpr, HEADS: tl.constexpr, LOW: tl.constexpr, BN: tl.constexpr):
    """The sum over heads of rows ``[HIGH, HEADS, LOW]``, two by two: the same bits in whatever layout they lie."""
    if HEADS == 1:
        return tl.reshape(b_x, [HIGH * LOW, BN])
    else:
        b_half = tl.sum(tl.reshape(b_x, [HIGH, 2, HEADS // 2, LOW, BN]), 1)
        return summed(b_half, HIGH, HEADS // 2, LOW, BN)


@triton.jit
def ranking(b_s, b_total, scale, softcap, HEADS: tl.constexpr, SOFTCAP: tl.constexpr):
    """By what keys are ranked, from ``b_s`` ``[BM, BN]`` = q·k: that itself or, with HEADS, ``[BM / HEADS, BN]``.

    Heads sum their softmax over what their row sees. Multiplication and subtraction are fused by hand: every kernel
    computes the same bits.
    """
    if HEADS == 1:
        return b_s
    else:
        LOW: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
        b_minus = tl.broadcast_to(-b_total[:, None], b_s.shape)
        if SOFTCAP:
            b_x = tl.fma(cap(b_s, scale, softcap), tl.zeros_like(b_s) + softcap * 1.4426950408889634, b_minus)
        else:
            b_x = tl.fma(b_s, tl.zeros_like(b_s) + scale * 1.4426950408889634, b_minus)
        return summed(tl.exp2(b_x), b_s.shape[0] // (HEADS * LOW), HEADS, LOW, b_s.shape[1])


@triton.jit
def weights(b_r, b_peak, scale, softcap, HEADS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The mass of keys of this ``ranking``: relative to a row's ``peak`` or, with HEADS, the ranking itself."""
    if HEADS == 1:
        return masses(b_r, b_peak, scale, softcap, SOFTCAP)
    else:
        return tl.maximum(b_r, 0.0)


@triton.jit
def halfway(b_a, b_b, HEADS: tl.constexpr):
    """Between two ``ranking``; with HEADS, positive and of many magnitudes, in the integers of their order."""
    if HEADS == 1:
        return 0.5 * b_a + 0.5 * b_b
    else:
        b_i, b_j = b_a.to(tl.int32, bitcast=True), b_b.to(tl.int32, bitcast=True)
        return (b_i + (b_j - b_i) // 2).to(tl.float32, bitcast=True)
