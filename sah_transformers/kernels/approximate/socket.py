"""SOCKET: per table the probability of a key's bucket, a product of look-ups in tables made once per row.

A bucket's K bits are cut into pieces of at most ``PIECE`` bits, each with a table of its probabilities: no more than
16 numbers for four bits, one per bank, so that a look-up of a warp takes one turn of the load unit. ``summed``, where
``2**K <= FULL``, has one table of all buckets per hash table instead, the heads summed: one look-up for all of them.

L=60, K=12: 96 bytes read per key and KV head, 4 written per query head; per key, table and KV head 34 instructions,
12 of them look-ups. 118 MB are 39 us, the look-ups 106 us of the load units, the instructions 82 us: **105 to 125
us**, above the 95 of a trial; what could be less is the number of look-ups (5 + 5 bits and a choice among four: 71 us
of look-ups, 95 of instructions). ``summed``: 8 instructions per key and table, one look-up among 4,096 numbers (8
turns): 70 us, **75 to 85 us**. The tables take 4 to 6 us.

A key's words should lie apart (``buckets`` a view ``[B, G, capacity, words]`` of ``[B, G, words, capacity]``): then a
warp reads 128 bytes in a row, and does not touch 23 lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate import launch as shared
from sah_transformers.kernels.approximate.launch import Scoring, Tile, steps, unit_of
from sah_transformers.kernels.approximate.place import Direct, Span, many, programs_of
from sah_transformers.kernels.approximate.rows import end_of, rows_of
from sah_transformers.kernels.decode.chain import follow
from sah_transformers.kernels.decode.score import close_tally, keep_tile, open_tally
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.device import no_kernels
from sah_transformers.maskers.socket import SocketMaskerConfig, hyperplanes, pack, snap

TILES = (Tile(512, 1, 4), Tile(256, 1, 4), Tile(1024, 1, 8), Tile(512, 1, 8), Tile(1024, 1, 4), Tile(2048, 1, 16))
PIECE = 4
FULL = 2**12
MOST_HEADS = 8
"""Rows of a program: their sums stay in registers."""


@dataclass(frozen=True)
class Given(shared.Given):
    """Hyperplanes, float32 ``[L, K, D]``, contiguous (of ``socket.hyperplanes``, which float32 holds exactly); tau."""

    planes: torch.Tensor
    tau: float


@lru_cache(maxsize=1024)
def given_of(config: SocketMaskerConfig, layer_idx: int, dim: int, device: torch.device) -> Given:
    """What the kernels need of a masker."""
    return Given(hyperplanes(layer_idx, config.L, config.K, dim, device).float(), config.tau)


def why_not(given: Given, dim: int) -> str:
    """Why these kernels cannot take the method, or ""."""
    return ""


def cut(call: Scoring, given: Given) -> tuple[bool, int, int]:
    """(whether one table serves all heads, bits of a piece, pieces)."""
    planes = given.planes.shape[1]
    if call.summed and 2**planes <= FULL:
        return True, planes, 1
    pieces = -(-planes // PIECE)
    return False, -(-planes // pieces), pieces


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Given) -> dict[str, tuple[int, torch.dtype]]:
    full, bits, pieces = cut(call, given)
    rows = call.q.shape[0] * call.groups * call.q.shape[2] if full else call.rows
    return {"table": (rows * given.planes.shape[0] * pieces * 2**bits, torch.float32)}


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]) -> None:
    """Probabilities of pieces of buckets, float32 ``[R, L, pieces, 2**bits]``, or of buckets, ``[B*G*Q, L, 2**K]``."""
    full, bits, pieces = cut(call, given)
    batch, heads, rows, dim = call.q.shape
    tables, planes, _ = given.planes.shape
    shape = {"H": heads, "G": call.groups, "Q": rows, "L": tables, "K": planes, "D": dim, "BD": power_of_2(dim)}
    kernel, grid = (buckets_kernel, (tables, batch * call.groups * rows, 1)) if full else (
        pieces_kernel, (tables, call.rows, 1)
    )  # fmt: skip
    cuts = {"LOW": planes // 2} if full else {"BITS": bits, "PIECES": pieces}
    launch(
        kernel, grid, launch.address(call.q), launch.address(given.planes), s["table"], *call.q.stride()[:3],
        2.0 / given.tau, **shape, **cuts, warps=4 if full else 1,
    )  # fmt: skip


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], tile: Tile
) -> None:
    full, bits, pieces = cut(call, given)
    tables, planes, _ = given.planes.shape
    words, norm = side["buckets"], side["norm"]
    unit = unit_of(words, norm)
    heads = 1 if full else call.q.shape[1] // call.groups
    at_once = heads if call.summed else max(n for n in range(1, min(MOST_HEADS, heads) + 1) if heads % n == 0)
    launch(
        bucket_score_kernel,
        (call.stride // tile.span, call.q.shape[0] * call.groups, call.q.shape[2] * (heads // at_once)),
        launch.address(words), launch.address(norm), s["table"], *call.arrays(), *call.numbers(tile),
        *steps(words, unit), words.stride(3), *steps(norm, unit),
        **call.shape(), L=tables, PLANES=planes, WORDS=words.shape[3], RUN=run_of(tables, planes),
        BITS=bits, PIECES=pieces, HEADS=heads, AT_ONCE=at_once, SUM=call.summed,
        STEP=words.stride(2), NORM_STEP=norm.stride(2), UNIT=unit, BN=tile.keys, COUNT=tile.count, warps=tile.warps,
    )  # fmt: skip


def run_of(tables: int, planes: int) -> int:
    """Tables whose bits two neighbouring words always hold, from the word on where the first begins."""
    fits = [1]
    for run in range(2, 9):
        begin = run * planes  # a run begins at a multiple of this, modulo the word
        apart = begin & -begin if begin % 32 else 32
        if tables % run == 0 and begin + 32 - min(32, apart) <= 64:
            fits.append(run)
    return fits[-1]


def levels(call: Scoring, given: Given) -> int:
    """0: scores are no whole numbers."""
    return 0


def append(
    buffers: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, span: Span, given: Given
) -> None:
    """Buckets of ``keys [B, G, K, D]`` and norms of ``values [B, G, K, Dv]`` in ``span`` into ``buffers``.

    Buckets are the masker's, as every sum is exact. A norm's squares are summed in float64 in an order of their own,
    which float32 shows only where a square root lies within 1e-16 of the middle between two of its numbers.
    """
    words, norm = buffers["buckets"], buffers["norm"]
    batch, groups, _, dim = keys.shape
    tables, planes, _ = given.planes.shape
    if not isinstance(span, torch.Tensor) and (many(span) or no_kernels(keys)):
        flat = given.planes.double().flatten(0, 1).transpose(0, 1)
        step = max(1, 2**24 // max(1, batch * groups * flat.shape[1]))
        for begin in range(*span, step):
            part = slice(begin, min(begin + step, span[1]))
            words[:, :, part] = pack(snap(keys[:, :, part]) @ flat >= 0)
        new = values[:, :, slice(*span)]
        norm[:, :, slice(*span)] = torch.linalg.vector_norm(new, dim=-1, dtype=torch.float64).float()
        return
    launch = Direct()
    start, n = programs_of(launch, span)
    launch(
        bucket_kernel, (groups * words.shape[3], batch * n, 1),
        keys, values, given.planes, words, norm, start, n,
        *keys.stride()[:3], *values.stride()[:3], *words.stride(), *norm.stride(),
        G=groups, WORDS=words.shape[3], BITS=tables * planes, D=dim, DV=values.shape[3],
        POINT=isinstance(span, torch.Tensor), BD=power_of_2(dim), BV=power_of_2(values.shape[3]), warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "span", "n", "sk_b", "sk_g", "sk_n", "sv_b", "sv_g", "sv_n", "sw_b", "sw_g", "sw_n", "sw_w", "sn_b", "sn_g",
        "sn_n",
    ]
)  # fmt: skip
def bucket_kernel(
    keys, values, planes, words, norm, span, n, sk_b, sk_g, sk_n, sv_b, sv_g, sv_n, sw_b, sw_g, sw_n, sw_w,
    sn_b, sn_g, sn_n,
    G: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, POINT: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One word, each of ``n`` programs for every ``n``-th key of the span; the first word's program has the norm too.

    32 signs of sums of whole numbers in float64.
    """
    i_gw, i_bn = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_bn // n).to(tl.int64), i_bn % n
    i_g, i_w = (i_gw // WORDS).to(tl.int64), i_gw % WORDS
    o_d = tl.arange(0, BD)
    begin = tl.load(span) if POINT else span
    end = tl.load(span + 1) if POINT else span + n
    for i_k in tl.range(begin + i_n, end, n):
        i_key = tl.cast(i_k, tl.int64)
        b_x = tl.load(keys + i_b * sk_b + i_g * sk_g + i_key * sk_n + o_d, mask=o_d < D, other=0.0)
        b_x = b_x.to(tl.float64)
        b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)  # neither NaN nor Inf
        largest = tl.max(tl.abs(b_x))
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) + 1 - 30
        unit = tl.where(largest > 0, (exponent << 52).to(tl.float64, bitcast=True), 1.0)
        b_x = (b_x / unit + 6755399441055744.0) - 6755399441055744.0  # whole, to even
        o_p = i_w * 32 + tl.arange(0, 32)
        p_plane = planes + o_p[:, None] * D + o_d[None, :]
        b_w = tl.load(p_plane, mask=(o_p < BITS)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float64)
        b_bit = ((tl.sum(b_w * b_x[None, :], 1) >= 0) & (o_p < BITS)).to(tl.int32) << tl.arange(0, 32)
        tl.store(words + i_b * sw_b + i_g * sw_g + i_key * sw_n + i_w * sw_w, tl.sum(b_bit))
        if i_w == 0:
            o_v = tl.arange(0, BV)
            b_v = tl.load(values + i_b * sv_b + i_g * sv_g + i_key * sv_n + o_v, mask=o_v < DV, other=0.0)
            b_v = b_v.to(tl.float64)
            tl.store(norm + i_b * sn_b + i_g * sn_g + i_key * sn_n, tl.sqrt(tl.sum(b_v * b_v)).to(tl.float32))


