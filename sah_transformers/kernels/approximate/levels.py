"""The exact cut of rows by levels: candidates are counted level by level, then those above the cut's level are listed.

A level is a byte that grows with the score; 0 is no candidate. Of scores that are whole numbers (`hash_attention`) a
level holds equal ones: of the cut's level each chunk of keys takes as many as are left for it, the first ones. Other
scores are laid on a line through a sampled bracket of the cut (`line_kernel`, `level_kernel`): the cut's level then
holds half a percent of the keys, its *edge*, which is cut by the scores themselves (`edge_kernel`). A line that misses
makes the edge long, which costs time and nothing else.

``LOGARITHMIC`` (`methods.LOGARITHMIC`, and a group's summed softmax): the line is laid through integer forms, as a
bracket resolves a 512th of what the sample spans, and bent where the sample has the cut. Simulated edges of SOCKET at
131,072 keys: 364 to 1,585 keys (straight 432 to 2,052; through the values up to 127,000), summed 316 to 1,177; on a GPU
some rows had more than 2,048.

Scores may be coarse (SOCKET's, see `coarse.py`): a key has the lowest and the highest level of its exact score, and the
edge all keys that are neither in nor out at any of them. The method makes their scores exact before they are cut.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.best import NO_CANDIDATE, best_of, rankable
from sah_transformers.kernels.approximate.line import order
from sah_transformers.kernels.approximate.rows import between, seen_of
from sah_transformers.kernels.decode.bracket import both
from sah_transformers.kernels.decode.limits import limits_of, size_of

ONES, TOPS = tl.constexpr(0x0101010101010101), tl.constexpr(0x8080808080808080)
ALL, LOWER = tl.constexpr(0xFFFFFFFFFFFFFFFF), tl.constexpr(0x0F0F0F0F0F0F0F0F)
BELOW = tl.constexpr(1)
"""The level of candidates below the bracket; those above it have the highest."""


@triton.jit(do_not_specialize=["K", "B", "stride", "chunks", "first", "first_share", "last", "last_share"])
def level_kernel(
    scores, ranking, limits, stats, lines, levels, histogram, K, B, stride, chunks,
    first, first_share, last, last_share,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    SOFTMAX: tl.constexpr, LOGARITHMIC: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """One selection row, one chunk of keys: their levels, and how many keys each level has. A group's summed
    ``SOFTMAX`` is written to ``ranking [E, stride]``, else this is ``scores``.

    ``ERROR``: scores may be off by this share, negative ones by all that they are above 0 without their sign. A byte
    then holds the lowest level that the exact score may have and, in its upper half, the highest.
    """
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    R = B * H * Q
    E = B * G * Q if SOFTMAX else R
    i_q, i_b = i_e % Q, i_e // (E // B)
    _, first_end, last_start = limits_of(
        limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    middle, below, above = tl.load(lines + i_e), tl.load(lines + E + i_e), tl.load(lines + 2 * E + i_e)
    if SOFTMAX:
        b_v = tl.zeros([CHUNK], tl.float32)
        m_v = between(o_k, first_end, last_start)
        for i_h in range(H // G):
            i_r = (i_e // Q) * (H // G * Q) + i_q + i_h * Q
            b_s = tl.load(scores + i_r.to(tl.int64) * (stride * 16) + o_k, eviction_policy="evict_first")
            m_v = m_v & (b_s != float("-inf"))
            share = 1.0 / tl.maximum(tl.load(stats + R + i_r), 1.0)
            b_v += tl.exp(b_s - tl.load(stats + i_r)) * share
        tl.store(ranking + i_e.to(tl.int64) * (stride * 16) + o_k, b_v, eviction_policy="evict_last")
    else:
        b_v = tl.load(scores + i_e.to(tl.int64) * (stride * 16) + o_k)
        m_v = between(o_k, first_end, last_start) & (b_v != float("-inf"))
    if ERROR > 0:
        b_l = levels_of(b_v * (1.0 - ERROR), m_v, middle, below, above, LOGARITHMIC, BINS)
        b_h = levels_of(tl.abs(b_v) * (1.0 + ERROR), m_v, middle, below, above, LOGARITHMIC, BINS)
        count_levels(b_h, histogram, (i_e + E).to(tl.int64) * chunks + i_c, CHUNK, BINS)
        count_levels(b_l, histogram, i_e.to(tl.int64) * chunks + i_c, CHUNK, BINS)
        p_levels = levels + i_e.to(tl.int64) * (stride * 16) + i_c * CHUNK + tl.arange(0, CHUNK)
        tl.store(p_levels, (b_h << 4 | b_l).to(tl.uint8))
    else:
        b_l = levels_of(b_v, m_v, middle, below, above, LOGARITHMIC, BINS)
        keep_levels(b_l, levels, histogram, i_e, i_c, stride, chunks, CHUNK, BINS)


@triton.jit
def levels_of(b_v, m_v, middle, below, above, LOGARITHMIC: tl.constexpr, BINS: tl.constexpr):
    """The levels of values on a line, straight unless it is ``LOGARITHMIC``, 0 where ``m_v`` is false: int32."""
    if LOGARITHMIC:
        b_x = (order(b_v) - middle.to(tl.int32)).to(tl.float32)
        b_x = b_x * tl.where(b_x > 0, above, below) + (BINS + 1) / 2
    else:
        b_x = b_v * below + ((BINS + 1) / 2 - middle * below)
    b_x = tl.maximum(b_x, BELOW)  # grows with the value, however rounded; NaN is below
    b_x = tl.minimum(b_x, BINS - 1)
    return tl.where(m_v, b_x, 0.0).to(tl.int32)


@triton.jit
def open_row(
    limits, lines, i_e, K, B, first, first_share, last, last_share,
    Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(where the candidates of row ``i_e``, one of as many as the grid is wide, begin and end; the middle of its
    straight line, levels per unit): under way before there are scores."""
    E = tl.num_programs(1)
    _, first_end, last_start = limits_of(
        limits, i_e // (E // B), i_e % Q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED
    )
    return first_end, last_start, tl.load(lines + i_e), tl.load(lines + E + i_e)


