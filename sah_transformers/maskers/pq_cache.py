"""PQCache: keys ranked by their product-quantised scores (arXiv 2407.12820)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from sah_transformers.budget import check_number
from sah_transformers.kernels.append import attempt
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig
from sah_transformers.rows import Context, dot
from sah_transformers.selections import Estimated, Selection

GRID = 2**20
"""Sub-vectors are rounded to whole numbers up to this, the largest of the prompt's near it: then every product and
sum of the k-means is exact in float64, whatever the order, the padding, the chunk or the device."""

REACH = 8 * GRID
"""Larger sub-vectors, of later keys, are rounded to multiples of a power of two that keeps their sums exact too."""

LARGEST = 2.0**120
"""Numbers of keys from this on count as zero: centroids of sub-vectors near float32's end would be infinite."""

ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Distances held at once, per device type."""

KEYS_PER_CENTROID = 4


@dataclass(frozen=True)
class PQCacheConfig(TopKMaskerConfig):
    """Config of ``PQCache``.

    Attributes:
        pq_sub_dim: dimensions of a sub-vector: an int, or a share of the head dimension (0.5: two sub-vectors). Must
            divide the head dimension.
        pq_bits: bits of a code, 1 to 8: ``2**pq_bits`` centroids per sub-vector, one byte per sub-vector and key.
        kmeans_iter: iterations of the k-means.
        init_offset: the first keys of a sequence, left out of the k-means (attention sinks are outliers).
        metric: ``"euclidean"``; or ``"ip"``: the k-means sees every sub-vector with one more channel,
            ``sqrt(max(0, max_norm**2 - |k|**2))``, which makes all equally long.
    """

    type: ClassVar[str] = "pq_cache"
    gqa: Literal["head", "group"] = field(default="head", kw_only=True)
    pq_sub_dim: int | float
    pq_bits: int = 6
    kmeans_iter: int = 10
    init_offset: int = 4
    metric: Literal["euclidean", "ip"] = "euclidean"

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.pq_sub_dim, float)
        rule = "an int >= 1 (dimensions) or a float in (0, 1] (a share of the head dimension)"
        check_number("pq_sub_dim", self.pq_sub_dim, rule)
        if not (0.0 < self.pq_sub_dim <= 1.0 if share else self.pq_sub_dim >= 1):
            raise ValueError(f"pq_sub_dim must be {rule}, got {self.pq_sub_dim!r}")
        for name, least, most in (("pq_bits", 1, 8), ("kmeans_iter", 1, None), ("init_offset", 0, None)):
            value = getattr(self, name)
            rule = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
            check_number(name, value, rule)
            if not isinstance(value, int) or value < least or (most is not None and value > most):
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        if self.metric not in ("euclidean", "ip"):
            raise ValueError(f"metric must be 'euclidean' or 'ip', got {self.metric!r}")


@MaskerRegistry.register(PQCacheConfig)
class PQCache(TopKMasker):
    """Selects the keys whose decoded sub-vectors have the best inner products with the query.

    Per layer, sequence and KV head, at the first call with enough keys, each sub-vector gets a codebook: k-means over
    the sequence's real keys then in the cache after the first ``init_offset``, started from the ``c * n // C``-th of
    the n keys for centroid c of C, with a fixed number of iterations; an empty cluster keeps its centre, a key as
    near to two centroids is the lower one's. Every key then has the code of its nearest centroid per sub-vector, the
    first ``init_offset`` and those that come later too; centroids are not refitted before the cache is empty.

    The score of a key is ``scaling`` times the sum over sub-vectors of q·centroid. While a sequence has fewer than
    four keys per centroid its keys have no codes and score ``scaling * q·k``.

    With ``prefill: "dense"`` the fit is of the prompt that the first sparse call finds in the cache, if it has enough
    keys, however it was chunked and whatever comes with that call; with ``"same"`` it is at the first chunk that has
    enough keys, and sees the whole chunk.

    Side data: ``codes``, uint8 ``[B, G, K, M]`` for M sub-vectors. Prepared: ``centroids``, float32
    ``[B, G, M, C, S]`` (S the sub-vector's dimensions, one more for ``"ip"``), whole multiples of ``step``, float32
    ``[B, G, M]``, a power of two; for ``"ip"`` also ``radius``, float64 ``[B, G, M]``, the largest ``|k / step|**2``.

    Raises:
        ValueError: where the head dimension is no multiple of ``pq_sub_dim``.
    """

    config: PQCacheConfig
    prepared = ("centroids", "step", "radius")

    def parts(self, dim: int) -> int:
        """Sub-vectors of a key with ``dim`` dimensions."""
        width = self.config.pq_sub_dim if isinstance(self.config.pq_sub_dim, int) else self.config.pq_sub_dim * dim
        if width != int(width) or width < 1 or dim % int(width):
            raise ValueError(
                f"pq_sub_dim must divide the head dimension, got pq_sub_dim={self.config.pq_sub_dim!r} "
                f"and a head dimension of {dim}"
            )
        return dim // int(width)

    def check_layer(self, layer_idx: int, heads: int | None, dim: int | None) -> None:
        if dim is not None:
            self.parts(dim)

    def describe(self) -> Selection:
        options = (("bits", self.config.pq_bits),)
        return Estimated(self.config.heavy_size, self.config.gqa == "group", "softmax", "pq_cache", options)

    def given(self, ctx: Context, dim: int, device: torch.device) -> Any:
        from sah_transformers.kernels.approximate.pq_cache import given_of

        return given_of(ctx.side)

    def prepare(
        self, keys: torch.Tensor, values: torch.Tensor, ctx: Context
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Codebooks of the sequences that have enough keys and none yet."""
        batch, groups, total, dim = keys.shape
        count, parts, skipped = 2**self.config.pq_bits, self.parts(dim), self.config.init_offset
        assert ctx.positions is not None
        if not ctx.padded and total - skipped >= KEYS_PER_CENTROID * count:
            made = self.by_kernels(keys[:, :, skipped:], ctx)
            if made is not None:
                return made, torch.ones(batch, dtype=torch.bool, device=keys.device)
        fitted = ctx.positions >= skipped  # [B, K]; padding has -1
        ready = fitted.sum(-1) >= KEYS_PER_CENTROID * count
        width = dim // parts + (self.config.metric == "ip")
        data = {
            "centroids": keys.new_zeros(batch, groups, parts, count, width, dtype=torch.float32),
            "step": keys.new_ones(batch, groups, parts, dtype=torch.float32),
        }
        if self.config.metric == "ip":
            data["radius"] = keys.new_zeros(batch, groups, parts, dtype=torch.float64)
        missing = ready & ~ctx.side["ready"] if "ready" in ctx.side else ready
        for b in missing.nonzero().flatten().tolist():
            chosen = keys[b : b + 1][:, :, fitted[b]]  # [1, G, n, D]
            for name, tensor in (self.by_kernels(chosen, ctx) or self.fit(chosen)).items():
                data[name][b] = tensor[0]
        return data, ready

    def by_kernels(self, keys: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor] | None:
        """As ``fit``, of all sequences at once; None where there are no kernels for it."""
        count, iterations, parts = 2**self.config.pq_bits, self.config.kmeans_iter, self.parts(keys.shape[3])

        def run() -> dict[str, torch.Tensor] | None:
            from sah_transformers.kernels.approximate import k_means as kernels

            if self.config.metric == "ip" or not kernels.fits(keys, keys.shape[3] // parts):
                return None
            centroids, step = kernels.codebooks(keys, parts, count, iterations)
            return {"centroids": centroids, "step": step}

        return attempt(self, keys, ctx, run)

    def fit(self, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is made once of sequences, of ``keys [B, G, n, D]``."""
        points = split(keys, self.parts(keys.shape[3]))
        step = step_of(points)
        points, data = snap(points, step), dict[str, torch.Tensor]()
        if self.config.metric == "ip":
            data["radius"] = points.square().sum(-1).amax(-1)
            points = augment(points, data["radius"])
        centroids = k_means(points, 2**self.config.pq_bits, self.config.kmeans_iter)
        return data | {"centroids": (centroids * step[..., None, None]).float(), "step": step.float()}

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        """Codes of new keys; zeros while there is no codebook."""
        batch, groups, new, dim = keys.shape
        codes = torch.zeros(batch, groups, new, self.parts(dim), dtype=torch.uint8, device=keys.device)
        if new:
            encode(keys, ctx.side["centroids"], ctx.side["step"], ctx.side.get("radius"), codes)
        return {"codes": codes}

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        """In float64: keys with equal codes tie exactly, and nothing needs a second look."""
        codes, ready = ctx.side["codes"], ctx.side["ready"]
        batch, groups, size, parts = codes.shape
        heads, rows, dim = queries.shape[1:]
        folded = queries.double().reshape(batch, groups, heads // groups * rows, parts, dim // parts)
        centroids = ctx.side["centroids"][..., : dim // parts].double()  # without the channel of "ip"
        scores = queries.new_zeros(batch, groups, heads // groups * rows, size, dtype=torch.float64)
        for m in range(parts):
            table = folded[:, :, :, m] @ centroids[:, :, m].transpose(-1, -2)  # [B, G, H//G*q, C]
            code = codes[:, :, None, :, m].long().expand_as(scores)
            scores += table.gather(-1, code)
        scores = scores.view(batch, heads, rows, size)
        for b in (~ready).nonzero().flatten().tolist():
            scores[b] = dot(queries[b : b + 1].double(), keys[b : b + 1].double())[0]
        return scores.mul_(ctx.scaling)


def encode(
    keys: torch.Tensor, centroids: torch.Tensor, step: torch.Tensor, radius: torch.Tensor | None, codes: torch.Tensor
) -> None:
    """Codes of ``keys [B, G, n, D]`` into uint8 ``codes [B, G, n, M]``.

    Args:
        centroids: float32 ``[B, G, M, C, S]``, whole multiples of ``step [B, G, M]``; radius: float64 ``[B, G, M]``
            under ``ip``.
    """
    step = step.double()
    centroids = centroids.double() / step[..., None, None]
    for start, stop in blocks(keys.shape[2], centroids):
        points = snap(split(keys[:, :, start:stop], codes.shape[3]), step)
        points = points if radius is None else augment(points, radius)
        codes[:, :, start:stop] = nearest(points, centroids).transpose(-1, -2)


def split(keys: torch.Tensor, parts: int) -> torch.Tensor:
    """Sub-vectors ``[..., M, n, S]`` of keys ``[..., n, D]``, in float64; NaN and numbers from ``LARGEST`` on count
    as zero."""
    keys = keys.double()
    return torch.where(keys.abs() < LARGEST, keys, 0.0).unflatten(-1, (parts, -1)).transpose(-3, -2)


def power_above(numbers: torch.Tensor) -> torch.Tensor:
    """The power of two above each of ``numbers`` >= 0, exactly; 1 for 0."""
    return torch.where(numbers > 0, numbers / torch.frexp(numbers)[0], 1.0)


def step_of(points: torch.Tensor) -> torch.Tensor:
    """The power of two ``[..., M]`` that brings the numbers of ``points [..., M, n, S]`` below ``GRID``."""
    return power_above(points.abs().amax((-1, -2))).clamp(min=2.0**-100) / GRID


def snap(points: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``points [..., M, n, S]`` in whole numbers of ``step [..., M]``."""
    points = (points / step[..., None, None]).clamp(-(2.0**400), 2.0**400)
    coarse = (power_above(points.abs().amax(-1, keepdim=True)) / REACH).clamp(min=1)
    return (points / coarse).round() * coarse


def augment(points: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """``points [..., M, n, S]`` with the channel that makes those within ``radius [..., M]`` equally long."""
    missing = (radius[..., None] - points.square().sum(-1)).clamp(min=0).sqrt().round()
    return torch.cat([points, missing[..., None]], dim=-1)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest of ``centroids [..., C, S]`` to each of ``points [..., n, S]``, the lower of equals: ``[..., n]``.

    Both hold whole numbers in float64, so that distances are exact.
    """
    distances = points @ (-2 * centroids).transpose(-1, -2)
    return distances.add_(centroids.square().sum(-1)[..., None, :]).argmin(-1)


def k_means(points: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """``count`` centroids ``[..., count, S]`` of ``points [..., n, S]``, whole numbers in float64."""
    n = points.shape[-2]
    centroids = points[..., torch.arange(count, device=points.device) * n // count, :]
    first = torch.arange(0, centroids.shape[:-1].numel(), count, device=points.device).view(*points.shape[:-2], 1)
    for _ in range(iterations):
        sums, sizes = centroids.new_zeros(centroids.shape), centroids.new_zeros(*centroids.shape[:-1], 1)
        for start, stop in blocks(n, centroids):
            part = points[..., start:stop, :]
            cluster = (nearest(part, centroids) + first).flatten()
            sums.view(-1, sums.shape[-1]).index_add_(0, cluster, part.flatten(0, -2))
            sizes.view(-1).index_add_(0, cluster, sizes.new_ones(()).expand(len(cluster)))
        centroids = torch.where(sizes > 0, (sums / sizes.clamp(min=1)).round(), centroids)
    return centroids


def blocks(n: int, centroids: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of ``n`` keys whose distances to ``centroids [..., C, S]`` are about ``ELEMENTS``."""
    limit = ELEMENTS["cuda" if centroids.device.type == "cuda" else "cpu"]
    step = max(1, limit // max(1, centroids.shape[:-1].numel()))
    return [(start, min(start + step, n)) for start in range(0, n, step)]