@triton.jit
def chance(b_q, p_planes, i_p, o_d, sharpness, D: tl.constexpr):
    """(probability that the query falls on the + side of plane ``i_p``, that of the other): float64."""
    b_w = tl.load(p_planes + i_p * D + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    projected = tl.minimum(tl.maximum(tl.sum(b_w * b_q), -20.0), 20.0)  # beyond, tanh is 1 in float64
    grown = tl.exp(2.0 * projected)
    logit = (grown - 1.0) / (grown + 1.0) * sharpness
    other = 1.0 / (1.0 + tl.exp(logit))
    return 1.0 / (1.0 + tl.exp(-logit)), other


@triton.jit
def corners(b_q, p_planes, FIRST: tl.constexpr, BITS: tl.constexpr, o_d, sharpness, D: tl.constexpr):
    """Probabilities ``[2**BITS]`` of the corners of ``BITS`` planes from ``FIRST`` on; bit p of a corner for + in p."""
    o_e = tl.arange(0, 2**BITS)
    b_p = tl.full([2**BITS], 1.0, tl.float64)
    for i_p in tl.static_range(BITS):
        plus, minus = chance(b_q, p_planes, FIRST + i_p, o_d, sharpness, D)
        b_p = b_p * tl.where((o_e >> i_p) & 1 != 0, plus, minus)
    return b_p


@triton.jit(do_not_specialize=["sharpness"])
def pieces_kernel(
    q, planes, table, sq_b, sq_h, sq_q, sharpness,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, CHAINED: tl.constexpr = False,
):  # fmt: skip
    """The pieces of one hash table for one row; a last piece of fewer bits fills the beginning of its table."""
    follow(CHAINED)
    i_l, i_r = tl.program_id(0), tl.program_id(1)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    o_d = tl.arange(0, BD)
    b_q = tl.load(q + i_b.to(tl.int64) * sq_b + i_h * sq_h + i_q * sq_q + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    p_planes = planes + i_l * (K * D)
    p_table = table + (i_r.to(tl.int64) * L + i_l) * (PIECES * 2**BITS)
    for i in tl.static_range(PIECES):
        b_p = corners(b_q, p_planes, i * BITS, min(BITS, K - i * BITS), o_d, sharpness, D)
        tl.store(p_table + i * 2**BITS + tl.arange(0, 2 ** min(BITS, K - i * BITS)), b_p.to(tl.float32))


@triton.jit(do_not_specialize=["sharpness"])
def buckets_kernel(
    q, planes, table, sq_b, sq_h, sq_q, sharpness,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, LOW: tl.constexpr, CHAINED: tl.constexpr = False,
):  # fmt: skip
    """All buckets of one hash table for one KV head and query, the heads summed."""
    follow(CHAINED)
    i_l, i_e = tl.program_id(0), tl.program_id(1)
    i_b, i_g, i_q = i_e // (G * Q), i_e // Q % G, i_e % Q
    o_d = tl.arange(0, BD)
    p_planes = planes + i_l * (K * D)
    b_sum = tl.zeros([2 ** (K - LOW), 2**LOW], tl.float32)
    for i in tl.range(0, H // G):
        p_q = q + i_b.to(tl.int64) * sq_b + (i_g * (H // G) + i) * sq_h + i_q * sq_q
        b_q = tl.load(p_q + o_d, mask=o_d < D, other=0.0).to(tl.float64)
        b_low = corners(b_q, p_planes, 0, LOW, o_d, sharpness, D).to(tl.float32)
        b_high = corners(b_q, p_planes, LOW, K - LOW, o_d, sharpness, D).to(tl.float32)
        b_sum += b_high[:, None] * b_low[None, :]
    o_e = tl.arange(0, 2 ** (K - LOW))[:, None] * 2**LOW + tl.arange(0, 2**LOW)[None, :]
    tl.store(table + (i_e.to(tl.int64) * L + i_l) * 2**K + o_e, b_sum)


@triton.jit
def none():
    """No tensors: what ``more`` begins with."""
    return ()


@triton.jit
def more(tensors, b_x):
    """``tensors`` and one more; a tuple stays in registers, and loops may carry it."""
    return tensors + (b_x,)  # noqa: RUF005 (Triton does not unpack)


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "sw_b", "sw_g",
        "sw_w", "sn_b", "sn_g",
    ]
)  # fmt: skip
def bucket_score_kernel(
    words, norm, table, mask, limits, lines, scores, histogram, peaks, aboves, masses,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sw_b, sw_g, sw_w, sn_b, sn_g,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, L: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
    SUM: tl.constexpr, STEP: tl.constexpr, NORM_STEP: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr,
    COUNT: tl.constexpr, CHAINED: tl.constexpr = False,
):  # fmt: skip
    """One KV head and query, ``AT_ONCE`` of ``HEADS`` tables' owners, ``COUNT * BN`` keys.

    A thread has all heads of its keys, so that a bucket is cut out of the words once; ``RUN`` tables share two words.
    """
    follow(CHAINED)
    i_c, i_bg, i_o = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_g, i_q, i_first = i_bg // G, i_bg % G, i_o % Q, i_o // Q * AT_ONCE
    ROWS: tl.constexpr = 1 if SUM else AT_ONCE
    IN_GROUP: tl.constexpr = Q if SUM else H // G * Q
    TABLE: tl.constexpr = PIECES * 2**BITS
    p_words = words + i_b.to(tl.int64) * (sw_b * UNIT) + i_g.to(tl.int64) * (sw_g * UNIT)
    p_norm = norm + i_b.to(tl.int64) * (sn_b * UNIT) + i_g.to(tl.int64) * (sn_g * UNIT)
    p_table = table + ((i_bg * HEADS + i_first) * Q + i_q).to(tl.int64) * (L * TABLE)
    R = B * G * IN_GROUP
    tallies = none()
    for i_h in tl.static_range(ROWS):
        o_m = (i_first + i_h) * Q + i_q + tl.arange(0, 1)
        tallies = more(tallies, open_tally(lines, i_bg * IN_GROUP + o_m, o_m >= 0, R, MASSES, BINS, 1, BN))
    for i_t in tl.range(0, COUNT):
        o_k = (i_c * COUNT + i_t) * BN + tl.arange(0, BN)
        m_k = o_k < end_of(K, UNIT)
        p_key = p_words + o_k.to(tl.int64) * STEP
        sums = none()
        for _ in tl.static_range(AT_ONCE):
            sums = more(sums, tl.zeros([BN], tl.float32))
        for i_l in tl.range(0, L, RUN):
            begin = i_l * PLANES
            i_w = begin // 32
            b_bits = tl.load(p_key + i_w * sw_w, mask=m_k, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
            b_more = tl.load(p_key + tl.minimum(i_w + 1, WORDS - 1) * sw_w, mask=m_k, other=0)
            b_bits = (b_bits | (b_more.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)) >> (begin % 32)
            for i_run in tl.static_range(RUN):
                pieces = none()
                for i_p in tl.static_range(PIECES):
                    b_e = (b_bits >> (i_run * PLANES + i_p * BITS)).to(tl.int32)
                    b_e = b_e & (2 ** min(BITS, PLANES - i_p * BITS) - 1)
                    p_e = p_table + (i_l + i_run) * TABLE + b_e + i_p * 2**BITS
                    pieces = more(pieces, p_e)
                grown = none()
                for i_h in tl.static_range(AT_ONCE):
                    b_p = tl.load(pieces[0] + i_h * (Q * L * TABLE))
                    for i_p in tl.static_range(1, PIECES):
                        b_p = b_p * tl.load(pieces[i_p] + i_h * (Q * L * TABLE))
                    grown = more(grown, sums[i_h] + b_p)
                sums = grown
        b_norm = tl.load(p_norm + o_k.to(tl.int64) * NORM_STEP, mask=m_k, other=0.0)
        kept = none()
        for i_h in tl.static_range(ROWS):
            b_s = sums[i_h]
            if SUM:
                for i in tl.static_range(1, AT_ONCE):
                    b_s = b_s + sums[i]
            b_s = (b_s * b_norm)[None, :]
            o_m = (i_first + i_h) * Q + i_q + tl.arange(0, 1)
            o_q, o_r, m_m, first_end, last_start, reach = rows_of(
                limits, i_bg, o_m, B, K, first, first_share, last, last_share, IN_GROUP, G, Q, CAUSAL, MASKED
            )
            b_peak, b_one, b_two, scale, offset = tallies[i_h]
            b_peak, b_one, b_two = keep_tile(
                b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach,
                first_end, last_start, K, stride, sm_b, sm_q, sm_k, Q, MASKED, MASSES, BINS,
            )  # fmt: skip
            kept = more(kept, (b_peak, b_one, b_two, scale, offset))
        tallies = kept
    for i_h in tl.static_range(ROWS):
        o_m = (i_first + i_h) * Q + i_q + tl.arange(0, 1)
        b_peak, b_one, b_two, scale, offset = tallies[i_h]
        close_tally(
            b_peak, b_one, b_two, peaks, aboves, masses, i_bg * IN_GROUP + o_m, o_m >= 0, i_c, chunks, R, MASSES, BINS
        )
