"""SOCKET: keys ranked by soft collisions of locality-sensitive hashes (arXiv 2602.06283)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sah_transformers.budget import check_number
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import Context
from sah_transformers.selections import Estimated, Selection

WORD = 32

GRID = 2.0**-12
MOST = 2**15 - 129
"""Hyperplanes are whole multiples of ``GRID``, at most ``MOST`` of it: two bytes, each with a sign, hold them."""

ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Projections held at once, per device type."""


@dataclass(frozen=True)
class SocketMaskerConfig(TopKMaskerConfig):
    """Config of ``SocketMasker``.

    Attributes:
        K: hyperplanes per table, 1 to 16: ``2**K`` buckets.
        L: hash tables.
        tau: temperature of a query's bucket probabilities; towards 0 only equal buckets collide.
    """

    type: ClassVar[str] = "socket"
    K: int = 12
    L: int = 60
    tau: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule, most in (("K", "an int from 1 to 16", 16), ("L", "an int >= 1", math.inf)):
            value = getattr(self, name)
            check_number(name, value, rule)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        check_number("tau", self.tau, "a number > 0")
        if self.tau <= 0:
            raise ValueError(f"tau must be a number > 0, got {self.tau!r}")


@MaskerRegistry.register(SocketMaskerConfig)
class SocketMasker(TopKMasker):
    """Selects the keys that collide most with the query, times the norm of their value.

    Each of L tables has K random hyperplanes W. A key falls into the bucket of its signs ``c = sign(W k)`` (0 counts
    as +). A query is in every bucket r with probability ``p(r) = prod_p sigmoid(2 h_p c_rp / tau)``, the softmax of
    ``h·c_r / tau`` over all buckets, where ``h = tanh(W q)``. The score of a key is the sum over tables of
    p(its bucket), times ``|v|``; under ``gqa: "group"`` these are summed over the heads.

    The authors' description has this ``h``, their code divides it by ``sqrt(D)``, which is the same as ``sqrt(D)``
    times ``tau``. On a real model (SmolLM2-135M, 1.5K tokens of three texts, D = 64, ``tau`` 0.3, 5 % of the keys
    besides 4 first and 48 last) attention's output is off by 28 to 30 % undivided and by 37 to 41 % divided: flatter
    probabilities rank keys by ``|v|`` alone. So it is not divided here.

    Side data, per key and KV head: ``buckets``, int32 ``[B, G, K, ceil(L * K / 32)]``: the sign of plane p of table l
    is bit ``i % 32`` of word ``i // 32``, ``i = l * K + p``; and ``norm``, float32 ``[B, G, K]``. 96 bytes for
    60 tables of 12 planes.
    """

    config: SocketMaskerConfig
    group_reduce = "sum"
    apart = ("buckets",)

    def describe(self) -> Selection:
        options = (("planes", self.config.K), ("tables", self.config.L), ("tau", self.config.tau))
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "sum", "socket", options)

    def given(self, ctx: Context, dim: int, device: torch.device) -> Any:
        from sah_transformers.kernels.approximate.socket import given_of

        return given_of(self.config, ctx.layer_idx, dim, device)

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        """Buckets and value norms of new keys."""
        planes = hyperplanes(ctx.layer_idx, self.config.L, self.config.K, keys.shape[-1], keys.device)
        planes = planes.flatten(0, 1).transpose(0, 1)  # [D, L * K]
        limit = ELEMENTS["cuda" if keys.device.type == "cuda" else "cpu"]
        step = max(1, limit // max(1, keys.shape[:2].numel() * planes.shape[1]))
        words = [pack(snap(part) @ planes >= 0) for part in keys.split(step, dim=2)]
        norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).float()
        return {"buckets": torch.cat(words, dim=2), "norm": norm}

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        """In float64, one table after the other: nothing needs a second look, and memory is that of the scores.

        A key copies the probabilities of its bucket for all rows at once, which lie side by side.
        """
        buckets, norm = ctx.side["buckets"], ctx.side["norm"].double()
        batch, groups, size = norm.shape
        heads, rows, dim = queries.shape[1:]
        each = heads // groups * rows
        folded = queries.double().reshape(batch, groups, each, dim)
        planes = hyperplanes(ctx.layer_idx, self.config.L, self.config.K, dim, queries.device)
        half = self.config.K // 2
        scores = folded.new_zeros(batch * groups * size, each)
        for table in range(self.config.L):
            soft = soft_hash(folded, planes[table])
            bucket = unpack(buckets, table, self.config.K)  # [B, G, K]
            low = of_buckets(probabilities(soft[..., :half], self.config.tau), bucket & (2**half - 1))
            scores += low.mul_(of_buckets(probabilities(soft[..., half:], self.config.tau), bucket >> half))
        scores = scores.view(batch, groups, size, each).mul_(norm[..., None])
        return scores.transpose(-1, -2).reshape(batch, heads, rows, size)


