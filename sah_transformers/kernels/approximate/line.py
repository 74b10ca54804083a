"""The line that a row's scores are laid on to become levels: through a bracket of the cut, from sampled scores.

``lines [3, E]``: of a selection row the middle of the bracket, levels per unit below it and above. A line is a guess:
samples may come from stored scores (`line_kernel`) or be computed before there are any, from side data
(`methods`: ``line``).
"""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.bracket import count_bracket, row_totals, sample_position
from sah_transformers.kernels.decode.limits import limits_of, size_of
from sah_transformers.kernels.decode.values import sortable


@triton.jit
def order(b_v):
    """A monotone, roughly logarithmic form of non-negative values: int32; 0 for others and NaN."""
    return sortable(tl.where(b_v > 0, b_v, 0.0))


@triton.jit
def sampled_keys(
    limits, i_b, i_q, K, B, first, first_share, last, last_share,
    Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """(visible keys of a row, where its candidates begin and end, ``SAMPLES`` places: outside if there are none)."""
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    last_start = tl.maximum(last_start, first_end)
    return n, first_end, last_start, sample_position(tl.arange(0, SAMPLES), first_end, last_start, SAMPLES)


@triton.jit
def keep_line(
    b_v, m_v, lines, i_e, n, first, first_share, last, last_share, size, share,
    LOGARITHMIC: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The line of row ``i_e``, one of as many as there are programs, which sees ``n`` keys, from the samples ``b_v``
    that are candidates, or with ``LOGARITHMIC`` from their `order`."""
    if LOGARITHMIC:
        b_v = order(tl.where(m_v, b_v, 0.0)).to(tl.float32)
    wanted = size_of(n, size, share)
    candidates = n - size_of(n, first, first_share) - size_of(n, last, last_share)
    share_of = wanted.to(tl.float32) / tl.maximum(candidates, 1).to(tl.float32)
    low, high = count_bracket(b_v, m_v, share_of)
    n_v = tl.sum(m_v.to(tl.int32))
    middle = (low + high) / 2
    if LOGARITHMIC:
        middle = middle_of(b_v, m_v, low, high, n_v.to(tl.float32) * share_of)
    good = (n_v > 0) & (high - low < 3.0e38)  # neither infinite nor NaN
    low, middle, high = tl.where(good, low, 0.0), tl.where(good, middle, 0.0), tl.where(good, high, 0.0)
    if LOGARITHMIC:
        middle = tl.floor(tl.minimum(tl.maximum(middle, 0.0), 2.1e9))
    E = tl.num_programs(0)
    tl.store(lines + i_e, middle)
    tl.store(lines + E + i_e, (BINS - 3) / 2 / tl.maximum(middle - low, 1.0e-30))
    tl.store(lines + 2 * E + i_e, (BINS - 3) / 2 / tl.maximum(high - middle, 1.0e-30))


@triton.jit
def middle_of(b_v, m_v, low, high, expected):
    """The value in ``[low, high]`` that ``expected`` of the samples ``b_v`` where ``m_v`` reach, between 16 counts."""
    o = tl.arange(0, 16)
    step = (high - low) / 16
    b_pivot = low + step * o.to(tl.float32)
    b_count = tl.sum((m_v[:, None] & (b_v[:, None] >= b_pivot[None, :])).to(tl.int32), 0).to(tl.float32)
    at = tl.sum((b_count >= expected).to(tl.int32)) - 1
    over = tl.sum(tl.where(o == at, b_count, 0.0)) - expected
    part = over / tl.maximum(over + expected - tl.sum(tl.where(o == at + 1, b_count, 0.0)), 1.0)
    return tl.minimum(tl.maximum(low + step * (at.to(tl.float32) + part), low), high)


@triton.jit(
    do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share", "size", "share"]
)
def line_kernel(
    scores, limits, peaks, masses, stats, lines, K, B, stride, chunks,
    first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    SOFTMAX: tl.constexpr, LOGARITHMIC: tl.constexpr, CHUNKS: tl.constexpr, SAMPLES: tl.constexpr, HEADS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The line of one selection row, from stored scores; ``SOFTMAX``: of a group's sum, and the heads' ``stats [2, R]``
    are written."""
    i_e = tl.program_id(0)
    R = B * H * Q
    i_q, i_b = i_e % Q, i_e // (tl.num_programs(0) // B)
    n, _, end, o_k = sampled_keys(
        limits, i_b, i_q, K, B, first, first_share, last, last_share, Q, CAUSAL, MASKED, SAMPLES
    )
    m_k = o_k < tl.minimum(end, K)
    if SOFTMAX:
        o_h = tl.arange(0, HEADS)
        m_h = o_h < H // G
        o_r = (i_e // Q) * (H // G * Q) + i_q + o_h * Q
        p_s = scores + o_r[None, :].to(tl.int64) * (stride * 16) + o_k[:, None]
        b_s = tl.load(p_s, mask=m_h[None, :] & m_k[:, None], other=float("-inf"))  # a sample's heads in one thread
        peak, total, _ = row_totals(peaks, masses, stats, R, o_r, m_h, chunks, 1, CHUNKS)
        m_k = m_k & (tl.max(b_s, 1) > float("-inf"))
        b_v = tl.sum(tl.exp(b_s - peak[None, :]) * (1.0 / tl.maximum(total, 1.0))[None, :], 1)
    else:
        b_v = tl.load(scores + i_e.to(tl.int64) * (stride * 16) + o_k, mask=m_k, other=float("-inf"))
        m_k = m_k & (b_v > float("-inf"))
    keep_line(b_v, m_k, lines, i_e, n, first, first_share, last, last_share, size, share, LOGARITHMIC, BINS)
