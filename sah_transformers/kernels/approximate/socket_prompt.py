"""SOCKET's side data of many keys: the bits of `maskers.socket`, whose sums of whole numbers are exact.

A key's numbers, at most 2**30, are cut into four digits of a byte each, a plane's, less than 2**15, into two, so that a
projection is eight products of bytes, summed exactly by the tensor cores. Only its sign is needed: products of equal
weight are added to what the lower ones carry, a sum divided by 256 and rounded down, and the last sum has the sign of
the whole. So 32 bits are enough, and a thread holds one number per projection. Keys are read as they are and snapped
in registers; digits of planes come from the L2 cache.

32,768 keys, G=8, D=128, L=60, K=12, H100. 412 G operations on bytes are 0.21 ms at full speed. A warp of 16 keys takes
1,280 instructions to snap and cut them, 680 for the norms of their values, and 650 per 128 planes besides 32 products
of matrices (10 per projection of a thread, 4 of them carries): 0.12 ms, beside the products as long as an SM has two
programs. 160 MB from and to memory are 60 us, 0.8 GB of planes' digits from the L2 cache 0.15 ms. **0.3 to 0.45 ms**
were expected, 0.46 measured; PyTorch, which wrote all projections in float64, took 7.7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sah_transformers.kernels.approximate.k_means import unit_of
from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.decode.values import power_above
from sah_transformers.maskers.socket import GRID, MOST

TILE, WARPS, STAGES = 64, 4, 2
PLANES = 128
"""Planes at once, half as many of more than 128 dimensions."""
assert MOST == 127 * 256 + 127


def digits_of(planes: torch.Tensor) -> torch.Tensor:
    """Low and high digits of ``planes [L, K, D]`` in units of ``GRID``: int8 ``[2, >= L * K, >= D]``, filled with 0."""
    numbers = (planes.double().flatten(0, 1) / GRID).int()
    columns = max(32, power_of_2(planes.shape[2])) - planes.shape[2]
    numbers = torch.nn.functional.pad(numbers, (0, columns, 0, -len(numbers) % PLANES))
    high = (numbers + 128) >> 8
    return torch.stack([numbers - (high << 8), high]).to(torch.int8)


def append_many(
    keys: torch.Tensor, values: torch.Tensor, words: torch.Tensor, norm: torch.Tensor, digits: torch.Tensor, bits: int
) -> None:
    """Buckets of ``keys [B, G, n, D]`` and norms of ``values [B, G, n, Dv]``.

    Args:
        words: int32 ``[B, G, n, ceil(bits / 32)]``, norm: float32 ``[B, G, n]``, both written; any strides.
        digits: of `digits_of`; bits: planes in all.
    """
    batch, groups, n, dim = keys.shape
    unit = min(unit_of(keys), unit_of(values))
    _, planes, width = digits.shape
    value_width = power_of_2(values.shape[3])
    Direct()(
        prompt_kernel, (-(-n // TILE), batch * groups, 1),
        keys, values, digits, words, norm, n, *(s // unit for s in (*keys.stride()[:3], *values.stride()[:3])),
        *words.stride()[:2], words.stride(3), *norm.stride(),
        G=groups, BITS=bits, PLANES=planes, D=dim, DV=values.shape[3], STEP=words.stride(2), UNIT=unit, BD=width,
        BV=value_width, BN=TILE, BP=min(PLANES, 2**14 // width), STAGES=STAGES,
        warps=WARPS * max(1, max(width, value_width) // 128),
    )  # fmt: skip


@triton.jit
def digits_of_keys(b_x):
    """Four digits, int8 each, from the lowest on, of keys ``[BN, BD]`` in whole numbers up to 2**30, a unit per key.

    Three bytes with their middle added have a digit each, and 128 more: ``0x808080`` in all.
    """
    power = power_above(tl.max(tl.abs(b_x), 1).to(tl.float64)).to(tl.int64, bitcast=True) >> 52
    scale = ((2076 - power) << 52).to(tl.float64, bitcast=True)  # 2**30 / power, exponents have 1023 added
    b_x = b_x.to(tl.float64) * scale[:, None] + 6755399449477248.0  # 2**52 + 2**51 + 0x808080: whole, to even
    b_x = b_x.to(tl.int64, bitcast=True).to(tl.int32) ^ 0x808080
    return b_x.to(tl.int8), (b_x >> 8).to(tl.int8), (b_x >> 16).to(tl.int8), (b_x >> 24).to(tl.int8)


@triton.jit
def carried(b_s, x_high, w_low, x_low, w_high):
    """Products of the next weight and what ``b_s``, the sum of a lower one, carries: int32 ``[BN, BP]``."""
    b_s = tl.dot(x_high, w_low, b_s >> 8, out_dtype=tl.int32)
    return tl.dot(x_low, w_high, b_s, out_dtype=tl.int32)


@triton.jit(
    do_not_specialize=[
        "n", "sk_b", "sk_g", "sk_n", "sv_b", "sv_g", "sv_n", "sw_b", "sw_g", "sw_w", "sn_b", "sn_g", "sn_n"
    ]
)  # fmt: skip
def prompt_kernel(
    keys, values, digits, words, norm, n, sk_b, sk_g, sk_n, sv_b, sv_g, sv_n, sw_b, sw_g, sw_w, sn_b, sn_g, sn_n,
    G: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All words of ``BN`` keys of a KV head, ``BP`` planes at a time, and the norms of their values."""
    i_n, i_bg = tl.program_id(0), tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_d, o_v, o_p, o_w = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BP), tl.arange(0, BP // 32)
    m_n = o_n < n
    p_x = keys + (i_b * sk_b + i_g * sk_g) * UNIT + o_n[:, None] * (sk_n * UNIT) + o_d[None, :]
    b_x = tl.load(p_x, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    x_0, x_1, x_2, x_3 = digits_of_keys(tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0))  # neither NaN nor Inf
    p_words = words + i_b * sw_b + i_g * sw_g + o_n[:, None] * STEP
    for i_p in tl.range(0, BITS, BP, num_stages=STAGES):
        p_digit = digits + (i_p + o_p)[None, :] * BD + o_d[:, None]
        w_0, w_1 = tl.load(p_digit), tl.load(p_digit + PLANES * BD)
        b_s = tl.dot(x_0, w_0, out_dtype=tl.int32)
        b_s = carried(b_s, x_1, w_0, x_0, w_1)
        b_s = carried(b_s, x_2, w_0, x_1, w_1)
        b_s = carried(b_s, x_3, w_0, x_2, w_1)
        b_s = tl.dot(x_3, w_1, b_s >> 8, out_dtype=tl.int32)
        b_bit = tl.where(i_p + o_p < BITS, 1 << (o_p % 32), 0)
        b_bit = tl.where(b_s >= 0, b_bit[None, :], 0)
        p_word = p_words + (i_p // 32 + o_w).to(tl.int64)[None, :] * sw_w
        m_w = m_n[:, None] & (i_p + o_w * 32 < BITS)[None, :]
        tl.store(p_word, tl.sum(tl.reshape(b_bit, [BN, BP // 32, 32]), 2), mask=m_w)
    p_v = values + (i_b * sv_b + i_g * sv_g) * UNIT + o_n[:, None] * (sv_n * UNIT) + o_v[None, :]
    b_v = tl.load(p_v, mask=m_n[:, None] & (o_v < DV)[None, :], other=0.0).to(tl.float64)
    p_norm = norm + i_b * sn_b + i_g * sn_g + o_n * sn_n
    tl.store(p_norm, tl.sqrt(tl.sum(b_v * b_v, 1)).to(tl.float32), mask=m_n)
