"""Second look at stored scores: how many candidates, and how much mass, lie above the bracket and in each bin."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of
from sah_transformers.kernels.decode.values import fixed_mass, line_of, unit_of, weight_of


@triton.jit(do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share"])
def histogram_kernel(
    scores, ranking, weights, limits, lines, histogram, stats, aboves, masses,
    K, B, stride, chunks, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASS: tl.constexpr, BINS: tl.constexpr, FIXED: tl.constexpr, COUNT_BITS: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One selection row and one chunk of keys.

    ``MASS``: bins hold ``mass << COUNT_BITS | count`` in int64; ``masses [E, chunks]`` is the mass above the bracket
    relative to the peak. Else the summed softmax of the group's heads is written to ``ranking [E, stride]`` first, and
    the heads' weights side by side to ``weights [E, stride, HEADS]``: values are gathered with one look-up per key.
    """
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    R = B * H * Q
    E = R if MASS else B * G * Q
    i_q, i_b = i_e % Q, i_e // (E // B)
    _, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    scale, offset = tl.load(lines + i_e), tl.load(lines + E + i_e)
    if MASS:
        peak, high = tl.load(stats + i_e), tl.load(lines + 2 * E + i_e)
        b_v = tl.load(scores + i_e.to(tl.int64) * (stride * 16) + o_k, mask=o_k < stride * 16, other=float("-inf"))
        m_free = b_v > float("-inf")
    else:
        o_h = tl.arange(0, HEADS)[:, None]
        m_h = o_h < H // G
        o_r = (i_e // Q) * (H // G * Q) + i_q + o_h * Q
        p_s = scores + o_r.to(tl.int64) * (stride * 16) + o_k[None, :]
        m_k = (o_k < stride * 16)[None, :]
        b_s = tl.load(p_s, mask=m_h & m_k, other=float("-inf"), eviction_policy="evict_first")
        total = tl.load(stats + R + o_r, mask=m_h, other=1.0)
        b_w = weight_of(b_s - tl.load(stats + o_r, mask=m_h, other=0.0), weights.dtype.element_ty == tl.float32)
        b_v = tl.sum(b_w / tl.maximum(total, 1.0), 0)
        m_free = (o_k < K) & (tl.min(tl.where(m_h, b_s, float("inf")), 0) > float("-inf"))
        p_e = i_e.to(tl.int64) * (stride * 16) + o_k
        tl.store(ranking + p_e, tl.where(m_free, b_v, float("-inf")), mask=o_k < stride * 16)
        tl.store(weights + p_e[None, :] * HEADS + o_h, b_w.to(weights.dtype.element_ty), mask=m_k)
    m_free = m_free & (o_k >= first_end) & (o_k < last_start)
    b_x = line_of(b_v, scale, offset, not MASS)
    m_above = m_free & (b_x >= BINS)
    m_inside = m_free & (b_x >= 0) & (b_x < BINS)
    p_bin = histogram + i_e.to(tl.int64) * BINS + tl.where(m_inside, b_x, 0.0).to(tl.int32)
    o_out = i_e.to(tl.int64) * chunks + i_c
    if MASS:
        b_add = (fixed_mass(b_v, peak, unit_of(high, peak, FIXED)) << COUNT_BITS) + 1
        tl.store(masses + o_out, tl.sum(tl.where(m_above, tl.exp(b_v - peak), 0.0)))
        tl.atomic_add(p_bin, b_add, mask=m_inside, sem="relaxed")
    else:
        tl.atomic_add(p_bin, 1, mask=m_inside, sem="relaxed")
    tl.store(aboves + o_out, tl.sum(m_above.to(tl.int32)))
