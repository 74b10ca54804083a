"""SOCKET's coarse scores: sums of products of float16 probabilities, four of them in 8 bytes, with a bound of the error.

A probability may be off by half a unit of float16, relatively and, next to 0, in absolute terms. All are positive: so a
sum may be off by as much relatively, once it is large beside what is lost next to 0 (``Coarse.least``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

PIECE = 4
"""Bits of a bucket that a look-up takes at most."""
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
def coarse_of(tables: int, planes: int, tau: float) -> Coarse | None:
    """What is precise enough where keys are likely to be cut: at buckets one bit away from the query's, or at sums of
    smaller probabilities where these buckets are too few."""
    near, other = tables * (planes + 1) / 2**planes, math.exp(-2 / tau)
    for half in (True, False):
        coarse = bounds(tables, -(-planes // PIECE), half)
        if other >= 4 * coarse.least and (not half or (planes > PIECE and near > 0.1)):
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


@triton.jit
def products_of(pieces, PIECES: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """The products over ``PIECES`` of four heads in float32; with ``HALF`` the first of two factors are float16."""
    if HALF and PIECES > 1:
        b_0, b_1, b_2, b_3 = two_pieces_of(pieces[0], pieces[1], ASM)
    else:
        b_0, b_1, b_2, b_3 = one_piece_of(pieces[0], ASM)
    if HALF and PIECES == 4:
        b_4, b_5, b_6, b_7 = two_pieces_of(pieces[2], pieces[3], ASM)
        b_0, b_1, b_2, b_3 = b_0 * b_4, b_1 * b_5, b_2 * b_6, b_3 * b_7
    else:
        for i in tl.static_range(2 if HALF else 1, PIECES):
            b_4, b_5, b_6, b_7 = one_piece_of(pieces[i], ASM)
            b_0, b_1, b_2, b_3 = b_0 * b_4, b_1 * b_5, b_2 * b_6, b_3 * b_7
    return b_0, b_1, b_2, b_3


@triton.jit
def one_piece_of(b_x, ASM: tl.constexpr):
    """The four float16 numbers in int64, as float32.

    In Triton's words every number would be shifted to the lower end of its register first, or next to that of another
    key, hence the assembler (not for the interpreter).
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, y; .reg .b16 a, b;
            mov.b64 {x, y}, $4;
            mov.b32 {a, b}, x; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;
            mov.b32 {a, b}, y; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }""",
            "=&f,=&f,=&f,=&f,l",
            [b_x],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        b_0, b_1, b_2, b_3 = halves_of(b_x)
        return b_0.to(tl.float32), b_1.to(tl.float32), b_2.to(tl.float32), b_3.to(tl.float32)


@triton.jit
def two_pieces_of(b_x, b_y, ASM: tl.constexpr):
    """The products of the four float16 numbers in both int64, rounded to float16, as float32."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, y, z, w; .reg .b16 a, b;
            mov.b64 {x, y}, $4; mov.b64 {z, w}, $5;
            mul.rn.f16x2 x, x, z; mul.rn.f16x2 y, y, w;
            mov.b32 {a, b}, x; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;
            mov.b32 {a, b}, y; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }""",
            "=&f,=&f,=&f,=&f,l,l",
            [b_x, b_y],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        b_0, b_1, b_2, b_3 = halves_of(b_x)
        b_4, b_5, b_6, b_7 = halves_of(b_y)
        b_0, b_1, b_2, b_3 = b_0 * b_4, b_1 * b_5, b_2 * b_6, b_3 * b_7
        return b_0.to(tl.float32), b_1.to(tl.float32), b_2.to(tl.float32), b_3.to(tl.float32)


@triton.jit
def halves_of(b_x):
    """The four float16 numbers in int64."""
    b_0, b_1 = b_x.to(tl.int16), (b_x >> 16).to(tl.int16)
    b_2, b_3 = (b_x >> 32).to(tl.int16), (b_x >> 48).to(tl.int16)
    b_0, b_1 = b_0.to(tl.float16, bitcast=True), b_1.to(tl.float16, bitcast=True)
    return b_0, b_1, b_2.to(tl.float16, bitcast=True), b_3.to(tl.float16, bitcast=True)
