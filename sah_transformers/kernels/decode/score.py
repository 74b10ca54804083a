"""Scores of every key, read once: stored in float32, with what the cut needs to know of each chunk of keys."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, reach_of
from sah_transformers.kernels.decode.values import dot_few


@triton.jit
def capped(b_s, softcap, SOFTCAP: tl.constexpr):
    """``softcap * tanh(s / softcap)`` where the model has one."""
    if SOFTCAP:
        b_e = tl.exp(-2.0 * tl.abs(b_s) / softcap)
        b_t = softcap * (1.0 - b_e) / (1.0 + b_e)
        b_s = tl.where(b_s < 0, -b_t, b_t)
    return b_s


@triton.jit
def precise_scores(p_q, m_q, p_k, m_k, scaling, D: tl.constexpr, BD: tl.constexpr):
    """``scaling * q.k`` of float32 rows ``[BM, 1]`` and keys ``[BN, 1]``, in slices of 16: less rounding."""
    b_s = tl.zeros([p_q.shape[0], p_k.shape[0]], tl.float32)
    b_zero = b_s + scaling * 0.0  # not a constant: Triton would turn the sum of slices into one chain again
    for i_d in tl.static_range(0, BD, 16):
        o_d = i_d + tl.arange(0, 16)[None, :]
        b_q = tl.load(p_q + o_d, mask=m_q[:, None] & (o_d < D), other=0.0)
        b_k = tl.load(p_k + o_d, mask=m_k[:, None] & (o_d < D), other=0.0)
        b_s += tl.dot(b_q, tl.trans(b_k), b_zero, input_precision="ieee")
    return b_s * scaling


@triton.jit
def open_tally(lines, o_r, m_m, R, MASSES: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What ``BM`` of ``R`` rows have seen before their first tile: (peak, two tallies, the bracket's scale, offset).

    Peak and tallies are ``[BM, BN]``, one per column of a tile, and reduced once by ``close_tally``. With 2 ``MASSES``
    the tallies are those of the candidates and of the bands, with 1 the first is that of all visible keys, and without
    the number of candidates above the bracket; the second is then unused. Without ``MASSES`` and ``BINS`` there is the
    peak alone.
    """
    b_peak = tl.full([BM, BN], float("-inf"), tl.float32)
    b_one = tl.zeros([BM, BN], tl.float32 if MASSES else tl.int32)
    b_two = tl.zeros([BM, BN], tl.float32) if MASSES == 2 else 0
    scale, offset = 0.0, 0.0
    if BINS and not MASSES:
        scale = tl.load(lines + o_r, mask=m_m, other=1.0)
        offset = tl.load(lines + R + o_r, mask=m_m, other=0.0)
    return b_peak, b_one, b_two, scale, offset


