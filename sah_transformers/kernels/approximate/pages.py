"""Pages: their bounds for every row, which of them hold what a row sees, and the best of each row as a list."""

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.best import best_of, rankable
from sah_transformers.kernels.approximate.rows import bits_set
from sah_transformers.kernels.decode.limits import limits_of, reach_of


@triton.jit
def counted(count, bits, other_count, other_bits):
    return count + other_count, other_bits


@triton.jit(do_not_specialize=["P", "capacity", "stride"])
def page_score_kernel(
    q, low, high, scores, P, capacity, stride, sq_b, sq_h, sq_q,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``BN`` pages: the bounds ``sum_d max(q_d low_d, q_d high_d)``, ``[R, stride]``.

    Pages without real tokens (``low > high``) count as zeros.
    """
    i_c, i_bg, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    b_s = tl.dot(b_up, tl.trans(b_high), input_precision="ieee")
    b_s = tl.dot(b_down, tl.trans(b_low), b_s, input_precision="ieee")
    p_s = scores + (i_bg * (H // G * Q) + o_m)[:, None].to(tl.int64) * stride + o_p[None, :]
    tl.store(p_s, b_s, mask=m_m[:, None] & (o_p < stride)[None, :])


@triton.jit
def straight(limits, positions, i_b, i_q, B, sp_b, Q: tl.constexpr):
    """How far the tokens' slots lie behind their numbers if a row sees all keys from its first to its last, and all
    are real tokens, else -1."""
    p = limits + i_b * Q + i_q
    n, begin, end = tl.load(p), tl.load(p + 3 * B * Q), tl.load(p + 4 * B * Q)
    whole = (n > 0) & (n == end - begin)
    p_position = positions + i_b.to(tl.int64) * sp_b
    token = tl.load(p_position + begin, mask=whole, other=-1).to(tl.int32)
    last = tl.load(p_position + end - 1, mask=whole, other=-1).to(tl.int32)
    return tl.where(whole & (token >= 0) & (last - token == n - 1), begin - token, -1)


@triton.jit(do_not_specialize=["K", "B", "tokens", "sp_b"])
def slots_kernel(limits, positions, slots, shifts, K, B, tokens, sp_b, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row, how its tokens lie: ``shifts [B*Q]`` (``straight``); where some row needs it, where each real token
    lies: ``slots [B, tokens]`` from ``positions [B, K]``, the rest stays as it is."""
    i_c, i_b = tl.program_id(0), tl.program_id(1)
    least = K
    for i_q in tl.static_range(Q):
        shift = straight(limits, positions, i_b, i_q, B, sp_b, Q)
        least = tl.minimum(least, shift)
        if i_c == 0:
            tl.store(shifts + i_b * Q + i_q, shift)
    if least < 0:
        o_k = i_c * BLOCK + tl.arange(0, BLOCK)
        b_p = tl.load(positions + i_b.to(tl.int64) * sp_b + o_k, mask=o_k < K, other=-1)
        tl.store(slots + i_b.to(tl.int64) * tokens + b_p, o_k, mask=b_p >= 0)


@triton.jit(do_not_specialize=["K", "B", "P", "tokens", "sm_b", "sm_q"])
def flags_kernel(
    mask, limits, slots, shifts, flags, K, B, P, tokens, sm_b, sm_q, sm_k,
    Q: tl.constexpr, CAUSAL: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row of a mask, ``BN`` pages: ``flags [B*Q, P]``, 1 if the row sees a key of the page, + 2 if a candidate.

    Nothing for rows that need none (``straight``).
    """
    i = tl.program_id(1)
    if tl.load(shifts + i) < 0:
        i_b, i_q = (i // Q).to(tl.int64), i % Q
        o_p = tl.program_id(0) * BN + tl.arange(0, BN)
        o_j = tl.arange(0, WIDE)[None, :]
        o_t = o_p[:, None] * PAGE + o_j
        b_slot = tl.load(slots + i_b * tokens + o_t, mask=(o_p < P)[:, None] & (o_j < PAGE), other=-1)
        m = (b_slot >= 0) & (b_slot < reach_of(i_q, K, Q, CAUSAL)) & (b_slot < K)
        m = m & (tl.load(mask + i_b * sm_b + i_q * sm_q + b_slot.to(tl.int64) * sm_k, mask=m, other=0) != 0)
        first_end, last_start = tl.load(limits + B * Q + i), tl.load(limits + 2 * B * Q + i)
        m_free = m & (b_slot >= first_end) & (b_slot < last_start)
        b_f = tl.max(m.to(tl.int32) + 2 * m_free.to(tl.int32), 1)  # a page with a candidate has a visible key
        tl.store(flags + i.to(tl.int64) * P + o_p, b_f, mask=o_p < P)


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "P",
        "stride",
        "first",
        "first_share",
        "last",
        "last_share",
        "size",
        "share",
    ]
)
def select_pages_kernel(
    scores, limits, shifts, flags, lists, counts, K, B, P, stride, scaling,
    first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The pages of one selection row, ascending: ``lists [E, stride]``, ``counts [E]``; ``stride`` is a multiple of 16.

    ``ceil(budget / PAGE)`` pages of those that hold a candidate, the row's own first, then the highest bounds (of a
    ``GROUP``: the highest sums of the heads' softmax over the pages they see but the own), the lower of equal ones.
    """
    i_e = tl.program_id(0)
    E = B * G * Q if GROUP else B * H * Q
    i_q, i_b = i_e % Q, i_e // (E // B)
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    stride = stride // 16 * 16  # what lies behind the last page is read and not looked at
    o_p = tl.arange(0, PAGES)
    start, stop, shift = 0, n, 0
    if MASKED:
        i = i_b * Q + i_q
        start, stop, shift = tl.load(limits + 3 * B * Q + i), tl.load(limits + 4 * B * Q + i), tl.load(shifts + i)
        first_end, last_start = tl.maximum(first_end, start), tl.minimum(last_start, stop)
    own = (stop - shift + PAGE - 1) // PAGE - 1
    begin = (first_end - shift) // PAGE
    end = tl.where(first_end < last_start, (last_start - shift + PAGE - 1) // PAGE, 0)
    own_held = ((begin <= own) & (own < end)).to(tl.int32)
    end = tl.minimum(end, own)
    m_seen, m_held = (o_p >= (start - shift) // PAGE) & (o_p < own), (o_p >= begin) & (o_p < end)
    candidates = tl.maximum(end - begin, 0)
    if MASKED:  # noqa: SIM102 (shift is no constant)
        if shift < 0:
            b_f = tl.load(flags + i.to(tl.int64) * P + o_p, mask=o_p < P, other=0)
            own = tl.max(tl.where(b_f >= 1, o_p, -1))
            own_held = tl.max(((b_f >= 3) & (o_p == own)).to(tl.int32))
            m_seen, m_held = (b_f >= 1) & (o_p != own), (b_f >= 3) & (o_p != own)
            candidates = tl.sum(m_held.to(tl.int32))
    if GROUP:
        b_v = tl.zeros([PAGES], tl.float32)
        for i_h in range(0, H // G, HEADS):
            o_h = i_h + tl.arange(0, HEADS)
            i_r = ((i_e // Q) * (H // G) + o_h) * Q + i_q
            p_s = scores + i_r[:, None].to(tl.int64) * stride + o_p[None, :]
            b_s = tl.load(p_s, mask=(o_h < H // G)[:, None] & (o_p < stride)[None, :], other=0.0)
            b_s = tl.where(m_seen[None, :], b_s * scaling, float("-inf"))
            b_peak = tl.max(b_s, 1)
            b_w = tl.exp(b_s - tl.where(b_peak == float("-inf"), 0.0, b_peak)[:, None])
            b_share = tl.where(o_h < H // G, 1.0 / tl.maximum(tl.sum(b_w, 1), 1.0), 0.0)
            b_v += tl.sum(b_w * b_share[:, None], 0)
    else:
        b_v = tl.load(scores + i_e.to(tl.int64) * stride + o_p, mask=o_p < stride, other=0.0)
    share = tl.cast(share, tl.int64).to(tl.float64, bitcast=True)
    budget = tl.maximum((n.to(tl.float64) * share).to(tl.int32), size)
    room = tl.maximum(budget // PAGE + (budget % PAGE > 0).to(tl.int32) - own_held, 0)
    m_taken = best_of(rankable(b_v, m_held), room, candidates) | (o_p == tl.where(own_held > 0, own, -1))
    b_bits = tl.sum(tl.reshape(m_taken.to(tl.int32) << (o_p % 32), (PAGES // 32, 32)), 1)
    b_count = bits_set(b_bits)
    b_upto, b_bits = tl.associative_scan((b_count, b_bits), 0, counted)
    p_list = lists + i_e.to(tl.int64) * stride + b_upto - bits_set(b_bits)
    for i in tl.static_range(32):
        b_bit = (b_bits >> i) & 1
        tl.store(p_list, tl.arange(0, PAGES // 32) * 32 + i, mask=b_bit > 0)
        p_list += b_bit
    tl.store(counts + i_e, tl.minimum(room, candidates) + own_held)
