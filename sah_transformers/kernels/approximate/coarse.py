"""SOCKET's coarse scores, of probabilities with 8 binary digits, and the exact ones of a row's edge.

All probabilities are positive: so a sum of products of a few is off by as many times their error, relatively. Levels
take this into account (`levels.level_kernel`): the keys that are selected are those of exact scores.
"""

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.buckets import buckets_of, piece_of

LEAST_TAU = 0.1
"""Below, sums may be too small for a bound: those of buckets four bits and more away from the query's."""
TINY, MOST = tl.constexpr(2.0**-100), tl.constexpr(3.4028234663852886e38)


def error_of(tables: int, pieces: int) -> float:
    """How far sums over ``tables`` of products of ``pieces`` may be off, relatively, from ``TINY`` on."""
    in_float32 = 2.0**-24 * (8 * tables + 32)  # of coarse and exact sums, of small numbers, of the bounds themselves
    return (1 + in_float32) / (1 - 2.0**-8) ** pieces - 1


@triton.jit
def coarse_score(b_s, b_norm):
    """``b_s * b_norm``, finite; with a minus sign what may be any smaller number."""
    b_v = tl.maximum(b_s, TINY) * b_norm
    m_sure = (b_s >= TINY) & (b_v >= TINY)
    b_v = tl.minimum(tl.maximum(b_v, TINY), MOST)
    return tl.where(m_sure, b_v, -b_v)


@triton.jit(do_not_specialize=["stride", "wide", "longest", "sw_b", "sw_g", "sw_w", "sn_b", "sn_g"])
def settle_kernel(
    words, norm, table, scores, cuts, lists, stride, wide, longest, sw_b, sw_g, sw_w, sn_b, sn_g,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr, ROOM: tl.constexpr,
    STEP: tl.constexpr, NORM_STEP: tl.constexpr, UNIT: tl.constexpr, RUNS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row, every ``tl.num_programs(0)``-th ``BN`` keys of its edge: their exact scores."""
    PIECE_ROOM: tl.constexpr = (AT_ONCE + 1) // 2 * 2 ** (BITS + 1)
    i_e = tl.program_id(1)
    E = tl.num_programs(1)
    i_b, i_h, i_q = i_e // (H * Q), i_e // Q % H, i_e % Q
    i_g, i_own = i_h // (H // G), i_h % (H // G)
    i_owner = ((i_b * G + i_g) * Q + i_q) * (H // G // AT_ONCE) + i_own // AT_ONCE
    i_one = i_own % AT_ONCE
    p_words = words + i_b.to(tl.int64) * sw_b * UNIT + i_g.to(tl.int64) * (sw_g * UNIT)
    p_norm = norm + i_b.to(tl.int64) * sn_b * UNIT + i_g.to(tl.int64) * (sn_g * UNIT)
    p_table = table + i_owner.to(tl.int64) * (L * ROOM) + i_one // 2 * 2 ** (BITS + 1) + i_one % 2
    p_list = lists + i_e.to(tl.int64) * wide + longest
    at = tl.where(tl.load(cuts + 3 * E + i_e) > 0, tl.load(cuts + 4 * E + i_e), 0)
    o = tl.arange(0, RUNS * BN)  # neighbouring threads have neighbouring keys: they look up in the same lines of memory
    for start in range(tl.program_id(0) * BN, at, tl.num_programs(0) * BN):
        o_k = start + tl.arange(0, BN)
        b_k = tl.load(p_list + o_k, mask=o_k < at, other=0).to(tl.int64)
        m = start + o % BN < at
        p_key = p_words + tl.load(p_list + start + o % BN, mask=m, other=0).to(tl.int64) * STEP
        b_s = tl.zeros([RUNS * BN], tl.float32)
        for first in range(0, L, RUNS * RUN):
            o_l = first + o // BN * RUN
            m_l = m & (o_l < L)
            b_bits = buckets_of(p_key, m_l, o_l, sw_w, PLANES, WORDS)
            for i_run in tl.static_range(RUN):
                p_l = p_table + (o_l + i_run) * ROOM
                b_e = piece_of(b_bits >> (i_run * PLANES), 0, PLANES, BITS)
                b_p = tl.load(p_l + 2 * b_e, mask=m_l, other=0.0)
                for i_p in tl.static_range(1, PIECES):
                    b_e = piece_of(b_bits >> (i_run * PLANES), i_p * BITS, PLANES, BITS)
                    b_p = b_p * tl.load(p_l + i_p * PIECE_ROOM + 2 * b_e, mask=m_l, other=0.0)
                b_s += b_p
        b_norm = tl.load(p_norm + b_k * NORM_STEP, mask=o_k < at, other=0.0)
        b_s = tl.sum(tl.reshape(b_s, [RUNS, BN]), 0) * b_norm
        tl.store(scores + i_e.to(tl.int64) * (stride * 16) + b_k, b_s, mask=o_k < at)