@triton.jit
def keep_tile(
    b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach, first_end,
    last_start, K, stride, sm_b, sm_q, sm_k,
    Q: tl.constexpr, MASKED: tl.constexpr, MASSES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Store a tile of scores ``[BM, BN]``, -inf where invisible, and add it to (peak, two tallies), returned.

    With 1 of ``MASSES`` it does not matter where the bands lie.
    """
    m_s = o_k[None, :] < reach[:, None]
    if MASKED:
        if Q == 1:
            p_mask = mask + i_b.to(tl.int64) * sm_b + o_k.to(tl.int64) * sm_k
            m_s = m_s & (tl.load(p_mask, mask=o_k < K, other=0) != 0)[None, :]
        else:
            p_mask = (
                mask + i_b.to(tl.int64) * sm_b + o_q[:, None].to(tl.int64) * sm_q + o_k[None, :].to(tl.int64) * sm_k
            )
            m_s = m_s & (tl.load(p_mask, mask=m_s, other=0) != 0)
    b_s = tl.where(m_s, b_s, float("-inf"))
    p_s = scores + o_r[:, None].to(tl.int64) * (stride * 16) + o_k[None, :]
    m_in = m_m[:, None] & (o_k < stride * 16)[None, :]
    tl.store(p_s, b_s, mask=m_in, eviction_policy="evict_last")
    if MASSES != 1:
        m_free = m_s & (o_k[None, :] >= first_end[:, None]) & (o_k[None, :] < last_start[:, None])
    if MASSES:
        b_new = tl.maximum(b_peak, b_s)
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink, b_e = tl.exp(b_peak - b_safe), tl.exp(b_s - b_safe)
        if MASSES == 2:
            b_two = b_two * b_shrink + tl.where(m_free, 0.0, b_e)
            b_e = tl.where(m_free, b_e, 0.0)
        b_one = b_one * b_shrink + b_e
        b_peak = b_new
    else:
        b_peak = tl.maximum(b_peak, b_s)
    if BINS and not MASSES:
        b_x = tl.fma(b_s, scale[:, None] + tl.zeros_like(b_s), offset[:, None] + tl.zeros_like(b_s))
        m_above = m_free & (b_x >= BINS)
        m_inside = m_free & (b_x >= 0) & (b_x < BINS) & m_m[:, None]
        b_one += m_above.to(tl.int32)
        p_bin = histogram + o_r[:, None].to(tl.int64) * BINS + tl.where(m_inside, b_x, 0.0).to(tl.int32)
        tl.atomic_add(p_bin, 1, mask=m_inside, sem="relaxed")
    return b_peak, b_one, b_two


@triton.jit
def close_tally(
    b_peak, b_one, b_two, peaks, aboves, masses, o_r, m_m, i_c, chunks, R, MASSES: tl.constexpr, BINS: tl.constexpr
):
    """Store what a chunk holds: ``peaks [R, chunks]``, and ``masses [MASSES, R, chunks]`` or ``aboves [R, chunks]``."""
    peak = tl.max(b_peak, 1)
    o_out = o_r.to(tl.int64) * chunks + i_c
    tl.store(peaks + o_out, peak, mask=m_m)
    if MASSES:
        b_shrink = tl.exp(b_peak - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        tl.store(masses + o_out, tl.sum(b_one * b_shrink, 1), mask=m_m)
        if MASSES == 2:
            o_out += R.to(tl.int64) * chunks
            tl.store(masses + o_out, tl.sum(b_two * b_shrink, 1), mask=m_m)
    elif BINS:
        tl.store(aboves + o_out, tl.sum(b_one, 1), mask=m_m)


@triton.jit
def score_chunk(
    q, k, mask, limits, lines, scores, histogram, peaks, aboves, masses, i_c, i_bg, i_m,
    K, B, stride, chunks, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``TILES * BN`` keys.

    Stores ``scores [R, stride]`` (-inf where invisible) and per chunk ``peaks [R, chunks]``. Without ``MASSES`` it
    counts the candidates above the bracket, ``aboves [R, chunks]``, and adds those inside to ``histogram``; with 2 it
    sums ``exp(score - peak)`` of the candidates and of the bands, ``masses [2, R, chunks]``; with 1 that of all visible
    keys, ``masses [R, chunks]``, and reads neither ``limits`` nor ``lines``.
    """
    i_b, i_g = i_bg // G, i_bg % G
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < H // G * Q
    o_q = o_m % Q
    o_h = i_g * (H // G) + o_m // Q
    o_r = i_bg * (H // G * Q) + o_m
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q = q + i_b.to(tl.int64) * sq_b + o_h[:, None] * sq_h + o_q[:, None] * sq_q
    b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k + i_b.to(tl.int64) * sk_b * UNIT + i_g.to(tl.int64) * (sk_g * UNIT)
    first_end, last_start = 0, 0
    if MASSES != 1:
        _, first_end, last_start = limits_of(
            limits, i_b, o_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
        )
    reach = tl.minimum(reach_of(o_q, K, Q, CAUSAL), K)
    b_peak, b_one, b_two, scale, offset = open_tally(lines, o_r, m_m, B * H * Q, MASSES, BINS, BM, BN)
    for i_t in tl.range(0, TILES, num_stages=STAGES):
        o_k = (i_c * TILES + i_t) * BN + tl.arange(0, BN)
        p_kt = p_k + o_k[:, None].to(tl.int64) * (sk_k * UNIT)
        if k.dtype.element_ty == tl.float32:
            b_s = precise_scores(p_q, m_m, p_kt, o_k < K, scaling, D, BD)
        else:
            m_kt = (o_k < K)[:, None] & m_d[None, :]
            b_k = tl.load(p_kt + o_d[None, :], mask=m_kt, other=0.0, eviction_policy="evict_first")
            b_s = dot_few(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32)) * scaling
        b_s = capped(b_s, softcap, SOFTCAP)
        b_peak, b_one, b_two = keep_tile(
            b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach,
            first_end, last_start, K, stride, sm_b, sm_q, sm_k, Q, MASKED, MASSES, BINS,
        )  # fmt: skip
    close_tally(b_peak, b_one, b_two, peaks, aboves, masses, o_r, m_m, i_c, chunks, B * H * Q, MASSES, BINS)


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "stride",
        "chunks",
        "sk_b",
        "sk_g",
        "sm_b",
        "sm_q",
        "first",
        "first_share",
        "last",
        "last_share",
    ]
)
def score_kernel(
    q, k, mask, limits, lines, scores, histogram, peaks, aboves, masses,
    K, B, stride, chunks, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk, see ``score_chunk``."""
    score_chunk(
        q, k, mask, limits, lines, scores, histogram, peaks, aboves, masses,
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        K, B, stride, chunks, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
        scaling, softcap, first, first_share, last, last_share,
        H, G, Q, D, BD, CAUSAL, MASKED, SOFTCAP, UNIT, MASSES, BINS, BM, BN, TILES, STAGES,
    )  # fmt: skip