@functools.lru_cache(maxsize=1024)
def hyperplanes(layer_idx: int, tables: int, planes: int, dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The hyperplanes of a layer, ``[L, K, D]`` in float64: the same for all heads, devices and runs.

    Standard normal numbers drawn in float32 on the CPU, in whole multiples of ``GRID``: their products with a key on a
    grid (``snap``) are exact, and a sign does not depend on how a matrix product was tiled. Of 1e15 numbers one would
    lie beyond ``MOST``, at 7.97.
    """
    generator = torch.Generator().manual_seed(layer_idx)
    drawn = torch.randn(tables, planes, dim, generator=generator, dtype=torch.float32)
    return ((drawn.double() / GRID).round().clamp(-MOST, MOST) * GRID).to(device)


def snap(keys: torch.Tensor) -> torch.Tensor:
    """Keys ``[..., D]`` in whole numbers up to 2**30, each key in a unit of its own, in float64; NaN and Inf are 0."""
    keys = keys.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = keys.abs().amax(-1, keepdim=True)
    power = torch.where(largest > 0, largest / torch.frexp(largest)[0], 1.0)  # of two, above the largest
    return (keys / (power * 2.0**-30).clamp(min=2.0**-960)).round()


def soft_hash(queries: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """``h = tanh(W q)``: queries ``[..., D]`` and the planes ``[K, D]`` of a table give ``[..., K]``."""
    return torch.tanh(queries @ planes.transpose(0, 1))


def probabilities(soft: torch.Tensor, tau: float) -> torch.Tensor:
    """``prod_p sigmoid(2 h_p c_rp / tau)`` of every corner r, ``[..., n]`` to ``[..., 2**n]``: bit p of r for + in p.

    Products in one fixed order, element by element: equal queries give equal bits.
    """
    table = soft.new_ones(*soft.shape[:-1], 1)
    for logit in (2 / tau * soft).unbind(-1):
        table = torch.cat([table * torch.sigmoid(-logit)[..., None], table * torch.sigmoid(logit)[..., None]], dim=-1)
    return table


def of_buckets(table: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
    """The column of ``table [B, G, R, n]`` that each of the keys' ``bucket [B, G, K]`` names: ``[B * G * K, R]``."""
    columns = table.transpose(-1, -2).flatten(0, 2)  # [B * G * n, R]
    first = torch.arange(0, len(columns), table.shape[-1], device=bucket.device)
    return columns.index_select(0, (bucket + first.view(*bucket.shape[:2], 1)).flatten())


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bits ``[..., n]`` 32 to an int32, ``[..., ceil(n / 32)]``: bit i is bit ``i % 32`` of word ``i // 32``."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    words = (bits.long() << torch.arange(WORD, device=bits.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(words: torch.Tensor, table: int, planes: int) -> torch.Tensor:
    """The bucket of each key in a table, int64 ``[...]``, from ``words [..., n]``."""
    word, shift = divmod(table * planes, WORD)
    bucket = (words[..., word].long() & (2**WORD - 1)) >> shift
    if shift + planes > WORD:
        bucket = bucket | ((words[..., word + 1].long() & (2**WORD - 1)) << (WORD - shift))
    return bucket & (2**planes - 1)
