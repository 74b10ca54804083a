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


@triton.jit(do_not_specialize=["K", "B", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "least"])
def bounds_kernel(
    mask, limits, K, B, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
    Q: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts and bands of one row of a boolean mask, into ``limits [5, B*Q]``: n, first_end, last_start, begin, end.

    A row that sees fewer than ``least`` keys takes all of them as "first".
    """
    i = tl.program_id(0).to(tl.int64)
    i_b, i_q = i // Q, i % Q
    reach = reach_of(i_q.to(tl.int32), K, Q, CAUSAL)
    p_mask = mask + i_b * sm_b + i_q * sm_q
    o = tl.arange(0, BLOCK)
    b_n = tl.zeros([BLOCK], tl.int32)
    for start in range(0, reach, BLOCK):
        o_k = start + o
        b_n += (tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=o_k < reach, other=0) != 0).to(tl.int32)
    n = tl.sum(b_n)
    n_first = size_of(n, first, first_share)
    n_before = n - size_of(n, last, last_share)
    b_first, b_last, b_end = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    b_begin = tl.zeros([BLOCK], tl.int32) + K
    seen = 0
    for start in range(0, reach, BLOCK):
        o_k = start + o
        m = tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=o_k < reach, other=0) != 0
        rank = tl.cumsum(m.to(tl.int32), 0) + seen
        b_first = tl.where(m & (rank == n_first), o_k + 1, b_first)
        b_last = tl.where(m & (rank == n_before + 1), o_k, b_last)
        b_begin = tl.where(m & (rank == 1), o_k, b_begin)
        b_end = tl.where(m & (rank == n), o_k + 1, b_end)
        seen += tl.sum(m.to(tl.int32))
    first_end = tl.max(b_first)
    last_start = tl.where(n_before >= n, K, tl.max(b_last))
    first_end = tl.where(n < least, K, first_end)
    p = limits + i
    tl.store(p, n)
    tl.store(p + B * Q, first_end)
    tl.store(p + 2 * B * Q, last_start)
    tl.store(p + 3 * B * Q, tl.min(b_begin))
    tl.store(p + 4 * B * Q, tl.max(b_end))
