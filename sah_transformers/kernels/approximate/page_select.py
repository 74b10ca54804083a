"""The best pages of each row, as a list: the row lies in registers."""

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.best import NO_CANDIDATE, best_from, rankable, reaches
from sah_transformers.kernels.approximate.pages import flags_of
from sah_transformers.kernels.approximate.rows import bits_set
from sah_transformers.kernels.decode.limits import limits_of


@triton.jit
def counted(count, bits, other_count, other_bits):
    return count + other_count, other_bits


@triton.jit
def bent_pages(p_seen, p_held, o_p, length):
    """(the last of the pages ``o_p`` that are seen, or -1; how many hold a candidate)."""
    b_seen, b_held = (
        tl.load(p_seen + o_p, mask=o_p < length, other=0),
        tl.load(p_held + o_p, mask=o_p < length, other=0),
    )
    return tl.max(tl.where(b_seen > 0, o_p, -1)), tl.sum((b_held > 0).to(tl.int32))


@triton.jit
def raw_scores(scores, i_e, i_h, o_p, length, stride, Q: tl.constexpr, HEADS: tl.constexpr, IN_GROUP: tl.constexpr):
    """Scores of the heads from ``i_h`` on of a group's row ``i_e`` for the pages ``o_p``."""
    o_h = i_h + tl.arange(0, HEADS)
    i_r = ((i_e // Q) * IN_GROUP + o_h) * Q + i_e % Q
    p_s = scores + i_r[:, None].to(tl.int64) * stride + o_p[None, :]
    return tl.load(p_s, mask=(o_h < IN_GROUP)[:, None] & (o_p < length)[None, :], other=0.0)


@triton.jit
def seen_scores(b_s, p_seen, o_p, length, scaling, begin, own, bent):
    """Of scores for the pages ``o_p`` those that the row sees, but its ``own``; -inf elsewhere."""
    b_s = tl.where(((o_p >= begin) & (o_p < own))[None, :], b_s * scaling, float("-inf"))
    if bent:
        b_s = tl.where(tl.load(p_seen + o_p, mask=o_p < length, other=0)[None, :] > 0, b_s, float("-inf"))
    return b_s


@triton.jit
def over_heads(b_w):
    """The sum over the first dimension, a power of two up to 8, two numbers at a time: rounded alike wherever the
    numbers lie, so that equal pages have equal sums in both parts of a row."""
    b_w = two_by_two(two_by_two(two_by_two(b_w)))
    tl.static_assert(b_w.shape[0] == 1)
    return tl.reshape(b_w, (b_w.shape[1],))


@triton.jit
def two_by_two(b_w):
    if b_w.shape[0] > 1:
        b_w = tl.sum(tl.reshape(b_w, (b_w.shape[0] // 2, 2, b_w.shape[1])), 1)
    return b_w


@triton.jit
def candidate_scores(b_v, p_held, o_p, length, begin, end, bent):
    """Values in an order that ``best_from`` understands, of the pages ``o_p`` that hold a candidate, but the own."""
    b_i = rankable(b_v, (o_p >= begin) & (o_p < end))
    if bent:
        b_i = tl.where(tl.load(p_held + o_p, mask=o_p < length, other=0) > 0, b_i, NO_CANDIDATE)
    return b_i


@triton.jit
def list_pages(p_list, m_taken):
    """The pages that are taken, ascending, from ``p_list`` on."""
    PAGES: tl.constexpr = m_taken.numel
    b_bits = tl.sum(tl.reshape(m_taken.to(tl.int32) << (tl.arange(0, PAGES) % 32), (PAGES // 32, 32)), 1)
    b_count = bits_set(b_bits)
    b_upto, b_bits = tl.associative_scan((b_count, b_bits), 0, counted)
    p_list += b_upto - bits_set(b_bits)
    for i in tl.static_range(32):
        b_bit = (b_bits >> i) & 1
        tl.store(p_list, tl.arange(0, PAGES // 32) * 32 + i, mask=b_bit > 0)
        p_list += b_bit


@triton.jit(
    do_not_specialize=[
        "K",
        "B",
        "tokens",
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
    scores, limits, shifts, slots, lists, counts, K, B, tokens, stride, scaling,
    first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The pages of one selection row, ascending: ``lists [E, stride]``, ``counts [E]``; ``stride`` is a multiple of 16.

    ``ceil(budget / PAGE)`` pages of those that hold a candidate, the row's own first, then the highest bounds (of a
    ``GROUP``: the highest sums of the heads' softmax over the pages they see but the own), the lower of equal ones.
    The row lies in registers, as ``PAGES`` and, if not 0, ``REST`` behind them. Products must not be fused with sums:
    the compiler would do it in one part and not in the other, and equal pages go by their place.
    """
    i_e = tl.program_id(0)
    E = B * G * Q if GROUP else B * H * Q
    i_q, i_b = i_e % Q, i_e // (E // B)
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_p = tl.arange(0, PAGES)
    length = PAGES  # pages to read
    if REST > 0:
        o_rest = PAGES + tl.arange(0, REST)
    else:  # whole vectors are read, which do not lie in registers as the rest does; nobody looks behind the last page
        stride = stride // 16 * 16
        length = stride
    start, stop, shift = 0, n, 0
    p_seen, p_held = slots, slots
    ONCE: tl.constexpr = H // G <= HEADS
    if GROUP and ONCE:  # on their way before it is known what the row sees
        b_raw = raw_scores(scores, i_e, 0, o_p, length, stride, Q, HEADS, H // G)
        if REST > 0:
            b_raw_rest = raw_scores(scores, i_e, 0, o_rest, stride, stride, Q, HEADS, H // G)
    if MASKED:
        i = i_b * Q + i_q
        start, stop, shift = tl.load(limits + 3 * B * Q + i), tl.load(limits + 4 * B * Q + i), tl.load(shifts + i)
        first_end, last_start = tl.maximum(first_end, start), tl.minimum(last_start, stop)
        p_seen, p_held = flags_of(slots, i, B, tokens, stride, Q)
    own = (stop - shift + PAGE - 1) // PAGE - 1
    seen, begin = (start - shift) // PAGE, (first_end - shift) // PAGE
    end = tl.where(first_end < last_start, (last_start - shift + PAGE - 1) // PAGE, 0)
    own_held = ((begin <= own) & (own < end)).to(tl.int32)
    end = tl.minimum(end, own)
    candidates = tl.maximum(end - begin, 0)
    bent = shift < 0
    if bent:
        own, candidates = bent_pages(p_seen, p_held, o_p, length)
        if REST > 0:
            own_rest, candidates_rest = bent_pages(p_seen, p_held, o_rest, stride)
            own, candidates = tl.maximum(own, own_rest), candidates + candidates_rest
        own_held = (tl.load(p_held + own, mask=own >= 0, other=0) > 0).to(tl.int32)
        seen, begin, end, candidates = 0 * own, 0 * own, own, candidates - own_held
    if GROUP:
        b_v = tl.zeros([PAGES], tl.float32)
        if REST > 0:
            b_v_rest = tl.zeros([REST], tl.float32)
        for i_h in range(0, H // G, HEADS):
            m_h = i_h + tl.arange(0, HEADS) < H // G
            if not ONCE:
                b_raw = raw_scores(scores, i_e, i_h, o_p, length, stride, Q, HEADS, H // G)
                if REST > 0:
                    b_raw_rest = raw_scores(scores, i_e, i_h, o_rest, stride, stride, Q, HEADS, H // G)
            b_s = seen_scores(b_raw, p_seen, o_p, length, scaling, seen, own, bent)
            b_peak = tl.max(b_s, 1)
            if REST > 0:
                b_s_rest = seen_scores(b_raw_rest, p_seen, o_rest, stride, scaling, seen, own, bent)
                b_peak = tl.maximum(b_peak, tl.max(b_s_rest, 1))
            b_peak = tl.where(b_peak == float("-inf"), 0.0, b_peak)
            b_w = tl.exp(b_s - b_peak[:, None])
            b_total = tl.sum(b_w, 1)
            if REST > 0:
                b_w_rest = tl.exp(b_s_rest - b_peak[:, None])
                b_total += tl.sum(b_w_rest, 1)
            b_share = tl.where(m_h, 1.0 / tl.maximum(b_total, 1.0), 0.0)
            b_v += over_heads(b_w * b_share[:, None])
            if REST > 0:
                b_v_rest += over_heads(b_w_rest * b_share[:, None])
    else:
        b_v = tl.load(scores + i_e.to(tl.int64) * stride + o_p, mask=o_p < length, other=0.0)
        if REST > 0:
            b_v_rest = tl.load(scores + i_e.to(tl.int64) * stride + o_rest, mask=o_rest < stride, other=0.0)
    share = tl.cast(share, tl.int64).to(tl.float64, bitcast=True)
    budget = tl.maximum((n.to(tl.float64) * share).to(tl.int32), size)
    room = tl.maximum(budget // PAGE + (budget % PAGE > 0).to(tl.int32) - own_held, 0)
    taken = tl.minimum(room, candidates) + own_held
    own = tl.where(own_held > 0, own, -1)
    p_list = lists + i_e.to(tl.int64) * stride
    b_i, b_rest = candidate_scores(b_v, p_held, o_p, length, begin, end, bent), None
    if REST > 0:
        b_rest = candidate_scores(b_v_rest, p_held, o_rest, stride, begin, end, bent)
    cut, tie = best_from(b_i, b_rest, room, candidates)
    list_pages(p_list, reaches(b_i, o_p, cut, tie) | (o_p == own))
    if REST > 0:
        m_rest = reaches(b_rest, o_rest, cut, tie) | (o_rest == own)
        tl.store(p_list + taken - tl.cumsum(m_rest.to(tl.int32), 0, reverse=True), o_rest, mask=m_rest)
    tl.store(counts + i_e, taken)
