"""SOCKET: per table the probability of a key's bucket, a product of look-ups in tables made once per row.

A bucket's K bits are cut into pieces of at most ``PIECE`` bits, each with a table of its probabilities, those of two
heads side by side: 16 pairs for four bits fill the 32 banks of shared memory, and a pair is looked up at once.
``summed`` over the heads of many keys, buckets of up to 12 bits are looked up as a whole instead: a program puts all
4,096 probabilities of a hash table, the heads summed, into shared memory, the outer product of two pieces.

Measured before, L=60, K=12, H=32, G=8, 131,072 keys, H100: 187 us with a look-up per head and piece in global memory,
summed 391 us with all buckets there (and 64 for their tables). Both are 1.6 turns of the load unit per line that a warp
touches, 12.5 and 28 per 32 keys, hash table and KV head. Now 132 and 88 us, and 4.7 for the tables. What was expected
from the sm_90 code:

- 12 turns for six look-ups of 8 bytes, 1.5 for words and tables, 24 instructions (before: 34): 114 and 51 us, **115
  to 130 us**. The same look-ups in global memory are 12.5 turns if a line costs no more than its data, else up to 20.
  Other cuts of the bits are no better: 5 + 5 bits and a choice among four are 10 turns and 41 instructions, both 85
  us; 16 bytes at once, for all heads, fill the banks with three bits: 16 turns; tables of 6 bits meet in banks: 16.
- summed: 3.5 turns for a look-up (among 4,096 numbers in 32 banks), 3 for making the table, used by 4,096 keys, 0.5 for
  words; 12 instructions: 59 and 25 us, and two barriers per hash table: **60 to 85 us**. A program needs 60 hash tables
  one after the other, 30 to 40 us: of few keys (``WHOLE_KEYS``) pieces are faster.
- tables: 3 to 5 us, before 11: a probability is computed by one thread instead of all 32 (840 instructions, not 4,000).

Coarse scores first (`coarse.py`), for three heads and more of a KV head: probabilities have 16 bits, those of four
heads are 8 bytes, three look-ups instead of six. Instead of the 132 us, of 131,072 keys 92 us and 28 of their edges:

- 6 turns for look-ups, 1.5 as before, 30 instructions (of eight keys of a thread 27.5): 64 and 64 us, **75 to 85 us**
  were expected. In float16 they were as many instructions where pairs of pieces were multiplied in float16, else 33.4,
  and probabilities below 1e-6 to 1e-8 were lost.
- exact scores of an edge, 700 to 1,500 keys of a row: 23 words, each in a sector of its own, 16 to 35 MB; 57 turns per
  key, 5 to 12 us: **7 to 15 us** were expected; with 2,048 samples for the line instead of 1,024 they take 22.

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
from sah_transformers.kernels.approximate.buckets import (
    look_buckets_up,
    look_coarse_pieces_up,
    look_pieces_up,
    more,
    none,
)
from sah_transformers.kernels.approximate.coarse import LEAST_TAU, coarse_score, error_of, settle_kernel
from sah_transformers.kernels.approximate.launch import Edges, Scoring, Tile, steps, unit_of
from sah_transformers.kernels.approximate.place import Direct, Span, many, programs_of
from sah_transformers.kernels.approximate.rows import end_of, rows_of
from sah_transformers.kernels.approximate.socket_prompt import append_many, digits_of
from sah_transformers.kernels.decode.score import close_tally, keep_tile, open_tally
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.decode.values import even, power_above
from sah_transformers.maskers.socket import SocketMaskerConfig, hyperplanes

TILES = (Tile(512, 1, 4), Tile(256, 1, 4), Tile(1024, 1, 8), Tile(512, 1, 8), Tile(1024, 1, 4), Tile(2048, 1, 16))
WHOLE_TILES = (Tile(4096, 1, 8), Tile(8192, 1, 16), Tile(4096, 1, 16), Tile(2048, 1, 8), Tile(2048, 1, 16))
PIECE = 4
MOST_HEADS = 8
"""Rows of a program: their sums stay in registers."""
SETTLED = 32
"""Keys of a program that makes coarse scores exact."""
WHOLE_PLANES = (4, 12)
WHOLE_KEYS = 2**19
"""From how many keys of all KV heads on, rounded up to a power of two, tables of whole buckets pay."""


@dataclass(frozen=True)
class Given(shared.Given):
    """Hyperplanes, float32 ``[L, K, D]``, contiguous (of ``socket.hyperplanes``, which float32 holds exactly); tau; the
    planes' digits (`socket_prompt.digits_of`)."""

    planes: torch.Tensor
    tau: float
    digits: torch.Tensor


