"""The exact cut of rows of stored scores: bracketed by a sample, found among the few keys inside the bracket.

Keys inside are written chunk by chunk, so that their number is no limit: a row whose bracket misses, or holds more keys
of a chunk than the cut's registers take (equal scores), is searched as a whole. What is taken becomes a list,
ascending; of equal scores the lower positions.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.best import NO_CANDIDATE, cut_of, rankable
from sah_transformers.kernels.approximate.levels import sampled_bracket
from sah_transformers.kernels.decode.limits import limits_of, size_of
from sah_transformers.kernels.decode.values import sortable


@triton.jit
def candidates_of(ranking, i_e, o_k, K, stride, first_end, last_start):
    """Sortable values of a selection row at ``o_k``, ``NO_CANDIDATE`` outside of its candidates."""
    b_v = tl.load(ranking + i_e.to(tl.int64) * (stride * 16) + o_k, mask=o_k < K, other=float("-inf"))
    m = (o_k < K) & (o_k >= first_end) & (o_k < last_start) & (b_v != float("-inf"))
    return rankable(b_v, m)


@triton.jit(
    do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share", "size", "share"]
)
def bracket_kernel(
    scores, limits, peaks, masses, stats, edges, K, B, stride, chunks,
    first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    REDUCE: tl.constexpr, CHUNKS: tl.constexpr, SAMPLES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Bracket ``edges [2, E]`` of a selection row's cut, from sampled scores; for ``REDUCE == "softmax"`` also the
    heads' ``stats [3, R]``: peak and mass of the row."""
    i_e, E = tl.program_id(0), tl.num_programs(0)
    low, high, bad = sampled_bracket(
        scores, limits, peaks, masses, stats, i_e, K, B, stride, chunks, first, first_share, last, last_share, size,
        share, H, G, Q, CAUSAL, MASKED, REDUCE == "softmax", CHUNKS, SAMPLES, HEADS,
    )  # fmt: skip
    if REDUCE == "softmax":
        low, high = tl.where(bad, 0.0, tl.maximum(low, 0.0)), tl.where(bad, 0.0, tl.minimum(high, 2.1e9))
        low, high = tl.floor(low).to(tl.int32), tl.floor(high).to(tl.int32) + 1
    else:
        low, high = sortable(tl.where(bad, 0.0, low)), sortable(tl.where(bad, 0.0, high)) + 1
    tl.store(edges + i_e, low)
    tl.store(edges + E + i_e, high)


