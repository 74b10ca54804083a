"""Weights of HashAttention's MLPs cut into two half-precision parts, and what bounds the error of products with them.

A row of weights times a power of two, its unit, is a whole number of at most 11 bits, ``high``, and a rest in
[-1/2, 1/2] rounded to half precision, ``low``. Vectors ``x`` are cut alike, by a unit ``u`` of their own, so that

    |high of x| <= 2**11,  |high of a row| <= 2**13  (2-norms)

and every partial sum of products of the two is a whole number below 2**24 (Cauchy-Schwarz): float32 sums are exact in
any order. The other three products, a thousandth of that, are summed apart.

Bound. Let a layer get ``x + d`` where float64 has ``x``, |d| <= e, n >= |x + d|, r the rest of ``x + d`` before it is
rounded, v >= u |r|, K numbers, and let D be what the parts of W miss, L and H its parts, in W's units. The error of
``W x + b`` is at most, in the 2-norm over the outputs (matrices: spectral norm; Frobenius where it says F),

    |W| (e + 2**-11 v)                      what came in, less what its parts miss (nothing of keys in half precision)
  + |D| n + |W| 2**-25 K**.5 u              what the weights' parts miss; subnormal parts, u <= 2**-9.9 n
  + 4 K 2**-23 (|L|F n + (|H|F + |L|F) v)   sums of 3 K products; tensor cores cut off addends at 2**-23 of the largest
  + 2**-22 (|W| n + |b|) + 2**-100          three roundings; underflow

and, of one output, the same with norms of its row. |silu'| <= 1.1; SiLU itself (an exponential of 2 units in the last
place, of an argument rounded twice, a sum, a quotient of 2 units) adds 2**-23 K**.5 + 1.25 * 2**-22 |y|, whose last
part counts for the next layer's n. All is linear, ``e' = gain (e + 2**-11 v) + c1 n + c2 v + c0``. Kernels evaluate it
in float32, norms are rounded, units do not quite reach their limits: everything is enlarged by 2 %.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.maskers.hash_weights import Mlp

ROUNDS = 6
"""Squarings that bound a spectral norm, for 128 numbers 4 % too high."""

LARGER = 1.02
SLOPE = 1.1
"""More than the steepest slope of SiLU, 1.0998."""


class Digits(NamedTuple):
    """Layers of S MLPs, padded with zeros to powers of two.

    Attributes:
        parts: per layer, float16 ``[S, 2, in, out]``: high and low.
        rows: per layer, float32 ``[S, 4, out]``: unit, bias, and of the last: norm of a row, what its bias adds.
        bounds: float32 ``[S, 3, 4]``: gain, c1, c2, c0 of each layer; of the last in units of a row's norm.
    """

    parts: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]
    bounds: torch.Tensor


def sizes_of(mlp: Mlp) -> tuple[int, int, int, int]:
    """What the numbers of keys, of both hidden layers, and the bits are padded to."""
    dim, (first, second, bits) = mlp[0][0].shape[2], (bias.shape[1] for _, bias in mlp)
    least = max(16, power_of_2(dim)), max(16, power_of_2(first)), max(16, power_of_2(second))
    return *least, max(32, power_of_2(bits))


def digits_of(mlp: Mlp) -> Digits:
    """The parts of ``mlp``."""
    sizes = sizes_of(mlp)
    parts, rows, bounds = [], [], []
    for number, (weight, bias) in enumerate(mlp):
        w, b = weight.double(), bias.double()  # [S, out, in], [S, out]
        scale = scale_of(w)[..., None]
        high = (w * scale).round()
        low = (w * scale - high).half()
        missed = w - (high + low) / scale
        last = number == len(mlp) - 1
        spectral, frobenius = (norm_of_rows, norm_of_rows) if last else (spectral_norm, norm_of_all)
        gain = spectral(w)
        gain = torch.where(gain > 0, gain + 2.0**-60, gain)
        width = w.shape[2] ** 0.5
        summed = 4 * w.shape[2] * 2.0**-23
        of_high, of_low = frobenius(high / scale), frobenius(low / scale)
        c1 = spectral(missed) + summed * of_low + (2.0**-22 + 2.0**-34 * width) * gain
        c2 = summed * (of_high + of_low)
        if number:
            c1 = c1 + 1.25 * 2.0**-22 * gain
        pad = (0, sizes[number + 1] - w.shape[1])
        row = [1 / scale[..., 0], b]
        if last:
            other = torch.where((gain > 0) | (b != 0), 2.0**-22 * b.abs() + 2.0**-100, 0.0)
            row += [gain * LARGER, other * LARGER]
            c1, c2 = ((c / gain).nan_to_num(nan=0.0, posinf=torch.inf).amax(1) for c in (c1, c2))
            bound = torch.stack([torch.ones_like(c1), c1, c2, torch.zeros_like(c1)], dim=1)
        else:
            c0 = 2.0**-22 * b.norm(dim=1) + 2.0**-23 * w.shape[1] ** 0.5 + 2.0**-100
            bound = torch.stack([gain, c1, c2, c0], dim=1) * SLOPE
            row += [torch.zeros_like(b)] * 2
        bounds.append(bound * LARGER)
        rows.append(torch.nn.functional.pad(torch.stack(row, dim=1), pad).float())
        part = torch.stack([high.half(), low], dim=1).mT
        parts.append(torch.nn.functional.pad(part, (*pad, 0, sizes[number] - w.shape[2])).contiguous())
    return Digits(tuple(parts), tuple(rows), torch.stack(bounds, dim=1).float())


def scale_of(w: torch.Tensor) -> torch.Tensor:
    """The largest powers of two ``[S, out]`` that rows of ``w [S, out, in]`` may be multiplied by, up to 2**100."""
    most = torch.minimum(8100 / norm_of_rows(w), 2047 / w.abs().amax(2)).clamp(max=2.0**100)
    return most / (2 * torch.frexp(most).mantissa)


def norm_of_rows(w: torch.Tensor) -> torch.Tensor:
    return w.norm(dim=2)


def norm_of_all(w: torch.Tensor) -> torch.Tensor:
    return w.norm(dim=(1, 2))


def spectral_norm(w: torch.Tensor) -> torch.Tensor:
    """A bound on the largest singular values ``[S]`` of ``w``: traces of high powers of ``w^T w``."""
    power = w.mT @ w
    result = torch.ones_like(power[:, 0, 0])
    for number in range(ROUNDS + 1):
        trace = power.diagonal(dim1=1, dim2=2).sum(1)
        result = result * trace ** (0.5 / 2**number)
        power = power / trace[:, None, None].clamp(min=2.0**-1000)
        power = power @ power
    return result
