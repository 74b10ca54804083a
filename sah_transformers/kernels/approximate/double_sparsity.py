"""Double Sparsity: a label of a few channels per key and query head, 1 to 8 bits each.

16 channels of 4 bits: 12 bytes read and 4 written per key and query head; 140 instructions, of which a channel takes
four: a code goes to the top of a float's mantissa, ``1 + code / 16``, without a conversion. 67 MB are 22 us, the
instructions 20 us, side by side: **26 to 32 us**.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate import launch as shared
from sah_transformers.kernels.approximate.launch import (
    MOST_ROWS,
    Levels,
    Samples,
    Scoring,
    Tile,
    steps,
    unit_of,
    widest,
)
from sah_transformers.kernels.approximate.levels import keep_scores, open_row
from sah_transformers.kernels.approximate.line import keep_line, sampled_keys
from sah_transformers.kernels.approximate.place import Direct, Span, many, programs_of
from sah_transformers.kernels.approximate.rows import end_of, rows_of, seen_of
from sah_transformers.kernels.decode.score import close_tally, keep_tile, open_tally
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.device import no_kernels
from sah_transformers.maskers.double_sparsity import UNQUANTISED, DoubleSparsityTopKMasker, pack, quantise
from sah_transformers.rows import Context

TILES = (Tile(256, 1, 4), Tile(512, 1, 4), Tile(256, 1, 2), Tile(128, 2, 2), Tile(256, 2, 4), Tile(512, 1, 8))
LEVEL_WARPS = 2
ONE = tl.constexpr(0x3F800000)
"""The bits of 1.0 in float32, handed to kernels of rows: from a register they cost no instruction of their own."""


@dataclass(frozen=True)
class Given(shared.Given):
    """Channels of the local heads, int64 ``[H, r]``; bits of a code; the factor on scores, 1 for selection per head."""

    channels: torch.Tensor
    bits: int
    factor: float = 1.0


@lru_cache(maxsize=1024)
def given_of(
    masker: DoubleSparsityTopKMasker, layer_idx: int, heads: int, head_offset: int, dim: int, device: torch.device
) -> Given:
    """What the kernels need of a masker."""
    ctx = Context(layer_idx=layer_idx, heads=heads, head_offset=head_offset)
    channels = masker.channels(ctx, heads, dim, device)
    return Given(channels, masker.config.label_bits, dim**-0.5 if masker.config.gqa == "group" else 1.0)


def why_not(given: Given, dim: int) -> str:
    """Why these kernels cannot take the method, or ""."""
    return "labels that are not quantised have no kernel" if given.bits == UNQUANTISED else ""


def scratch(call: Scoring, side: dict[str, torch.Tensor], given: Given) -> dict[str, tuple[int, torch.dtype]]:
    return {}


def look_up(launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any]) -> None:
    """Nothing: the query's channels are read where they are used."""


def read(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, int]]:
    """What kernels take that read queries and labels: pointers, numbers, compile-time constants."""
    code, low, step = widest(side["code"], side["code"].shape[3]), side["low"], side["step"]
    unit = unit_of(code, low, step)
    places = (*steps(code, unit), code.stride(3), *steps(low, unit), *steps(step, unit))
    constants = {
        "WIDTH": given.channels.shape[1], "BITS": given.bits, "STEP": code.stride(2), "LOW_STEP": low.stride(2),
        "STEP_STEP": step.stride(2), "UNIT": unit,
    }  # fmt: skip
    return (
        tuple(map(launch.address, (call.q, given.channels, code, low, step))),
        (*call.q.stride()[:3], given.factor, given.channels.stride(0), *places), constants,
    )  # fmt: skip


