"""How far a row sees and where its bands lie: shared by all stages, and found on the device where there is a mask.

A budget travels as two integers: a number of keys, and the bits of a float64 share of the row's visible keys
(Triton would round a float argument to float32). A row gets ``max(number, int(n * share))`` keys, at most ``n``.
"""

import triton
import triton.language as tl


@triton.jit
def size_of(n, fixed, share):
    """Keys that a budget grants to rows with ``n`` visible keys (int32)."""
    share = tl.cast(share, tl.int64).to(tl.float64, bitcast=True)
    return tl.minimum(tl.maximum((n.to(tl.float64) * share).to(tl.int32), fixed), n)


@triton.jit
def reach_of(i_q, K, Q: tl.constexpr, CAUSAL: tl.constexpr):
    """Row ``i_q`` sees no key from here on."""
    return tl.maximum(K - Q + 1 + i_q, 0) if CAUSAL else K + i_q * 0


@triton.jit
def limits_of(
    limits,
    i_b,
    i_q,
    B,
    K,
    first,
    first_share,
    last,
    last_share,
    Q: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(visible keys, end of the first keys, start of the last keys) of rows; ``limits`` is read only if masked."""
    if MASKED:
        p = limits + i_b * Q + i_q
        n, first_end, last_start = tl.load(p), tl.load(p + B * Q), tl.load(p + 2 * B * Q)
    else:
        n = reach_of(i_q, K, Q, CAUSAL)
        first_end = size_of(n, first, first_share)
        last_start = n - size_of(n, last, last_share)
    return n, first_end, last_start


@triton.jit(do_not_specialize=["K", "stride", "blanks", "sm_b", "sm_q"])
def count_kernel(
    mask, counts, blank, K, stride, blanks, sm_b, sm_q, sm_k,
    Q: tl.constexpr, CAUSAL: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Visible keys of one segment of ``LENGTH`` keys of one row of a boolean mask: ``counts [B*Q, stride]``; and -1 to
    a share of ``blank [blanks]``."""
    i_s, i = tl.program_id(0), tl.program_id(1)
    reach = reach_of(i % Q, K, Q, CAUSAL)
    o = tl.arange(0, LENGTH)
    o_k = i_s * LENGTH + o
    p_mask = mask + (i // Q).to(tl.int64) * sm_b + i % Q * sm_q + o_k.to(tl.int64) * sm_k
    b_n = (tl.load(p_mask, mask=o_k < reach, other=0) != 0).to(tl.int32)
    tl.store(counts + i.to(tl.int64) * stride + i_s, tl.sum(b_n))
    share = (i.to(tl.int64) * stride + i_s) * LENGTH
    for start in range(share, blanks, stride * tl.num_programs(1) * LENGTH):
        tl.store(blank + start + o, tl.full([LENGTH], -1, tl.int32), mask=start + o < blanks)


@triton.jit
def count_row(
    mask, counts, i, K, sm_b, sm_q, sm_k,
    Q: tl.constexpr, CAUSAL: tl.constexpr, AT_ONCE: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Visible keys of all segments of row ``i`` (int64), ``AT_ONCE`` at a time: ``counts [B*Q, segments]``; returns the
    number of segments. As ``count_kernel`` counts them."""
    segments = tl.cdiv(K, LENGTH)
    reach = reach_of((i % Q).to(tl.int32), K, Q, CAUSAL)
    p_mask = mask + i // Q * sm_b + i % Q * sm_q
    for start in range(0, segments, AT_ONCE):
        o_s = start + tl.arange(0, AT_ONCE)
        o_k = o_s[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
        b_n = (tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=o_k < reach, other=0) != 0).to(tl.int32)
        tl.store(counts + i * segments + o_s, tl.sum(b_n, 1), mask=o_s < segments)
    return segments


@triton.jit
def bounds_of(
    mask, counts, i, K, stride, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
    Q: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """(n, first_end, last_start, begin, end) of row ``i`` (int64) of a boolean mask.

    A row that sees fewer than ``least`` keys takes all of them as "first". Of ``counts``' segments only those are
    looked at that hold the first, the last, or a band's last key.
    """
    i_b, i_q = i // Q, i % Q
    reach = reach_of(i_q.to(tl.int32), K, Q, CAUSAL)
    p_mask = mask + i_b * sm_b + i_q * sm_q
    o_s = tl.arange(0, SEGMENTS)
    b_count = tl.load(counts + i * stride + o_s, mask=o_s < stride, other=0)
    n = tl.sum(b_count)
    n_first = size_of(n, first, first_share)
    n_before = n - size_of(n, last, last_share)
    o = tl.arange(0, 4)  # the first key, the last, the last of the first band, the first of the last
    b_rank = tl.where(o == 0, 1, tl.where(o == 1, n, tl.where(o == 2, n_first, n_before + 1)))
    b_seen = tl.cumsum(b_count, 0)
    m_before = b_seen[None, :] < b_rank[:, None]
    b_segment = tl.sum(m_before.to(tl.int32), 1)
    b_before = tl.max(tl.where(m_before, b_seen[None, :], 0), 1)
    o_k = (b_segment * LENGTH)[:, None] + tl.arange(0, LENGTH)[None, :]
    m_k = (b_segment < SEGMENTS)[:, None] & (o_k < reach)
    m_k = tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=m_k, other=0) != 0
    m_k = m_k & (tl.cumsum(m_k.to(tl.int32), 1) + b_before[:, None] == b_rank[:, None])
    b_end = tl.max(tl.where(m_k, o_k + 1, 0), 1)  # behind each of the four, 0 where there is none
    begin, end = tl.sum(tl.where(o == 0, b_end, 0)), tl.sum(tl.where(o == 1, b_end, 0))
    first_end, last_start = tl.sum(tl.where(o == 2, b_end, 0)), tl.sum(tl.where(o == 3, b_end, 0)) - 1
    first_end, last_start = tl.where(n < least, K, first_end), tl.where(n_before >= n, K, last_start)
    return n, first_end, last_start, tl.where(n > 0, begin - 1, K), end


@triton.jit
def store_bounds(limits, i, rows, n, first_end, last_start, begin, end):
    """``limits [5, rows]`` of row ``i``: n, first_end, last_start, begin, end."""
    p = limits + i
    tl.store(p, n)
    tl.store(p + rows, first_end)
    tl.store(p + 2 * rows, last_start)
    tl.store(p + 3 * rows, begin)
    tl.store(p + 4 * rows, end)


@triton.jit(
    do_not_specialize=["K", "B", "stride", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "least"]
)
def bounds_kernel(
    mask, counts, limits, K, B, stride, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
    Q: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Counts and bands of one row of a boolean mask, into ``limits [5, B*Q]`` (``bounds_of``)."""
    i = tl.program_id(0).to(tl.int64)
    n, first_end, last_start, begin, end = bounds_of(
        mask, counts, i, K, stride, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
        Q, CAUSAL, SEGMENTS, LENGTH,
    )  # fmt: skip
    store_bounds(limits, i, B * Q, n, first_end, last_start, begin, end)
