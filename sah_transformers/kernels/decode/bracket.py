"""Where the cut of each row probably lies: a bracket from a sample, so that few keys need a histogram.

A bracket is a line ``x = value * scale + offset`` that maps it onto ``[0, BINS)``. A wrong bracket costs time, never
exactness: the threshold stage sees that the counts do not fit and finds the cut another way.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import limits_of, size_of
from sah_transformers.kernels.decode.score import capped
from sah_transformers.kernels.decode.values import numbers_below, order_of, pivots_above, wanted_mass

NOTHING = tl.constexpr(-3.0e38)  # offset of a line that maps every value below the bracket
SIGMAS = tl.constexpr(4.5)
ROUNDS = tl.constexpr(3)


@triton.jit
def sample_position(o_s, first_end, last_start, SAMPLES: tl.constexpr):
    """A jittered position in part ``o_s`` of ``SAMPLES`` equal parts of ``[first_end, last_start)``."""
    jitter = (o_s * 40503) & 0xFFFF
    return first_end + (((o_s * 65536 + jitter).to(tl.int64) * (last_start - first_end)) // (SAMPLES * 65536)).to(
        tl.int32
    )


@triton.jit
def outline(n, low, high, other_n, other_low, other_high):
    return n + other_n, tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def count_bracket(b_x, m_x, share):
    """(low, high) around the value that a ``share`` of the population exceeds; ``b_x`` are samples where ``m_x``.

    Both ends are found at once, to 1/512 of the samples' range, of which each round finds three bits.
    """
    b_low, b_high = tl.where(m_x, b_x, float("inf")), tl.where(m_x, b_x, float("-inf"))
    n, smallest, largest = tl.reduce((m_x.to(tl.int32), b_low, b_high), 0, outline)
    all = n.to(tl.float32)
    expected = all * share
    spread = SIGMAS * tl.sqrt(expected * (1 - share) + 0.25)
    few, many = expected - spread - 1, expected + spread + 2
    width = (largest - smallest) / 512
    scale = tl.where((width > 0) & (width < float("inf")), 1 / tl.maximum(width, 1e-37), 0.0)
    b_step = tl.where(m_x, tl.minimum((b_x - smallest) * scale, 511.0), 1023.0).to(tl.uint32)
    b_wanted = tl.where(tl.arange(0, 16) < 8, many, few + 1)
    low, high = (n * 0).to(tl.uint32), (n * 0).to(tl.uint32)
    for i in tl.static_range(ROUNDS):
        b_above = pivots_above(tl.maximum(b_step, high), high, 6 - 3 * i).to(tl.uint64) << 32
        b_above |= pivots_above(tl.maximum(b_step, low), low, 6 - 3 * i).to(tl.uint64)
        b_reached = (n - numbers_below(b_above, 4, 16)).to(tl.float32) >= b_wanted  # [16], the upper half for ``high``
        reached = tl.sum(tl.where(b_reached, tl.where(tl.arange(0, 16) < 8, 1, 16), 0))
        low += (tl.maximum(reached % 16 - 1, 0) << (6 - 3 * i)).to(tl.uint32)
        high += (tl.maximum(reached // 16 - 1, 0) << (6 - 3 * i)).to(tl.uint32)
    b_from, b_to = smallest + width * low.to(tl.float32), smallest + width * (high.to(tl.float32) + 1)
    b_from = tl.where(many > all, smallest - 0.5 * (largest - smallest), b_from)
    return b_from, tl.where(few < 0, largest + 2 * (largest - b_from), b_to)


@triton.jit
def store_line(lines, E, i_e, low, high, BINS: tl.constexpr):
    """The line that maps ``[low, high)`` onto the bins; none when the two are equal or not finite."""
    width = high - low
    good = (width > 0) & (width < 3.0e38) & (BINS / width < 3.0e38)
    scale = tl.where(good, BINS / tl.where(good, width, 1.0), 1.0)
    tl.store(lines + i_e, scale)
    tl.store(lines + E + i_e, tl.where(good, -low * scale, NOTHING))


@triton.jit(do_not_specialize=["K", "B", "sk_b", "sk_g", "first", "first_share", "last", "last_share", "size", "share"])
def sample_keys_kernel(
    q, k, mask, limits, lines, histogram, samples, K, B, sq_b, sq_h, sq_q, sk_b, sk_g, sk_k, sm_b, sm_q, sm_k,
    scaling, softcap, first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    SAMPLES: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Bracket of a row's ``size``-th best score from the scores of sampled keys; one program per row."""
    i_r = tl.program_id(0)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    candidates = n - size_of(n, first, first_share) - size_of(n, last, last_share)
    tl.store(histogram + i_r.to(tl.int64) * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
    last_start = tl.maximum(last_start, first_end)
    o_k = sample_position(tl.arange(0, SAMPLES), first_end, last_start, SAMPLES)
    m_k = (o_k < last_start) & (o_k < K)
    if MASKED:
        p_mask = mask + i_b.to(tl.int64) * sm_b + i_q * sm_q
        m_k = m_k & (tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=m_k, other=0) != 0)
    p_q = q + i_b.to(tl.int64) * sq_b + i_h * sq_h + i_q * sq_q
    p_k = k + i_b.to(tl.int64) * sk_b * UNIT + (i_h // (H // G)).to(tl.int64) * (sk_g * UNIT)
    o_d = tl.arange(0, BD)
    b_q = tl.load(p_q + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    p_mine = samples + i_r * SAMPLES
    for start in tl.range(0, SAMPLES, SLICE, num_stages=STAGES):  # copied asynchronously: all are under way at once
        o_s = start + tl.arange(0, SLICE)
        o_t = sample_position(o_s, first_end, last_start, SAMPLES)
        p_kd = p_k + o_t[:, None].to(tl.int64) * (sk_k * UNIT) + o_d[None, :]
        b_k = tl.load(p_kd, mask=(o_t < K)[:, None] & (o_d < D)[None, :], other=0.0)
        tl.store(p_mine + o_s, tl.sum(b_k.to(tl.float32) * b_q[None, :], 1))
    tl.debug_barrier()
    b_s = tl.load(p_mine + tl.arange(0, SAMPLES))
    b_s = capped(b_s * scaling, softcap, SOFTCAP)
    wanted = size_of(n, size, share)
    low, high = count_bracket(b_s, m_k, wanted.to(tl.float32) / tl.maximum(candidates, 1).to(tl.float32))
    store_line(lines, B * H * Q, i_r, low, high, BINS)


@triton.jit
def mass_bracket(b_x, b_e, m_x, factor, left, peak):
    """(low, high) around the value below which the mass is ``left``; each sample of mass ``b_e`` stands for ``factor``.

    The mass below the cut is estimated, not the one above it: it consists of many small terms.
    """
    smallest = tl.min(tl.where(m_x, b_x, float("inf")))
    largest = tl.max(tl.where(m_x, b_x, float("-inf")))
    o = tl.arange(0, 16)
    upper = o < 8
    low, high = smallest, smallest
    width = largest - smallest
    for _ in tl.range(0, ROUNDS, loop_unroll_factor=1):
        width = width / 8
        b_pivot = tl.where(upper, high, low) + width * (o % 8 + 1).to(tl.float32)
        b_below = tl.where(m_x[:, None] & (b_x[:, None] < b_pivot[None, :]), b_e[:, None], 0.0)
        below = tl.sum(b_below, 0)
        one = tl.exp(b_pivot - peak)
        spread = SIGMAS * tl.sqrt((tl.sum(b_below * b_below, 0) + one * one) * tl.maximum(1 - 1 / factor, 0.0))
        reached = tl.where(upper, (below - spread) * factor < left, (below + spread) * factor <= left)
        high += width * tl.sum((reached & upper).to(tl.int32)).to(tl.float32)
        low += width * tl.sum((reached & (o >= 8)).to(tl.int32)).to(tl.float32)
    high += width
    low = tl.where(low <= smallest, smallest - 0.1 * (largest - smallest), low)
    high = tl.where(high >= largest, peak + 0.01 * (peak - low), high)
    return low, high


@triton.jit
def both(one, two, other_one, other_two):
    return one + other_one, two + other_two


@triton.jit
def row_totals(peaks, masses, stats, R, o_r, m_r, chunks, MASSES: tl.constexpr, CHUNKS: tl.constexpr):
    """Reduce the chunks of rows to ``stats [1 + MASSES, R]``: peak and, relative to it, the mass, or with 2 ``MASSES``
    those of the candidates and of the bands; returned, 0 for a mass that there is not."""
    o_c = tl.arange(0, CHUNKS)[None, :]
    m = m_r[:, None] & (o_c < chunks)
    p = o_r[:, None].to(tl.int64) * chunks + o_c
    b_peak = tl.load(peaks + p, mask=m, other=float("-inf"))  # all are under way before the first is needed
    b_one = tl.load(masses + p, mask=m, other=0.0)
    if MASSES == 2:
        b_two = tl.load(masses + R.to(tl.int64) * chunks + p, mask=m, other=0.0)
    peak = tl.max(b_peak, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # a row that sees nothing
    b_w = tl.exp(b_peak - peak[:, None])
    if MASSES == 2:
        one, two = tl.reduce((b_one * b_w, b_two * b_w), 1, both)
        tl.store(stats + 2 * R + o_r, two, mask=m_r)
    else:
        one, two = tl.sum(b_one * b_w, 1), 0.0
    tl.store(stats + o_r, peak, mask=m_r)
    tl.store(stats + R + o_r, one, mask=m_r)
    return peak, one, two


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "stride",
        "chunks",
        "top_p",
        "first",
        "first_share",
        "last",
        "last_share",
        "size",
        "share",
    ]
)
def sample_scores_kernel(
    scores, limits, lines, histogram, peaks, masses, stats,
    K, B, stride, chunks, top_p, first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASS: tl.constexpr, TOTAL: tl.constexpr, CHUNKS: tl.constexpr, HEADS: tl.constexpr, SAMPLES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Bracket of a selection row from stored scores: of one head by mass, or of a group by summed softmax."""
    i_e = tl.program_id(0)
    R = B * H * Q
    E = R if MASS else B * G * Q
    tl.store(histogram + i_e.to(tl.int64) * BINS + tl.arange(0, BINS), tl.zeros([BINS], histogram.dtype.element_ty))
    i_q = i_e % Q
    i_b = i_e // (E // B)
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    last_start = tl.maximum(last_start, first_end)
    o_k = sample_position(tl.arange(0, SAMPLES), first_end, last_start, SAMPLES)
    m_k = (o_k < last_start) & (o_k < K)
    if MASS:
        # Scores are asked for before the sums, which would wait in between.
        b_s = tl.load(scores + i_e.to(tl.int64) * (stride * 16) + o_k, mask=m_k, other=float("-inf"))
        o_r = i_e + tl.arange(0, 1)
        peak, free, band = row_totals(peaks, masses, stats, R, o_r, o_r < R, chunks, 2, CHUNKS)
        peak, free, band = tl.max(peak), tl.max(free), tl.max(band)
        m_k = m_k & (b_s > float("-inf"))
        factor = (last_start - first_end).to(tl.float32) / SAMPLES
        left = free - wanted_mass(free, band, top_p, TOTAL)
        low, high = mass_bracket(b_s, tl.exp(b_s - peak), m_k, tl.maximum(factor, 1.0), left, peak)
        tl.store(lines + 2 * E + i_e, high)
    else:
        o_h = tl.arange(0, HEADS)
        m_h = o_h < H // G
        o_r = (i_e // Q) * (H // G * Q) + i_q + o_h * Q
        p_s = scores + o_r[:, None].to(tl.int64) * (stride * 16) + o_k[None, :]
        b_s = tl.load(p_s, mask=m_h[:, None] & m_k[None, :], other=float("-inf"))
        peak, total, _ = row_totals(peaks, masses, stats, R, o_r, m_h, chunks, 1, CHUNKS)
        b_mass = tl.sum(tl.exp(b_s - peak[:, None]) / tl.maximum(total, 1.0)[:, None], 0)
        m_k = m_k & (tl.max(b_s, 0) > float("-inf"))
        wanted = size_of(n, size, share)
        candidates = n - size_of(n, first, first_share) - size_of(n, last, last_share)
        share_of = wanted.to(tl.float32) / tl.maximum(candidates, 1).to(tl.float32)
        low, high = count_bracket(order_of(b_mass), m_k, share_of)
    store_line(lines, E, i_e, low, high, BINS)
