"""HashAttention's hashes of many keys: tensor cores, and float64 where a sign is not certain.

A filter as exact geometric predicates use: outputs of the MLPs come with a bound on their error (`hash_digits`). A sign
is certain where the output is at least as large; keys with another one are listed, and hashed again by the layers that
`hash_kernel` runs. NaN and Inf are never certain. Listed are 0.4 to 0.7 % of a 135M model's keys under trained weights
(float32: 0.8 to 1.4 %), 1.0 % of normal ones under normal weights (1.6 %).

32,768 keys, 32 MLPs of 128 -> 128 -> 128 -> 32 numbers, H100: four products of halves, 309 GFLOP, 0.31 ms at full
speed; 268 M SiLUs with their cutting into parts, 25 instructions each, 0.25 ms, which another warp group's products can
hide; 147 KB of weights for each of 5,000 to 10,000 listed keys, 1.5 GB from the L2: 0.1 to 0.3 ms. **0.6 to 0.9 ms** by
this count, 1.42 measured (0.90 and, before keys went by twos, 0.29); float64 alone took 7.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate.hash_digits import Digits, sizes_of
from sah_transformers.kernels.approximate.hash_layers import hash_vectors, silu
from sah_transformers.kernels.approximate.k_means import unit_of
from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.kernels.decode import DTYPES
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.prefill.tiles import shared_of
from sah_transformers.maskers.hash_weights import Mlp

TILE, WARPS = 128, 8
COUNT = 16
"""Tiles of a program, which keeps the weights in shared memory, where products read them there and sum in registers
(compute capability 9); else 1."""

MISSED = tl.constexpr(2.0**-11)
"""Share of a rest that rounding to half precision takes away."""

PROGRAMS, REGISTERS = 528, 128
"""Programs that hash what is listed, four for each multiprocessor of an H100, and registers of their threads: two run
there at a time, one while the other waits for weights (a few are spilled)."""

MOST_WIDTH = 128
ROOM = 2048
"""Bytes of shared memory beside weights and keys."""


def fits(keys: torch.Tensor, mlp: Mlp) -> bool:
    """Whether these kernels take ``keys [B, G, K, D]``: the weights have room in shared memory, with a tile of keys."""
    dim, first, second, bits = sizes_of(mlp)
    if keys.dtype not in DTYPES or keys.stride(-1) != 1 or max(dim, first, second, bits) > MOST_WIDTH:
        return False
    if keys.shape[0] * max(keys.shape[1], len(mlp[0][1])) * keys.shape[2] >= 2**31:
        return False
    halves = dim * first + first * second + second * bits + TILE * dim  # twice: high and low
    return 4 * halves + ROOM <= shared_of(keys.device)


def hash_prompt(keys: torch.Tensor, mlp: Mlp, digits: Digits, out: torch.Tensor, start: int) -> None:
    """Hashes of ``keys [B, G, K, D]`` from ``start`` on into ``out [B, max(G, S), >= K, words]``."""
    batch, heads, end, dim = keys.shape
    n, unit, sets = end - start, unit_of(keys), len(mlp[0][1])
    most, (first, second, bits) = max(heads, sets), (bias.shape[1] for _, bias in mlp)
    sizes = dict(zip(("BD", "B0", "B1", "BB"), sizes_of(mlp), strict=True))
    listed = torch.empty(batch * most * n, dtype=torch.int32, device=keys.device)
    count = torch.zeros(1, dtype=torch.int32, device=keys.device)
    tiles = 1 if keys.is_cuda and torch.cuda.get_device_capability(keys.device)[0] != 9 else COUNT
    launch, shape = Direct(), {"HEADS": heads, "SETS": sets, "D": dim}
    launch(
        prompt_kernel, (-(-n // (TILE * tiles)), batch * most, 1),
        keys, *(t for pair in zip(digits.parts, digits.rows, strict=True) for t in pair), digits.bounds,
        out, listed, count, start, n, *(s // unit for s in keys.stride()[:3]), *out.stride(),
        **shape, BITS=bits, UNIT=unit, **sizes, BN=TILE, COUNT=tiles, warps=WARPS,
    )  # fmt: skip
    launch(
        listed_kernel, (PROGRAMS, 1, 1),
        keys, *(t.contiguous() for weight, bias in mlp for t in (weight.mT, bias)), out, listed, count,
        start, n, *keys.stride()[:3], *out.stride(),
        **shape, H0=first, H1=second, BITS=bits, PROGRAMS=PROGRAMS,
        BD=power_of_2(dim), B0=power_of_2(first), B1=power_of_2(second), BB=sizes["BB"], warps=WARPS,
        cap=REGISTERS,
    )  # fmt: skip


@triton.jit
def cut(b_x):
    """Parts of rows ``x``: (high, low, unit, a bound on the norm, on that of the rest), see `hash_digits`."""
    b_n = tl.sqrt(tl.sum(b_x * b_x, 1)) * 1.002 + 2.0**-58
    b_e = (b_n * 1.01).to(tl.int32, bitcast=True) >> 23
    b_p = b_x * ((264 - b_e) << 23).to(tl.float32, bitcast=True)[:, None]  # times 2**(10 - exponent)
    b_h = (b_p + 12582912.0) - 12582912.0  # whole, to even
    b_r = b_p - b_h
    b_u = ((b_e - 10) << 23).to(tl.float32, bitcast=True)
    return b_h.to(tl.float16), b_r.to(tl.float16), b_u, b_n, tl.sqrt(tl.sum(b_r * b_r, 1)) * 1.002 * b_u


@triton.jit
def parts_of(parts, i_s, BI: tl.constexpr, BO: tl.constexpr):
    p_w = parts + i_s * (2 * BI * BO) + tl.arange(0, BI)[:, None] * BO + tl.arange(0, BO)[None, :]
    return tl.load(p_w), tl.load(p_w + BI * BO)


@triton.jit
def layer(b_x, b_e, w_h, w_l, rows, bounds, i_s, LAYER: tl.constexpr, BO: tl.constexpr, MISSED: tl.constexpr):
    """(outputs ``[BN, BO]``, the bound of their error ``[BN]``) of a layer for inputs with the bound ``b_e``, whose
    parts miss the share ``MISSED`` of the rest."""
    x_h, x_l, b_u, b_n, b_v = cut(b_x)
    b_z = tl.dot(x_h, w_l, tl.dot(x_l, w_h, tl.dot(x_l, w_l)))  # the rest first: its registers are free then
    b_y = tl.dot(x_h, w_h)  # whole numbers
    p_row = rows + i_s * (4 * BO) + tl.arange(0, BO)
    b_y = (b_y + b_z) * b_u[:, None] * tl.load(p_row)[None, :] + tl.load(p_row + BO)[None, :]
    p_bound = bounds + (i_s * 3 + LAYER) * 4
    b_e = tl.load(p_bound) * (b_e + MISSED * b_v) + tl.load(p_bound + 1) * b_n + tl.load(p_bound + 2) * b_v
    return b_y, b_e + tl.load(p_bound + 3)


@triton.jit
def hash_tile(
    i_t, p_x, h_0, l_0, r0, h_1, l_1, r1, h_2, l_2, r2, bounds, p_out, listed, count, start, n, sx_n, so_n, so_w,
    i_s, i_bh, D: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile ``i_t`` of ``BN`` keys: packed signs, and which keys have an uncertain one."""
    o_n, o_d, o_o = i_t * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BB)
    o_k = (start + o_n).to(tl.int64)
    p_k = p_x + (o_k * (sx_n * UNIT))[:, None] + o_d[None, :]
    b_x = tl.load(p_k, mask=(o_n < n)[:, None] & (o_d < D)[None, :], other=0.0)
    OF_KEY: tl.constexpr = MISSED if b_x.dtype == tl.float32 else 0.0
    b_y, b_e = layer(b_x.to(tl.float32), 0.0, h_0, l_0, r0, bounds, i_s, 0, B0, OF_KEY)
    b_y, b_e = layer(silu(b_y), b_e, h_1, l_1, r1, bounds, i_s, 1, B1, MISSED)
    b_y, b_e = layer(silu(b_y), b_e, h_2, l_2, r2, bounds, i_s, 2, BB, MISSED)
    b_bit = ((b_y >= 0) & (o_o < BITS)[None, :]).to(tl.int32) << (o_o % 32)[None, :]
    for i_w in tl.static_range((BITS + 31) // 32):
        b_word = tl.sum(tl.where((o_o // 32 == i_w)[None, :], b_bit, 0), 1)
        tl.store(p_out + o_k * so_n + i_w * so_w, b_word, mask=o_n < n)
    p_last = r2 + i_s * (4 * BB) + 2 * BB + o_o
    b_bound = b_e[:, None] * tl.load(p_last)[None, :] + tl.load(p_last + BB)[None, :]
    b_sure = (tl.abs(b_y) >= b_bound) & (tl.abs(b_y) < float("inf"))
    m_list = (tl.min(b_sure.to(tl.int32), 1) == 0) & (o_n < n)
    o_list = tl.atomic_add(count + o_n * 0, 1, mask=m_list, sem="relaxed")
    tl.store(listed + o_list, i_bh * n + o_n, mask=m_list)


@triton.jit(do_not_specialize=["start", "n", "sx_b", "sx_h", "sx_n", "so_b", "so_h", "so_n", "so_w"])
def prompt_kernel(
    x, p0, r0, p1, r1, p2, r2, bounds, out, listed, count, start, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, so_w,
    HEADS: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """``COUNT`` tiles of keys under one MLP."""
    i_c, i_bh = tl.program_id(0), tl.program_id(1)
    MOST: tl.constexpr = max(HEADS, SETS)
    i_b, i_h = (i_bh // MOST).to(tl.int64), i_bh % MOST
    i_s, i_x = i_h // (MOST // SETS), (i_h // (MOST // HEADS)).to(tl.int64)
    h_0, l_0 = parts_of(p0, i_s, BD, B0)
    h_1, l_1 = parts_of(p1, i_s, B0, B1)
    h_2, l_2 = parts_of(p2, i_s, B1, BB)
    p_x = x + i_b * sx_b * UNIT + i_x * (sx_h * UNIT)
    p_out = out + i_b * so_b + i_h.to(tl.int64) * so_h
    if COUNT == 1:
        hash_tile(
            i_c, p_x, h_0, l_0, r0, h_1, l_1, r1, h_2, l_2, r2, bounds, p_out, listed, count, start, n, sx_n, so_n,
            so_w, i_s, i_bh, D, BITS, UNIT, BD, B0, B1, BB, BN,
        )  # fmt: skip
    else:  # not pipelined: keys of two tiles and the weights are too much
        for i_t in tl.range(i_c * COUNT, tl.minimum((i_c + 1) * COUNT, tl.cdiv(n, BN)), num_stages=1):
            hash_tile(
                i_t, p_x, h_0, l_0, r0, h_1, l_1, r1, h_2, l_2, r2, bounds, p_out, listed, count, start, n, sx_n, so_n,
                so_w, i_s, i_bh, D, BITS, UNIT, BD, B0, B1, BB, BN,
            )  # fmt: skip


@triton.jit(do_not_specialize=["start", "n", "sx_b", "sx_h", "sx_n", "so_b", "so_h", "so_n", "so_w"])
def listed_kernel(
    x, w0, b0, w1, b1, w2, b2, out, listed, count, start, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, so_w,
    HEADS: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BITS: tl.constexpr,
    PROGRAMS: tl.constexpr, BD: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The keys that ``prompt_kernel`` listed, ``(b, h, n)`` in one number, each ``PROGRAMS``-th pair by one program: at
    once if they have the same MLP, as nearly all do, for its weights are what takes the time."""
    MOST: tl.constexpr = max(HEADS, SETS)
    total = tl.load(count)
    for i_l in tl.range(2 * tl.program_id(0), total, 2 * PROGRAMS):
        one = tl.load(listed + i_l)
        other = tl.load(listed + tl.minimum(i_l + 1, total - 1))
        together = one // n % MOST // (MOST // SETS) == other // n % MOST // (MOST // SETS)
        for i_turn in tl.range(0, tl.where(together, 1, 2)):
            x_1 = tl.where(i_turn == 0, one, other)
            x_2 = tl.where(together, other, x_1)
            p_1, p_out_1, i_s = places_of(x, out, x_1, start, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, HEADS, SETS)
            p_2, p_out_2, _ = places_of(x, out, x_2, start, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, HEADS, SETS)
            hash_vectors(
                p_1, p_2, w0, b0, w1, b1, w2, b2, p_out_1, p_out_2, so_w, i_s,
                D, H0, H1, BITS, BD, B0, B1, BB, True,
            )  # fmt: skip


@triton.jit
def places_of(x, out, i_bhn, start, n, sx_b, sx_h, sx_n, so_b, so_h, so_n, HEADS: tl.constexpr, SETS: tl.constexpr):
    """(a listed key, its hash, its MLP)."""
    MOST: tl.constexpr = max(HEADS, SETS)
    i_bh, i_k = i_bhn // n, (start + i_bhn % n).to(tl.int64)
    i_b, i_h = (i_bh // MOST).to(tl.int64), i_bh % MOST
    p_x = x + i_b * sx_b + (i_h // (MOST // HEADS)).to(tl.int64) * sx_h + i_k * sx_n
    return p_x, out + i_b * so_b + i_h.to(tl.int64) * so_h + i_k * so_n, i_h // (MOST // SETS)
