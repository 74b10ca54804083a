"""Pages: their bounds for every row, and which of them hold what a row sees."""

import triton
import triton.language as tl

from sah_transformers.kernels.decode.limits import bounds_of, reach_of, store_bounds
from sah_transformers.kernels.decode.values import dot_few


@triton.jit
def score_pages(
    q, low, high, scores, i_c, i_bg, i_m, P, capacity, stride, sq_b, sq_h, sq_q,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``BN`` pages: the bounds ``sum_d max(q_d low_d, q_d high_d)``, ``[R, stride]``.

    Pages without real tokens (``low > high``) count as zeros.
    """
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < H // G * Q
    o_q, o_h = o_m % Q, i_bg % G * (H // G) + o_m // Q
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    p_q = q + (i_bg // G).to(tl.int64) * sq_b + o_h[:, None] * sq_h + o_q[:, None] * sq_q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d, other=0.0)
    o_p = i_c * BN + tl.arange(0, BN)
    o_in = (i_bg.to(tl.int64) * capacity + o_p[:, None]) * D + o_d[None, :]
    m_in = (o_p < P)[:, None] & m_d
    b_low = tl.load(low + o_in, mask=m_in, other=0.0)
    b_high = tl.load(high + o_in, mask=m_in, other=0.0)
    m_empty = b_low > b_high
    b_low, b_high = tl.where(m_empty, 0.0, b_low).to(b_q.dtype), tl.where(m_empty, 0.0, b_high).to(b_q.dtype)
    b_up, b_down = tl.where(b_q > 0, b_q, 0.0).to(b_q.dtype), tl.where(b_q < 0, b_q, 0.0).to(b_q.dtype)
    b_s = dot_few(b_up, tl.trans(b_high), tl.zeros([BM, BN], tl.float32))
    b_s = dot_few(b_down, tl.trans(b_low), b_s)
    p_s = scores + (i_bg * (H // G * Q) + o_m)[:, None].to(tl.int64) * stride + o_p[None, :]
    tl.store(p_s, b_s, mask=m_m[:, None] & (o_p < stride)[None, :])


@triton.jit(do_not_specialize=["P", "capacity", "stride"])
def page_score_kernel(
    q, low, high, scores, P, capacity, stride, sq_b, sq_h, sq_q,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Bounds of the pages, see ``score_pages``."""
    i_c, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    score_pages(q, low, high, scores, i_c, i_bg, i_m, P, capacity, stride, sq_b, sq_h, sq_q, H, G, Q, D, BD, BM, BN)


@triton.jit
def flags_of(slots, i, B, tokens, stride, Q: tl.constexpr):
    """Where row ``i`` has its flags of pages that it sees, and of those with a candidate: behind ``slots``."""
    p_seen = slots + (tl.cast(B, tl.int64) * tokens + 15) // 16 * 16 + tl.cast(i, tl.int64) * stride
    return p_seen, p_seen + tl.cast(B * Q, tl.int64) * stride


@triton.jit
def straight(p_position, n, begin, end):
    """How far the tokens' slots lie behind their numbers if a row sees all keys from ``begin`` to ``end``, and all are
    real tokens, else -1."""
    whole = (n > 0) & (n == end - begin)
    token = tl.load(p_position + begin, mask=whole, other=-1).to(tl.int32)
    last = tl.load(p_position + end - 1, mask=whole, other=-1).to(tl.int32)
    return tl.where(whole & (token >= 0) & (last - token == n - 1), begin - token, -1)


@triton.jit(
    do_not_specialize=[
        "P",
        "capacity",
        "stride",
        "K",
        "B",
        "segments",
        "tokens",
        "sp_b",
        "sm_b",
        "sm_q",
        "first",
        "first_share",
        "last",
        "last_share",
        "least",
    ]
)
def page_score_and_look_kernel(
    q, low, high, scores, mask, counts, limits, positions, slots, shifts,
    P, capacity, stride, K, B, segments, tokens, sq_b, sq_h, sq_q, sp_b, sm_b, sm_q, sm_k,
    first, first_share, last, last_share, least,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, PAGE: tl.constexpr, LOOKS: tl.constexpr, SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """Bounds of the pages; before them, ``LOOKS`` programs per query of a KV head look at the rows of a mask.

    All of a row's find its ``limits`` (`decode.limits.bounds_of`, from ``counts``) and how its tokens lie,
    ``shifts [B*Q]`` (``straight``). Where they do not lie straight, each looks at a share of the keys: ``slots``, -1
    before, become where each real token lies, int32 ``[B, tokens]`` from ``positions [B, K]``, and behind them flags,
    ``[2, B*Q, stride]``, 1 where the row sees a key of a page, and where that is a candidate.
    """
    i_c, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_c >= LOOKS * Q:
        i_c -= LOOKS * Q
        score_pages(q, low, high, scores, i_c, i_bg, i_m, P, capacity, stride, sq_b, sq_h, sq_q, H, G, Q, D, BD, BM, BN)
    elif i_m == 0:
        i_b, i_q, i_l = (i_bg // G).to(tl.int64), i_c % Q, i_bg % G * LOOKS + i_c // Q
        i = i_b * Q + i_q
        n, first_end, last_start, begin, end = bounds_of(
            mask, counts, i, K, segments, sm_b, sm_q, sm_k, first, first_share, last, last_share, least,
            Q, CAUSAL, SEGMENTS, LENGTH,
        )  # fmt: skip
        p_position = positions + i_b * sp_b
        shift = straight(p_position, n, begin, end)
        if i_l == 0:
            store_bounds(limits, i, B * Q, n, first_end, last_start, begin, end)
            tl.store(shifts + i, shift)
        if shift < 0:
            p_slot, p_mask = slots + i_b * tokens, mask + i_b * sm_b + i_q * sm_q
            p_seen, p_held = flags_of(slots, i, B, tokens, stride, Q)
            reach = tl.minimum(reach_of(i_q, K, Q, CAUSAL), K)
            for start in range(i_l * LENGTH, K, G * LOOKS * LENGTH):
                o_k = start + tl.arange(0, LENGTH)
                b_t = tl.load(p_position + o_k, mask=o_k < K, other=-1).to(tl.int32)
                tl.store(p_slot + b_t, o_k, mask=b_t >= 0)
                m = (b_t >= 0) & (o_k < reach)
                m = m & (tl.load(p_mask + o_k.to(tl.int64) * sm_k, mask=m, other=0) != 0)
                tl.store(p_seen + b_t // PAGE, tl.full([LENGTH], 1, tl.int32), mask=m)
                m = m & (o_k >= first_end) & (o_k < last_start)
                tl.store(p_held + b_t // PAGE, tl.full([LENGTH], 1, tl.int32), mask=m)