@lru_cache(maxsize=1024)
def given_of(config: SocketMaskerConfig, layer_idx: int, dim: int, device: torch.device) -> Given:
    """What the kernels need of a masker."""
    planes = hyperplanes(layer_idx, config.L, config.K, dim, device)
    return Given(planes.float(), config.tau, digits_of(planes))


def why_not(given: Given, dim: int) -> str:
    """Why these kernels cannot take the method, or ""."""
    return ""


@dataclass(frozen=True)
class Cut:
    """How look-ups are made.

    Attributes:
        whole: whether buckets are looked up as a whole, the heads summed.
        bits, pieces: of the tables that are made once per row; heads: of a KV head, at_once: of a program.
    """

    whole: bool
    bits: int
    pieces: int
    heads: int
    at_once: int

    @property
    def room(self) -> int:
        """Numbers of a hash table for ``at_once`` heads."""
        return self.pieces * 2**self.bits * (self.at_once if self.whole else 2 * -(-self.at_once // 2))


def cut(call: Scoring, given: Given) -> Cut:
    planes, heads = given.planes.shape[1], call.q.shape[1] // call.groups
    fewest, most = WHOLE_PLANES
    many = call.q.shape[0] * call.groups * power_of_2(call.keys) >= WHOLE_KEYS  # the same for all calls of a plan
    whole = call.summed and fewest <= planes <= most and many
    pieces = 2 if whole else -(-planes // PIECE)
    at_once = heads if call.summed else max(n for n in range(1, min(MOST_HEADS, heads) + 1) if heads % n == 0)
    return Cut(whole, -(-planes // pieces), pieces, heads, at_once)


def error(call: Scoring, given: Given) -> float:
    """How far scores of the call may be off, relatively, if it is coarse; 0 where that does not pay.

    It halves the look-ups of three heads and more.
    """
    c = cut(call, given)
    pays = c.at_once > 2 and not call.summed and given.tau >= LEAST_TAU
    return error_of(given.planes.shape[0], c.pieces) if pays else 0.0


def tiles(call: Scoring, given: Given) -> tuple[Tile, ...]:
    return WHOLE_TILES if cut(call, given).whole else TILES


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Given) -> dict[str, tuple[int, torch.dtype]]:
    c = cut(call, given)
    owners = call.q.shape[0] * call.groups * call.q.shape[2] * (c.heads // c.at_once)
    tables, planes, _ = given.planes.shape
    return {
        "table": (owners * tables * c.room, torch.float32),
        "chances": (call.q.shape[:3].numel() * tables * planes * 2, torch.float64),
    }


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]) -> None:
    """Probabilities of pieces of buckets, float32 ``[B * G * Q, heads // at_once, L, pieces, at_once, 2**bits]``.

    Unless buckets are looked up as a whole, those of two heads lie side by side: ``[..., at_once / 2, 2**bits, 2]``.
    """
    c = cut(call, given)
    _, heads, rows, dim = call.q.shape
    tables, planes, _ = given.planes.shape
    launch(
        pieces_kernel, (tables, call.q.shape[:3].numel(), 1), launch.address(call.q), launch.address(given.planes),
        s["chances"], s["table"], *call.q.stride()[:3], 2.0 / given.tau,
        H=heads, G=call.groups, Q=rows, L=tables, K=planes, D=dim, BD=power_of_2(dim), BK=power_of_2(planes),
        BITS=c.bits, PIECES=c.pieces, AT_ONCE=c.at_once, ROOM=c.room, PAIRED=not c.whole, warps=1,
    )  # fmt: skip


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], tile: Tile
) -> None:
    c = cut(call, given)
    tables, planes, _ = given.planes.shape
    words, norm = side["buckets"], side["norm"]
    unit = unit_of(words, norm)
    launch(
        bucket_score_kernel,
        (call.stride // tile.span, call.q.shape[0] * call.groups, call.q.shape[2] * (c.heads // c.at_once)),
        launch.address(words), launch.address(norm), s["table"], *call.arrays(), *call.numbers(tile.span),
        *steps(words, unit), words.stride(3), *steps(norm, unit),
        **call.shape(), L=tables, PLANES=planes, WORDS=words.shape[3], RUN=run_of(tables, planes),
        BITS=c.bits, PIECES=c.pieces, AT_ONCE=c.at_once, ROOM=c.room, WHOLE=c.whole, SUM=call.summed,
        COARSE=call.coarse, STEP=words.stride(2), NORM_STEP=norm.stride(2), UNIT=unit,
        BN=tile.keys, COUNT=tile.count, warps=tile.warps,
    )  # fmt: skip


def settle(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], edges: Edges
) -> None:
    """Exact scores of the keys of edges, in place of coarse ones."""
    c = cut(call, given)
    batch, heads, rows, _ = call.q.shape
    tables, planes, _ = given.planes.shape
    words, norm = side["buckets"], side["norm"]
    unit = unit_of(words, norm)
    run = run_of(tables, planes)
    launch(
        settle_kernel, (max(1, min(64, power_of_2(call.keys) // 2048)), batch * heads * rows, 1),
        launch.address(words), launch.address(norm), s["table"], call.scores, edges.cuts, edges.lists,
        call.stride // 16, edges.wide, edges.longest, *steps(words, unit), words.stride(3), *steps(norm, unit),
        H=heads, G=call.groups, Q=rows, L=tables, PLANES=planes, WORDS=words.shape[3], RUN=run,
        BITS=c.bits, PIECES=c.pieces, AT_ONCE=c.at_once, ROOM=c.room, STEP=words.stride(2), NORM_STEP=norm.stride(2),
        UNIT=unit, RUNS=min(16, power_of_2(tables // run)), BN=SETTLED, warps=4,
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
    tables, planes, _ = given.planes.shape
    if many(span):
        part = slice(*span)
        append_many(
            keys[:, :, part], values[:, :, part], words[:, :, part], norm[:, :, part], given.digits, tables * planes
        )
        return
    batch, groups, _, dim = keys.shape
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
        b_x = even(b_x / (power_above(tl.max(tl.abs(b_x))) / 1073741824.0))  # up to 2**30
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


@triton.jit(do_not_specialize=["sharpness"])
def pieces_kernel(
    q, planes, chances, table, sq_b, sq_h, sq_q, sharpness,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr,
    ROOM: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The pieces of one hash table for one row; a last piece of fewer bits fills the beginning of its table.

    ``chances [R, L, K, 2]`` are the probabilities that the query falls on the - and + side of each plane: float64.
    """
    i_l, i_r = tl.program_id(0), tl.program_id(1)
    i_b, i_h, i_q = i_r // (H * Q), i_r // Q % H, i_r % Q
    o_d, o_k = tl.arange(0, BD), tl.arange(0, BK)
    m_k = o_k < K
    b_q = tl.load(q + i_b.to(tl.int64) * sq_b + i_h * sq_h + i_q * sq_q + o_d, mask=o_d < D, other=0.0).to(tl.float64)
    p_planes = planes + (i_l * K + o_k[:, None]) * D + o_d[None, :]
    b_w = tl.load(p_planes, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float64)
    p_chance = chances + (i_r.to(tl.int64) * L + i_l) * (2 * K)
    tl.store(p_chance + o_k, tl.sum(b_w * b_q[None, :], 1), mask=m_k)
    tl.debug_barrier()
    b_x = tl.load(p_chance + o_k, mask=m_k, other=0.0)  # each in one thread, as it was in all
    tl.debug_barrier()
    grown = tl.exp(2.0 * tl.minimum(tl.maximum(b_x, -20.0), 20.0))  # beyond, tanh is 1 in float64
    logit = (grown - 1.0) / (grown + 1.0) * sharpness
    tl.store(p_chance + 2 * o_k, 1.0 / (1.0 + tl.exp(logit)), mask=m_k)
    tl.store(p_chance + 2 * o_k + 1, 1.0 / (1.0 + tl.exp(-logit)), mask=m_k)
    tl.debug_barrier()
    o_e = tl.arange(0, 2**BITS)
    i_own = i_h % (H // G)  # of the heads of its KV head
    i_owner = ((i_b * G + i_h // (H // G)) * Q + i_q) * (H // G // AT_ONCE) + i_own // AT_ONCE
    i_one = i_own % AT_ONCE
    p_table = table + (i_owner.to(tl.int64) * L + i_l) * ROOM
    for i in tl.static_range(PIECES):
        b_p = tl.full([2**BITS], 1.0, tl.float64)
        for i_p in tl.static_range(min(BITS, K - i * BITS)):
            b_p = b_p * tl.load(p_chance + 2 * (i * BITS + i_p) + (o_e >> i_p & 1))
        if PAIRED:
            o_out = (i * ((AT_ONCE + 1) // 2) + i_one // 2) * 2 ** (BITS + 1) + 2 * o_e + i_one % 2
        else:
            o_out = (i * AT_ONCE + i_one) * 2**BITS + o_e
        tl.store(p_table + o_out, b_p.to(tl.float32), mask=o_e < 2 ** min(BITS, K - i * BITS))


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
    RUN: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, AT_ONCE: tl.constexpr, ROOM: tl.constexpr,
    WHOLE: tl.constexpr, SUM: tl.constexpr, COARSE: tl.constexpr, STEP: tl.constexpr, NORM_STEP: tl.constexpr,
    UNIT: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One KV head and query, ``AT_ONCE`` of its heads, ``COUNT * BN`` keys.

    A thread has all heads of its keys, so that a bucket is cut out of the words once; ``RUN`` tables share two words.
    """
    i_c, i_bg, i_o = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_g, i_q, i_first = i_bg // G, i_bg % G, i_o % Q, i_o // Q * AT_ONCE
    ROWS: tl.constexpr = 1 if SUM else AT_ONCE
    IN_GROUP: tl.constexpr = Q if SUM else H // G * Q
    OWNERS: tl.constexpr = H // G // AT_ONCE
    p_words = words + i_b.to(tl.int64) * sw_b * UNIT + i_g.to(tl.int64) * (sw_g * UNIT)
    p_norm = norm + i_b.to(tl.int64) * sn_b * UNIT + i_g.to(tl.int64) * (sn_g * UNIT)
    p_table = table + ((i_bg * Q + i_q) * OWNERS + i_o // Q).to(tl.int64) * (L * ROOM)
    R = B * G * IN_GROUP
    tallies = none()
    for i_h in tl.static_range(ROWS):
        o_m = (i_first + i_h) * Q + i_q + tl.arange(0, 1)
        tallies = more(tallies, open_tally(lines, i_bg * IN_GROUP + o_m, o_m >= 0, R, MASSES, BINS, 1, BN))
    for i_t in tl.range(0, COUNT):
        o_k = (i_c * COUNT + i_t) * BN + tl.arange(0, BN)
        m_k = o_k < end_of(K, UNIT)
        p_key = p_words + o_k.to(tl.int64) * STEP
        if WHOLE:
            sums = more(none(), look_buckets_up(p_key, m_k, p_table, sw_w, L, PLANES, WORDS, RUN, BITS, AT_ONCE, BN))
        elif COARSE:
            sums = look_coarse_pieces_up(p_key, m_k, p_table, sw_w, L, PLANES, WORDS, RUN, BITS, PIECES, AT_ONCE, BN)
        else:
            sums = look_pieces_up(p_key, m_k, p_table, sw_w, L, PLANES, WORDS, RUN, BITS, PIECES, AT_ONCE, BN)
        b_norm = tl.load(p_norm + o_k.to(tl.int64) * NORM_STEP, mask=m_k, other=0.0)
        kept = none()
        for i_h in tl.static_range(ROWS):
            b_s = sums[i_h]
            if SUM and not WHOLE:
                for i in tl.static_range(1, AT_ONCE):
                    b_s = b_s + sums[i]
            b_s = (coarse_score(b_s, b_norm) if COARSE else b_s * b_norm)[None, :]
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