@triton.jit
def keep_scores(
    b_s, row, mask, scores, levels, histogram, i_e, i_c, K, B, stride, chunks, sm_b, sm_q, sm_k,
    Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk, levels of the candidates of `open_row` among them, and how many keys each level has."""
    begin, end, middle, slope = row
    o_k = i_c * CHUNK + tl.arange(0, CHUNK)
    tl.store(scores + i_e.to(tl.int64) * (stride * 16) + o_k, b_s, eviction_policy="evict_last")
    i_b = i_e // (tl.num_programs(1) // B)
    m_k = seen_of(mask, i_b, i_e % Q, o_k, begin, end, K, sm_b, sm_q, sm_k, Q, CAUSAL, MASKED)
    b_l = levels_of(b_s, m_k & (b_s != float("-inf")), middle, slope, slope, False, BINS)
    keep_levels(b_l, levels, histogram, i_e, i_c, stride, chunks, CHUNK, BINS)


@triton.jit
def keep_levels(b_l, levels, histogram, i_e, i_c, stride, chunks, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Levels of a chunk to uint8 ``[E, stride]``, their counts to ``[E, chunks, BINS]`` (`count_levels`)."""
    tl.store(levels + i_e.to(tl.int64) * (stride * 16) + i_c * CHUNK + tl.arange(0, CHUNK), b_l.to(tl.uint8))
    count_levels(b_l, histogram, i_e.to(tl.int64) * chunks + i_c, CHUNK, BINS)


@triton.jit
def count_levels(b_l, histogram, i_n, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """How many keys of a chunk have each level to ``[i_n, BINS]``; of 16 levels i and i + 8 to one integer,
    ``[i_n, 8]``."""
    if BINS == 16:
        b_one = tl.full([CHUNK], 1, tl.uint64) << (b_l * 4).to(tl.uint64)
        b_each = tl.sum(tl.reshape(b_one, (CHUNK // 8, 8)), 1)  # at most 8 in four bits
        o_n = tl.arange(0, 8)
        b_each = b_each[None, :] >> (o_n * 4).to(tl.uint64)[:, None]
        b_pair = (b_each & 15).to(tl.int32) | ((b_each >> 32) & 15).to(tl.int32) << 16
        tl.store(histogram + i_n * 8 + o_n, tl.sum(b_pair, 1))
    else:
        tl.store(histogram + i_n * BINS + tl.arange(0, BINS), tl.histogram(b_l, BINS))


@triton.jit
def counts_of(histogram, i_e, chunks, o_c, BINS: tl.constexpr):
    """How many keys of chunks ``o_c`` have each level, ``[CHUNKS, BINS]``; level 0 does not count."""
    o_l = tl.arange(0, BINS)
    EACH: tl.constexpr = 8 if BINS == 16 else BINS
    p_n = histogram + (i_e.to(tl.int64) * chunks + o_c[:, None]) * EACH + (o_l % EACH)[None, :]
    b_n = tl.load(p_n, mask=(o_c < chunks)[:, None] & (o_l > 0)[None, :], other=0)
    return (b_n >> (o_l // 8 * 16)[None, :]) & 0xFFFF if BINS == 16 else b_n


@triton.jit
def least(one, two, three, other_one, other_two, other_three):
    return tl.minimum(one, other_one), tl.minimum(two, other_two), tl.minimum(three, other_three)


@triton.jit(do_not_specialize=["K", "B", "chunks", "first", "first_share", "last", "last_share", "size", "share"])
def level_cut_kernel(
    histogram, limits, cuts, offsets, counts, K, B, chunks, first, first_share, last, last_share, size, share,
    Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, EDGES: tl.constexpr,
    COARSE: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One of the selection rows, ``ROWS`` of a sequence.

    ``cuts [5, E]``: the lowest level that is taken as a whole, the lowest of which any is taken (the same or one less,
    the cut's level), keys above, keys left for the cut's level, keys that it has. ``offsets [2, E, chunks]``: listed
    keys before each chunk and, with ``EDGES``, keys of the edge before it, else how many of the cut's level it takes.
    ``counts [E]``.

    ``COARSE``: keys have a lowest and a highest level (``ERROR`` of `level_kernel`). At a level that so few keys may
    reach that all are taken, those that surely do are taken as a whole; below a level that enough keys surely reach,
    keys are out. The edge is what is left.
    """
    i_e = tl.program_id(0)
    E = B * ROWS
    i_q, i_b = i_e % Q, i_e // ROWS
    n, _, _ = limits_of(limits, i_b, i_q, B, K, first, first_share, last, last_share, Q, CAUSAL, MASKED)
    room = size_of(n, size, share)
    o_c, o_l = tl.arange(0, CHUNKS), tl.arange(0, BINS)
    m_c = o_c < chunks
    b_n = counts_of(histogram, i_e, chunks, o_c, BINS)
    b_sure = tl.cumsum(tl.sum(b_n, 0), 0, reverse=True)  # keys of this level and above
    if COARSE:
        b_most = counts_of(histogram, i_e + E, chunks, o_c, BINS)
        b_reach = tl.cumsum(tl.sum(b_most, 0), 0, reverse=True)
        b_full = b_sure >= room
    else:
        b_most, b_reach = b_n, b_sure
        b_full = b_reach > room
    b_fits = b_reach <= room
    whole, above, more = tl.reduce(
        (tl.where(b_fits, o_l, BINS), tl.where(b_fits, -b_sure, 0), tl.where(b_full, b_reach, 0x7FFFFFFF)), 0, least
    )
    whole, above = tl.maximum(whole, 1), -above
    at = tl.where(more < 0x7FFFFFFF, more - above, 0)
    spare = tl.minimum(room - above, at)
    below = tl.max(tl.where(b_full, o_l, 0)) if COARSE else whole - 1
    edge = tl.where(spare > 0, below, whole)
    b_above = tl.where(o_l[None, :] >= whole, b_n, 0)
    b_edge = tl.where(o_l[None, :] >= edge, b_most, 0)
    b_above, b_edge = tl.reduce((b_above, b_edge), 1, both)
    b_edge -= b_above
    b_before, b_same = tl.associative_scan((b_above, b_edge), 0, both)
    b_before, b_same = b_before - b_above, b_same - b_edge
    if not EDGES:
        b_before += tl.minimum(b_same, spare)
        b_same = tl.minimum(tl.maximum(spare - b_same, 0), b_edge)
    o_out = i_e.to(tl.int64) * chunks + o_c
    tl.store(offsets + o_out, b_before, mask=m_c)
    tl.store(offsets + E.to(tl.int64) * chunks + o_out, b_same, mask=m_c)
    tl.store(counts + i_e, above + spare)
    tl.store(cuts + i_e, whole)
    tl.store(cuts + E + i_e, edge)
    tl.store(cuts + 2 * E + i_e, above)
    tl.store(cuts + 3 * E + i_e, spare)
    tl.store(cuts + 4 * E + i_e, at)


@triton.jit
def at_least(b_x, level):
    """The top bit of each byte of uint64 ``b_x`` that is ``level`` (0 to 255) or more."""
    level = level.to(tl.uint64) * ONES
    b_rest = (b_x | TOPS) - (level & (TOPS - ONES))
    return ((b_x & (level ^ ALL)) | ((b_x ^ level ^ ALL) & b_rest)) & TOPS


@triton.jit(do_not_specialize=["stride", "chunks", "wide", "longest"])
def level_list_kernel(
    levels, cuts, offsets, lists, stride, chunks, wide, longest, EDGES: tl.constexpr, COARSE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One selection row, one chunk: the positions of what is taken, to ``lists [E, wide]``, ascending; with ``EDGES``
    without the cut's level, whose keys go behind ``longest``.

    Eight levels at once: ``b_count`` and ``b_sums`` hold in each byte keys above, and in its upper half keys of the
    cut's level.
    """
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    E = tl.num_programs(1)
    p_levels = (levels + i_e.to(tl.int64) * (stride * 16)).to(tl.pointer_type(tl.uint64))
    o_w = i_c * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
    b_x = tl.load(p_levels + o_w)
    p_offset = offsets + i_e.to(tl.int64) * chunks + i_c
    before, other = tl.load(p_offset), tl.load(p_offset + E.to(tl.int64) * chunks)
    if COARSE:  # the highest levels are in the upper halves
        b_above = at_least(b_x & LOWER, tl.load(cuts + i_e))
        b_edge = at_least(b_x, tl.minimum(tl.load(cuts + E + i_e), 15) * 16) ^ b_above
    else:
        b_above = at_least(b_x, tl.load(cuts + i_e))
        b_edge = at_least(b_x, tl.load(cuts + E + i_e)) ^ b_above
    b_count = (b_above >> 7) | (b_edge >> 3)
    b_sums = b_count * ONES  # of a byte and those before it
    b_all = (b_sums >> 56).to(tl.int32)
    b_all = (b_all & 15) | (b_all >> 4 << 16)
    b_before = tl.cumsum(b_all, 0) - b_all  # both in one sum
    b_above, b_edge = (b_before & 0xFFFF) + before - 1, b_before >> 16
    p_list = lists + i_e.to(tl.int64) * wide
    for i in tl.static_range(8):
        b_i, b_sum = (b_count >> (8 * i)).to(tl.int32), (b_sums >> (8 * i)).to(tl.int32) & 0xFF
        b_out, b_same = b_above + (b_sum & 15), b_edge + (b_sum >> 4)
        if EDGES:
            m = (b_i & 17) != 0
            b_out = tl.where((b_i & 1) != 0, b_out, longest + other - 1 + b_same)
        else:
            m = ((b_i & 1) != 0) | (((b_i & 16) != 0) & (b_same <= other))
            b_out += tl.minimum(b_same, other)
        tl.store(p_list + b_out, o_w * 8 + i, mask=m)


@triton.jit
def edge_keys(p_edge, p_v, o, at):
    """(positions, sortable values) of keys ``o`` of an edge that has ``at``."""
    b_k = tl.load(p_edge + o, mask=o < at, other=0)
    return b_k, rankable(tl.load(p_v + b_k, mask=o < at, other=0.0), o < at)


@triton.jit
def long_cut(p_edge, p_v, at, room, BLOCK: tl.constexpr):
    """(cut, how many of the keys that equal it are taken) of an edge that is read again and again; ``room < at``."""
    o = tl.arange(0, BLOCK)
    b_low, b_high = tl.full([BLOCK], 0x7FFFFFFF, tl.int32), tl.full([BLOCK], NO_CANDIDATE, tl.int32)
    for start in range(0, at, BLOCK):
        _, b_i = edge_keys(p_edge, p_v, start + o, at)
        b_low = tl.minimum(b_low, tl.where(b_i > NO_CANDIDATE, b_i, 0x7FFFFFFF))
        b_high = tl.maximum(b_high, b_i)
    low, high = tl.min(b_low).to(tl.int64), tl.max(b_high).to(tl.int64)
    more = 0  # keys above the cut
    while low < high:
        middle = low + (high - low + 1) // 2
        b_count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, at, BLOCK):
            _, b_i = edge_keys(p_edge, p_v, start + o, at)
            b_count += (b_i >= middle.to(tl.int32)).to(tl.int32)
        reach = tl.sum(b_count)
        more = tl.where(reach >= room, more, reach)
        low = tl.where(reach >= room, middle, low)
        high = tl.where(reach >= room, high, middle - 1)
    return low.to(tl.int32), room - more


@triton.jit(do_not_specialize=["stride", "wide", "longest"])
def edge_kernel(ranking, cuts, lists, stride, wide, longest, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One selection row: the best keys of its edge, the lower position first among equals, behind those listed."""
    i_e = tl.program_id(0)
    E = tl.num_programs(0)
    above, room, at = tl.load(cuts + 2 * E + i_e), tl.load(cuts + 3 * E + i_e), tl.load(cuts + 4 * E + i_e)
    p_list = lists + i_e.to(tl.int64) * wide
    p_v = ranking + i_e.to(tl.int64) * (stride * 16)
    o = tl.arange(0, WIDTH)
    b_edge = tl.load(p_list + longest + o, mask=o < wide - longest, other=0)  # before it is known how many there are
    p_edge, p_list = p_list + longest, p_list + above
    if (room > 0) & (at <= WIDTH):
        m = best_of(rankable(tl.load(p_v + b_edge, mask=o < at, other=0.0), o < at), room, at)
        tl.store(p_list + tl.cumsum(m.to(tl.int32), 0) - 1, b_edge, mask=m)
    elif room > 0:
        cut, ties = long_cut(p_edge, p_v, at, room, BLOCK)
        taken, same = 0, 0
        for start in range(0, at, BLOCK):
            b_k, b_i = edge_keys(p_edge, p_v, start + tl.arange(0, BLOCK), at)
            b_same = (b_i == cut).to(tl.int32)
            m = (b_i > cut) | ((b_same > 0) & (tl.cumsum(b_same, 0) + same <= ties))
            tl.store(p_list + taken + tl.cumsum(m.to(tl.int32), 0) - 1, b_k, mask=m)
            taken += tl.sum(m.to(tl.int32))
            same += tl.sum(b_same)