def score(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], tile: Tile
) -> None:
    pointers, numbers, constants = read(launch, call, side, given)
    bm = min(MOST_ROWS, power_of_2(call.in_group))
    launch(
        label_score_kernel, (call.stride // tile.span, call.q.shape[0] * call.groups, -(-call.in_group // bm)),
        *pointers, *call.arrays(), *call.numbers(tile.span), *numbers,
        **call.shape(), **constants, BM=bm, BN=tile.keys, COUNT=tile.count, warps=tile.warps,
    )  # fmt: skip


def line(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], samples: Samples
) -> None:
    """Lines from the scores of sampled keys."""
    pointers, numbers, constants = read(launch, call, side, given)
    launch(
        label_line_kernel, (call.rows, 1, 1), *pointers, call.mask, call.limits, samples.lines,
        *call.line_numbers(samples), *numbers, ONE.value,
        **call.sight(), **constants, SAMPLES=samples.count, BINS=samples.bins, warps=samples.warps,
    )  # fmt: skip


def levels(call: Scoring, given: Given) -> int:
    """0: scores are no whole numbers."""
    return 0


def level(
    launch: Any, call: Scoring, side: dict[str, torch.Tensor], given: Given, s: dict[str, Any], cut: Levels
) -> None:
    """Levels on the rows' lines beside scores."""
    pointers, numbers, constants = read(launch, call, side, given)
    launch(
        label_level_kernel, (call.stride // cut.chunk, call.rows, 1),
        *pointers, call.mask, call.limits, cut.lines, call.scores, cut.levels, cut.histogram,
        *call.numbers(cut.chunk), *numbers, ONE.value,
        **call.sight(), **constants, CHUNK=cut.chunk, BINS=cut.bins, warps=cut.warps,
    )  # fmt: skip


def append(
    buffers: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, span: Span, given: Given
) -> None:
    """Labels of ``keys [B, G, K, D]`` in ``span`` into ``buffers``, bit for bit the masker's."""
    batch, groups = keys.shape[:2]
    heads, width = given.channels.shape
    if not isinstance(span, torch.Tensor) and (many(span) or no_kernels(keys)):
        keys, n = keys[:, :, slice(*span)], span[1] - span[0]
        index = given.channels.unflatten(0, (groups, -1))[None, :, :, None].expand(batch, -1, -1, n, -1)
        label = keys[:, :, None].expand(-1, -1, heads // groups, -1, -1).gather(-1, index).flatten(1, 2)
        codes, low, step = quantise(label, given.bits)
        for name, new in (("code", pack(codes, given.bits)), ("low", low), ("step", step)):
            buffers[name][:, :, slice(*span)] = new
        return
    code, low, step = buffers["code"], buffers["low"], buffers["step"]
    launch = Direct()
    start, n = programs_of(launch, span)
    launch(
        label_kernel, (heads, batch * n, 1),
        keys, given.channels, code, low, step, start,
        n, given.channels.stride(0), *keys.stride()[:3], *code.stride(), *low.stride(), *step.stride(),
        H=heads, G=groups, WIDTH=width, BITS=given.bits, POINT=isinstance(span, torch.Tensor),
        BYTES=code.shape[3], BY=power_of_2(code.shape[3]), warps=1,
    )  # fmt: skip


@triton.jit
def whole(b_x):
    """``b_x`` (0 to 255) rounded to a whole number, to even."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit(
    do_not_specialize=[
        "span", "n", "so_h", "sk_b", "sk_g", "sk_n", "sc_b", "sc_h", "sc_n", "sc_w", "sl_b", "sl_h", "sl_n",
        "st_b", "st_h", "st_n",
    ]
)  # fmt: skip
def label_kernel(
    keys, channels, code, low, step, span, n, so_h, sk_b, sk_g, sk_n, sc_b, sc_h, sc_n, sc_w, sl_b, sl_h, sl_n,
    st_b, st_h, st_n,
    H: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, POINT: tl.constexpr,
    BYTES: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Labels for one query head, each of ``n`` programs every ``n``-th key of the span."""
    i_h, i_bn = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_bn // n).to(tl.int64), i_bn % n
    EACH: tl.constexpr = 8 // BITS
    BINS: tl.constexpr = 2**BITS - 1
    o_y = tl.arange(0, BY)
    begin = tl.load(span) if POINT else span
    end = tl.load(span + 1) if POINT else span + n
    for i_k in tl.range(begin + i_n, end, n):
        i_key = tl.cast(i_k, tl.int64)
        p_key = keys + i_b * sk_b + (i_h // (H // G)).to(tl.int64) * sk_g + i_key * sk_n
        smallest, largest = float("inf"), float("-inf")
        for i in tl.static_range(EACH):
            o_c = o_y * EACH + i
            m_c = o_c < WIDTH
            b_v = tl.load(p_key + tl.load(channels + i_h * so_h + o_c, mask=m_c, other=0)).to(tl.float32)
            smallest = tl.minimum(smallest, tl.min(tl.where(m_c, b_v, float("inf"))))
            largest = tl.maximum(largest, tl.max(tl.where(m_c, b_v, float("-inf"))))
        least = tl.minimum(tl.maximum(smallest, -65504.0), 65504.0).to(tl.float16)
        base = least.to(tl.float32)
        each = tl.div_rn(largest - base, smallest * 0 + BINS)
        each = tl.minimum(tl.maximum(each, 0.0), 65504.0).to(tl.float16)
        width = each.to(tl.float32)
        b_byte = tl.zeros([BY], tl.int32)
        for i in tl.static_range(EACH):
            o_c = o_y * EACH + i
            m_c = o_c < WIDTH
            b_v = tl.load(p_key + tl.load(channels + i_h * so_h + o_c, mask=m_c, other=0)).to(tl.float32)
            b_x = tl.div_rn(b_v - base, tl.where(width == 0, 1.0, width) + tl.zeros_like(b_v))
            b_x = tl.where(width == 0, 0.0, tl.minimum(tl.maximum(b_x, 0.0), BINS))
            b_byte += tl.where(m_c, whole(b_x).to(tl.int32), 0) << (i * BITS)
        p_code = code + i_b * sc_b + i_h.to(tl.int64) * sc_h + i_key * sc_n + o_y * sc_w
        tl.store(p_code, b_byte.to(tl.uint8), mask=o_y < BYTES)
        tl.store(low + i_b * sl_b + i_h.to(tl.int64) * sl_h + i_key * sl_n, least)
        tl.store(step + i_b * st_b + i_h.to(tl.int64) * st_h + i_key * st_n, each)


@triton.jit
def one_and_code(b_word, one, AT: tl.constexpr, BITS: tl.constexpr):
    """``1 + code / 2**BITS`` as float32, of the ``AT``-th code of a word; ``one``: the bits of 1.0, in a register."""
    LONG: tl.constexpr = b_word.dtype.primitive_bitwidth
    PLACE: tl.constexpr = AT // (8 // BITS) * 8 + AT % (8 // BITS) * BITS  # its first bit
    TOP: tl.constexpr = 23 - BITS  # the mantissa's highest bits
    SHIFT: tl.constexpr = PLACE % 32
    b_half = (b_word >> (PLACE - SHIFT)).to(tl.int32) if LONG == 64 else b_word.to(tl.int32)
    b_code = b_half << (TOP - SHIFT) if SHIFT < TOP else b_half >> (SHIFT - TOP)
    return ((b_code & ((2**BITS - 1) << TOP)) | one).to(tl.float32, bitcast=True)


@triton.jit
def label_scores(
    q, channels, code, low, step, i_b, i_h, i_q, o_k, K, sq_b, sq_h, sq_q, factor, so_h,
    sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h, one,
    WIDTH: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, LOW_STEP: tl.constexpr, STEP_STEP: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """``low sum(q) + step sum(q code)`` of one row's labels ``o_k``."""
    CODES: tl.constexpr = code.dtype.element_ty.primitive_bitwidth // 8 * (8 // BITS)  # of a word
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    p_q = q + i_b * sq_b + i_h * sq_h + i_q * sq_q
    p_channel = channels + i_h * so_h
    m_k, o_l = o_k < end_of(K, UNIT), o_k.to(tl.int64)
    p_low, p_step = low + i_b * sl_b * UNIT + i_h * (sl_h * UNIT), step + i_b * st_b * UNIT + i_h * (st_h * UNIT)
    p_code = code + i_b * sc_b * UNIT + i_h * (sc_h * UNIT)
    b_low = tl.load(p_low + o_l * LOW_STEP, mask=m_k, other=0.0).to(tl.float32)
    b_step = tl.load(p_step + o_l * STEP_STEP, mask=m_k, other=0.0).to(tl.float32)
    b_sum = tl.zeros_like(b_low)
    total = 0.0
    for i_d in tl.static_range(WIDTH):
        if i_d % CODES == 0:
            b_word = tl.load(p_code + o_l * STEP + (i_d // CODES) * sc_w, mask=m_k, other=0)
        b_code = one_and_code(b_word, one, i_d % CODES, BITS)
        b_q = tl.load(p_q + tl.load(p_channel + i_d)).to(tl.float32)
        total += b_q
        b_sum += b_q * b_code
    b_sum = (b_sum - total) * (2**BITS)
    return (b_low * total + b_step * b_sum) * factor


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "factor", "so_h",
        "sc_b", "sc_h", "sc_w", "sl_b", "sl_h", "st_b", "st_h",
    ]
)  # fmt: skip
def label_score_kernel(
    q, channels, code, low, step, mask, limits, lines, scores, histogram, peaks, aboves, masses,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sq_b, sq_h, sq_q, factor, so_h,
    sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MASSES: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
    LOW_STEP: tl.constexpr, STEP_STEP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One KV head, ``BM`` of its rows, ``COUNT * BN`` keys: ``low sum(q) + step sum(q code)`` of a label."""
    i_c, i_bg = tl.program_id(0), tl.program_id(1)
    i_b, i_g = i_bg // G, i_bg % G
    CODES: tl.constexpr = code.dtype.element_ty.primitive_bitwidth // 8 * (8 // BITS)  # of a word
    IN_GROUP: tl.constexpr = H // G * Q
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_q, o_r, m_m, first_end, last_start, reach = rows_of(
        limits, i_bg, o_m, B, K, first, first_share, last, last_share, IN_GROUP, G, Q, CAUSAL, MASKED
    )
    o_h = i_g * (H // G) + o_m // Q
    p_q = q + i_b.to(tl.int64) * sq_b + o_h.to(tl.int64) * sq_h + o_q * sq_q
    p_channel = channels + o_h * so_h
    p_code = code + i_b.to(tl.int64) * sc_b * UNIT + o_h[:, None].to(tl.int64) * (sc_h * UNIT)
    p_low = low + i_b.to(tl.int64) * sl_b * UNIT + o_h[:, None].to(tl.int64) * (sl_h * UNIT)
    p_step = step + i_b.to(tl.int64) * st_b * UNIT + o_h[:, None].to(tl.int64) * (st_h * UNIT)
    R = B * G * IN_GROUP
    b_peak, b_one, b_two, scale, offset = open_tally(lines, o_r, m_m, R, MASSES, BINS, BM, BN)
    for i_t in tl.range(0, COUNT):
        o_k = (i_c * COUNT + i_t) * BN + tl.arange(0, BN)
        m_k = m_m[:, None] & (o_k < end_of(K, UNIT))[None, :]
        o_l = o_k.to(tl.int64)[None, :]
        b_low = tl.load(p_low + o_l * LOW_STEP, mask=m_k, other=0.0).to(tl.float32)
        b_step = tl.load(p_step + o_l * STEP_STEP, mask=m_k, other=0.0).to(tl.float32)
        b_sum = tl.zeros([BM, BN], tl.float32)
        total = tl.zeros([BM], tl.float32)
        for i_d in tl.static_range(WIDTH):
            if i_d % CODES == 0:
                b_word = tl.load(p_code + o_l * STEP + (i_d // CODES) * sc_w, mask=m_k, other=0)
            b_code = one_and_code(b_word, ONE, i_d % CODES, BITS)
            channel = tl.load(p_channel + i_d, mask=m_m, other=0)
            b_q = tl.load(p_q + channel, mask=m_m, other=0.0).to(tl.float32)
            total += b_q
            b_sum += b_q[:, None] * b_code
        b_sum = (b_sum - total[:, None]) * (2**BITS)
        b_s = (b_low * total[:, None] + b_step * b_sum) * factor
        b_peak, b_one, b_two = keep_tile(
            b_s, b_peak, b_one, b_two, scale, offset, mask, scores, histogram, i_b, o_q, o_r, m_m, o_k, reach,
            first_end, last_start, K, stride, sm_b, sm_q, sm_k, Q, MASKED, MASSES, BINS,
        )  # fmt: skip
    close_tally(b_peak, b_one, b_two, peaks, aboves, masses, o_r, m_m, i_c, chunks, R, MASSES, BINS)


@triton.jit(
    do_not_specialize=[
        "K", "B", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "size", "share", "factor", "so_h",
        "sc_b", "sc_h", "sc_w", "sl_b", "sl_h", "st_b", "st_h", "one",
    ]
)  # fmt: skip
def label_line_kernel(
    q, channels, code, low, step, mask, limits, lines,
    K, B, sm_b, sm_q, sm_k, first, first_share, last, last_share, size, share, sq_b, sq_h, sq_q, factor, so_h,
    sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h, one,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, LOW_STEP: tl.constexpr, STEP_STEP: tl.constexpr,
    UNIT: tl.constexpr, SAMPLES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The line of one row."""
    i_e = tl.program_id(0)
    i_b, i_q = i_e // (H * Q), i_e % Q
    n, begin, end, o_k = sampled_keys(
        limits, i_b, i_q, K, B, first, first_share, last, last_share, Q, CAUSAL, MASKED, SAMPLES
    )
    b_s = label_scores(
        q, channels, code, low, step, i_b, i_e // Q % H, i_q, o_k, K, sq_b, sq_h, sq_q, factor, so_h,
        sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h, one, WIDTH, BITS, STEP, LOW_STEP, STEP_STEP, UNIT,
    )  # fmt: skip
    m_k = seen_of(mask, i_b, i_q, o_k, begin, end, K, sm_b, sm_q, sm_k, Q, CAUSAL, MASKED) & (b_s > float("-inf"))
    keep_line(b_s, m_k, lines, i_e, n, first, first_share, last, last_share, size, share, False, BINS)


@triton.jit(
    do_not_specialize=[
        "K", "B", "stride", "chunks", "sm_b", "sm_q", "first", "first_share", "last", "last_share", "factor", "so_h",
        "sc_b", "sc_h", "sc_w", "sl_b", "sl_h", "st_b", "st_h", "one",
    ]
)  # fmt: skip
def label_level_kernel(
    q, channels, code, low, step, mask, limits, lines, scores, levels, histogram,
    K, B, stride, chunks, sm_b, sm_q, sm_k, first, first_share, last, last_share, sq_b, sq_h, sq_q, factor, so_h,
    sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h, one,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, LOW_STEP: tl.constexpr, STEP_STEP: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One row, one chunk of keys: scores, levels and their counts."""
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    row = open_row(limits, lines, i_e, K, B, first, first_share, last, last_share, Q, CAUSAL, MASKED)
    b_s = label_scores(
        q, channels, code, low, step, i_e // (H * Q), i_e // Q % H, i_e % Q,
        i_c * CHUNK + tl.arange(0, CHUNK), K, sq_b, sq_h, sq_q, factor, so_h,
        sc_b, sc_h, sc_w, sl_b, sl_h, st_b, st_h, one, WIDTH, BITS, STEP, LOW_STEP, STEP_STEP, UNIT,
    )  # fmt: skip
    keep_scores(
        b_s, row, mask, scores, levels, histogram, i_e, i_c, K, B, stride, chunks,
        sm_b, sm_q, sm_k, Q, CAUSAL, MASKED, CHUNK, BINS,
    )  # fmt: skip