@triton.jit(do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share"])
def emit_kernel(
    scores, ranking, limits, stats, edges, inside, places, tally, K, B, stride, chunks,
    first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    REDUCE: tl.constexpr, CHUNK: tl.constexpr, SLOT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One selection row, one chunk of keys: values and positions of the first ``SLOT`` candidates inside the bracket,
    to ``inside`` and ``places [E, chunks, SLOT]``; how many lie above and inside to ``tally [2, E, chunks]``. A
    group's values are written to ``ranking [E, stride]`` first."""
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    R = B * H * Q
    E = R if REDUCE == "none" else B * G * Q
    i_q, i_b = i_e % Q, i_e // (E // B)
    _, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    if REDUCE != "none":
        b_v = tl.zeros([CHUNK], tl.float32)
        m_v = o_k < K
        for i_h in range(H // G):
            i_r = (i_e // Q) * (H // G * Q) + i_q + i_h * Q
            b_s = tl.load(scores + i_r.to(tl.int64) * (stride * 16) + o_k, mask=o_k < K, other=float("-inf"))
            m_v = m_v & (b_s != float("-inf"))
            if REDUCE == "softmax":
                total = tl.load(stats + R + i_r) + tl.load(stats + 2 * R + i_r)
                b_s = tl.exp(b_s - tl.load(stats + i_r)) / tl.maximum(total, 1.0)
            b_v += b_s
        b_v = tl.where(m_v, b_v, float("-inf"))
        tl.store(ranking + i_e.to(tl.int64) * (stride * 16) + o_k, b_v, mask=o_k < stride * 16)
        b_i = rankable(b_v, m_v & (o_k >= first_end) & (o_k < last_start))
    else:
        b_i = candidates_of(scores, i_e, o_k, K, stride, first_end, last_start)
    low, high = tl.load(edges + i_e), tl.load(edges + E + i_e)
    m_above = (b_i >= high) & (b_i > NO_CANDIDATE)
    m_inside = (b_i >= low) & (b_i < high) & (b_i > NO_CANDIDATE)
    b_rank = tl.cumsum(m_inside.to(tl.int32), 0) - 1
    o_out = (i_e.to(tl.int64) * chunks + i_c) * SLOT + b_rank
    m_kept = m_inside & (b_rank < SLOT)
    tl.store(inside + o_out, b_i, mask=m_kept)
    tl.store(places + o_out, o_k, mask=m_kept)
    tl.store(tally + i_e.to(tl.int64) * chunks + i_c, tl.sum(m_above.to(tl.int32)))
    tl.store(tally + E.to(tl.int64) * chunks + i_e.to(tl.int64) * chunks + i_c, tl.sum(m_inside.to(tl.int32)))


@triton.jit
def whole_cut(ranking, i_e, K, stride, first_end, last_start, room, BLOCK: tl.constexpr):
    """(cut, last position of the ties taken at it) of a row that is read again and again; ``0 < room < candidates``."""
    b_low, b_high = tl.full([BLOCK], 0x7FFFFFFF, tl.int32), tl.full([BLOCK], NO_CANDIDATE, tl.int32)
    b_count = tl.zeros([BLOCK], tl.int32)
    o = tl.arange(0, BLOCK)
    for start in range(0, K, BLOCK):
        b_i = candidates_of(ranking, i_e, start + o, K, stride, first_end, last_start)
        b_low = tl.minimum(b_low, tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF))
        b_high = tl.maximum(b_high, b_i)
        b_count += (b_i > NO_CANDIDATE).to(tl.int32)
    low, high, count = tl.min(b_low).to(tl.int64), tl.max(b_high).to(tl.int64), tl.sum(b_count)
    while (low < high) & (count != room):
        middle = low + (high - low + 1) // 2
        b_count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, K, BLOCK):
            b_i = candidates_of(ranking, i_e, start + o, K, stride, first_end, last_start)
            b_count += (b_i >= middle.to(tl.int32)).to(tl.int32)
        reach = tl.sum(b_count)
        count = tl.where(reach >= room, reach, count)
        low = tl.where(reach >= room, middle, low)
        high = tl.where(reach >= room, high, middle - 1)
    cut = low.to(tl.int32)
    tie = K + 0
    if count > room:
        b_count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, K, BLOCK):
            b_i = candidates_of(ranking, i_e, start + o, K, stride, first_end, last_start)
            b_count += (b_i == cut).to(tl.int32)
        spare = room - count + tl.sum(b_count)
        seen = 0
        for start in range(0, K, BLOCK):
            b_i = candidates_of(ranking, i_e, start + o, K, stride, first_end, last_start)
            b_same = (b_i == cut).to(tl.int32)
            b_rank = tl.cumsum(b_same, 0) + seen
            tie = tl.minimum(tie, tl.min(tl.where((b_same > 0) & (b_rank == spare), start + o, K)))
            seen += tl.sum(b_same)
    return cut, tie


@triton.jit
def packed_cut(
    inside, places, i_e, chunks, b_above, b_inside, room, held,
    WIDTH: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(cut, last position of the ties taken at it, keys taken per chunk) where ``room`` of the ``held`` candidates
    inside the bracket are taken, at most ``WIDTH`` of a chunk."""
    o_c, o_s = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    o_in = (i_e.to(tl.int64) * chunks + o_c[:, None]) * SLOT + o_s[None, :]
    m_in = (o_c < chunks)[:, None] & (o_s[None, :] < b_inside[:, None])
    b_i = tl.load(inside + o_in, mask=m_in, other=NO_CANDIDATE)
    cut, count = cut_of(b_i, room, held)
    b_same = tl.sum((b_i == cut).to(tl.int32), 1)
    b_taken = b_above + tl.sum((b_i > cut).to(tl.int32), 1)
    tie = count * 0 + 0x7FFFFFFF
    if count > room:
        spare = room - count + tl.sum(b_same)
        b_before = tl.cumsum(b_same, 0) - b_same
        b_rank = tl.cumsum((b_i == cut).to(tl.int32), 1) + b_before[:, None]
        tie = tl.max(tl.load(places + o_in, mask=(b_i == cut) & (b_rank == spare), other=0))
        b_same = tl.minimum(tl.maximum(spare - b_before, 0), b_same)
    return cut, tie, b_taken + b_same


@triton.jit(
    do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share", "size", "share"]
)
def cut_kernel(
    ranking, limits, edges, inside, places, tally, cuts, offsets, counts, K, B, stride, chunks,
    first, first_share, last, last_share, size, share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, SLOT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of the selection rows, ``ROWS`` of a sequence: ``cuts [2, E]`` (cut, last position of the ties at it),
    ``offsets [E, chunks]`` (keys taken before each chunk), ``counts [E]``."""
    i_e = tl.program_id(0)
    E = B * ROWS
    i_q, i_b = i_e % Q, i_e // ROWS
    n, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    room = size_of(n, size, share)
    o_c = tl.arange(0, CHUNKS)
    m_c = o_c < chunks
    p_t = tally + i_e.to(tl.int64) * chunks + o_c
    b_above = tl.load(p_t, mask=m_c, other=0)
    b_inside = tl.load(p_t + E.to(tl.int64) * chunks, mask=m_c, other=0)
    above, held = tl.sum(b_above), tl.sum(b_inside)
    candidates = n - size_of(n, first, first_share) - size_of(n, last, last_share)
    cut, tie = NO_CANDIDATE + 1, K + 0
    b_taken = b_above
    most = tl.max(b_inside)
    bracketed = (room < candidates) & (above < room) & (room <= above + held)
    if bracketed & (most <= SLOT // 2):
        cut, tie, b_taken = packed_cut(
            inside, places, i_e, chunks, b_above, b_inside, room - above, held, SLOT // 2, SLOT, CHUNKS
        )
    elif bracketed & (most <= SLOT):
        cut, tie, b_taken = packed_cut(
            inside, places, i_e, chunks, b_above, b_inside, room - above, held, SLOT, SLOT, CHUNKS
        )
    else:
        if room < candidates:
            cut, tie = whole_cut(ranking, i_e, K, stride, first_end, last_start, room, BLOCK)
        b_taken = tl.zeros([CHUNKS], tl.int32)
        for i_c in range(0, chunks):
            o_k = i_c * CHUNK + tl.arange(0, CHUNK)
            b_v = candidates_of(ranking, i_e, o_k, K, stride, first_end, last_start)
            m = (b_v > cut) | ((b_v == cut) & (o_k <= tie))
            b_taken = tl.where(o_c == i_c, tl.sum((m & (b_v > NO_CANDIDATE)).to(tl.int32)), b_taken)
    tl.store(cuts + i_e, cut)
    tl.store(cuts + E + i_e, tie)
    tl.store(offsets + i_e.to(tl.int64) * chunks + o_c, tl.cumsum(b_taken, 0) - b_taken, mask=m_c)
    tl.store(counts + i_e, tl.sum(b_taken))


@triton.jit(do_not_specialize=["K", "B", "stride", "chunks", "longest", "first", "first_share", "last", "last_share"])
def list_kernel(
    ranking, limits, cuts, offsets, lists, K, B, stride, chunks, longest, first, first_share, last, last_share,
    Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One selection row, one chunk: the positions of what is taken, ``lists [E, longest]``."""
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    i_q, i_b = i_e % Q, i_e // ROWS
    _, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    b_i = candidates_of(ranking, i_e, o_k, K, stride, first_end, last_start)
    cut, tie = tl.load(cuts + i_e), tl.load(cuts + B * ROWS + i_e)
    m = (b_i > NO_CANDIDATE) & ((b_i > cut) | ((b_i == cut) & (o_k <= tie)))
    b_rank = tl.cumsum(m.to(tl.int32), 0) - 1 + tl.load(offsets + i_e.to(tl.int64) * chunks + i_c)
    tl.store(lists + i_e.to(tl.int64) * longest + b_rank, o_k, mask=m)
