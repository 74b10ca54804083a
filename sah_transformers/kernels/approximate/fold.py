"""Page bounds kept in place: new keys are folded into the smallest and largest value of their pages."""

import triton
import triton.language as tl


@triton.jit
def smaller(a, b):
    """The smaller of two numbers, NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def larger(a, b):
    """The larger of two numbers, NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit(do_not_specialize=["start", "end", "capacity", "sk_b", "sk_g"])
def fold_pages_kernel(
    k, low, high, start, end, capacity, sk_b, sk_g, sk_k,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One page of one KV head, where every key is a real token: its keys from ``start`` up to ``end``."""
    i_p, i_bg = start // PAGE + tl.program_id(0), tl.program_id(1)
    o_j, o_d = tl.arange(0, WIDE), tl.arange(0, BD)
    m_d = o_d < D
    o_k = i_p * PAGE + o_j
    m_k = (o_j < PAGE) & (o_k >= start) & (o_k < end)
    p_k = k + (i_bg // G).to(tl.int64) * sk_b * UNIT + (i_bg % G).to(tl.int64) * (sk_g * UNIT)
    p_k += o_k[:, None].to(tl.int64) * (sk_k * UNIT) + o_d[None, :]
    b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
    m_nan = tl.sum((b_k != b_k).to(tl.int32), 0) > 0
    b_low = tl.where(m_nan, float("nan"), tl.min(tl.where(m_k[:, None], b_k, float("inf")), 0))
    b_high = tl.where(m_nan, float("nan"), tl.max(tl.where(m_k[:, None], b_k, float("-inf")), 0))
    o_out = (i_bg.to(tl.int64) * capacity + i_p) * D + o_d
    if i_p * PAGE < start:
        b_low = smaller(b_low, tl.load(low + o_out, mask=m_d, other=0.0))
        b_high = larger(b_high, tl.load(high + o_out, mask=m_d, other=0.0))
    tl.store(low + o_out, b_low.to(low.dtype.element_ty), mask=m_d)
    tl.store(high + o_out, b_high.to(high.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["start", "end", "capacity", "sk_b", "sk_g", "sp_b"])
def fold_keys_kernel(
    k, low, high, positions, start, end, capacity, sk_b, sk_g, sk_k, sp_b,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """Few keys of one KV head, one after the other, at their ``positions [B, K]`` (-1: nowhere).

    ``POINT``: ``start`` is the address of a `place.Span`, ``end`` means nothing, and a page begins with its first key,
    whatever was in its place. Where all keys are new the pages behind theirs are emptied.
    """
    i_bg = tl.program_id(0)
    i_b = (i_bg // G).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_k = k + i_b * sk_b * UNIT + (i_bg % G).to(tl.int64) * (sk_g * UNIT)
    begin = tl.load(start) if POINT else start
    end = tl.load(start + 1) if POINT else end
    tokens = tl.cast(0, tl.int64)
    for i_k in range(begin, end):
        position = tl.load(positions + i_b * sp_b + i_k)
        if position >= 0:
            b_k = tl.load(p_k + tl.cast(i_k, tl.int64) * (sk_k * UNIT) + o_d, mask=m_d, other=0.0)
            o_out = (i_bg.to(tl.int64) * capacity + position // PAGE) * D + o_d
            b_low, b_high = tl.load(low + o_out, mask=m_d, other=0.0), tl.load(high + o_out, mask=m_d, other=0.0)
            if POINT:
                tokens = position + 1
                b_low = tl.where(position % PAGE == 0, float("inf"), b_low)
                b_high = tl.where(position % PAGE == 0, float("-inf"), b_high)
            b_low, b_high = smaller(b_k, b_low), larger(b_k, b_high)
            tl.store(low + o_out, b_low.to(low.dtype.element_ty), mask=m_d)
            tl.store(high + o_out, b_high.to(high.dtype.element_ty), mask=m_d)
    if POINT:  # noqa: SIM102 (known when it is compiled)
        if begin == 0:
            for i_p in range((tokens + PAGE - 1) // PAGE, tl.cast(capacity, tl.int64)):
                o_out = (i_bg.to(tl.int64) * capacity + i_p) * D + o_d
                tl.store(low + o_out, tl.full([BD], float("inf"), low.dtype.element_ty), mask=m_d)
                tl.store(high + o_out, tl.full([BD], float("-inf"), low.dtype.element_ty), mask=m_d)
