"""SOCKET's coarse scores, of probabilities in float16, with a bound of their error, and the exact ones of a row's edge.

A probability may be off by half a unit of float16, relatively and, next to 0, in absolute terms. All are positive: so a
sum of products is off by a few such units, relatively, once it is large beside what is lost next to 0
(``Coarse.least``). Smaller sums are known to be small, no more. Levels take both into account (`levels.level_kernel`):
the keys that are selected are those of exact scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from sah_transformers.kernels.approximate.buckets import buckets_of, piece_of

ROUNDING, SMALLEST = 2.0**-11, 2.0**-25
"""What rounding to float16 changes: relatively, and of numbers next to 0."""
TINY, MOST = tl.constexpr(2.0**-100), tl.constexpr(3.4028234663852886e38)


@dataclass(frozen=True)
class Coarse:
    """How coarse scores are made.

    Attributes:
        half: whether pairs of pieces are multiplied in float16, which saves a fifth of the instructions.
        scale: probabilities are multiplied by ``2**scale``.
        error: how far scores may be off, relatively; least: of sums from here on, before they meet a norm.
    """

    half: bool
    scale: int
    error: float
    least: float


@lru_cache(maxsize=64)
def coarse_of(tables: int, planes: int, pieces: int, tau: float) -> Coarse | None:
    """What is precise enough where keys are likely to be cut: at buckets one bit away from the query's, or at sums of
    smaller probabilities where these buckets are too few."""
    near, other = tables * (planes + 1) / 2**planes, math.exp(-2 / tau)
    for half in (True, False):
        coarse = bounds(tables, pieces, half)
        if other >= 4 * coarse.least and (not half or (pieces > 1 and near > 0.1)):
            return coarse
    return None


def bounds(tables: int, pieces: int, half: bool) -> Coarse:
    """The bounds of sums over ``tables`` of products of ``pieces``."""
    scale, lost = (7, 2.0**-8) if half else (15, 2.0**-11)
    pairs = pieces // 2 if half else 0
    missing = 1.01 * tables * (pieces * SMALLEST / 2**scale + pairs * SMALLEST / 4**scale)
    in_float32 = 2.0**-24 * (2 * tables + 32)  # of coarse and exact sums, and of the bounds themselves
    return Coarse(half, scale, (1 + lost) * (1 + in_float32) / (1 - ROUNDING) ** (pieces + pairs) - 1, missing / lost)


def numbers_of(coarse: Coarse | None) -> dict[str, Any]:
    """Compile-time constants of the score kernel."""
    if coarse is None:
        return {"LEAST": 0.0, "SCALE": 0, "HALF": False}
    return {"LEAST": coarse.least, "SCALE": coarse.scale, "HALF": coarse.half}


@triton.jit
def coarse_score(b_s, b_norm, LEAST: tl.constexpr):
    """``b_s * b_norm``, finite; with a minus sign what may be any smaller number."""
    b_v = tl.maximum(b_s, LEAST) * b_norm
    m_sure = (b_s >= LEAST) & (b_v >= TINY)
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
    p_words = words + i_b.to(tl.int64) * (sw_b * UNIT) + i_g.to(tl.int64) * (sw_g * UNIT)
    p_norm = norm + i_b.to(tl.int64) * (sn_b * UNIT) + i_g.to(tl.int64) * (sn_g * UNIT)
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
