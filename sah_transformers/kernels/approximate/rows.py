"""Which rows a program has, and how far they see: shared by the scoring kernels."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, reach_of


@triton.jit
def rows_of(
    limits, i_bg, o_m, B, K, first, first_share, last, last_share,
    IN_GROUP: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``o_m`` of ``IN_GROUP`` of a KV head: (query, row, which exist, first_end, last_start, reach)."""
    m_m = o_m < IN_GROUP
    o_q = o_m % Q
    o_r = i_bg * IN_GROUP + o_m
    _, first_end, last_start = limits_of(
        limits, i_bg // G, o_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    reach = tl.minimum(reach_of(o_q, K, Q, CAUSAL), K)
    return o_q, o_r, m_m, first_end, last_start, reach


@triton.jit
def between(o_k, begin, end):
    """Which of ``o_k`` lie in ``[begin, end)``, in one comparison."""
    return (o_k - begin).to(tl.uint32, bitcast=True) < tl.maximum(end - begin, 0).to(tl.uint32)


@triton.jit
def seen_of(
    mask, i_b, i_q, o_k, begin, end, K, sm_b, sm_q, sm_k, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """Which of the keys ``o_k`` one row sees in ``[begin, end)``."""
    m_k = between(o_k, begin, tl.minimum(end, tl.minimum(reach_of(i_q, K, Q, CAUSAL), K)))
    if MASKED:
        p_mask = mask + i_b.to(tl.int64) * sm_b + i_q * sm_q + o_k.to(tl.int64) * sm_k
        m_k = m_k & (tl.load(p_mask, mask=m_k, other=0) != 0)
    return m_k


@triton.jit
def end_of(K, UNIT: tl.constexpr):
    """Where loads end: a multiple of 16 where the storage allows it, so that a thread's keys are loaded at once."""
    return (K + UNIT - 1) // UNIT * UNIT


@triton.jit
def bits_set(x):
    """Bits set in each integer of 32 bits (the compiler knows the pattern: one instruction)."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
