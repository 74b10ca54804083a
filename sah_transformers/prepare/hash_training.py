"""Training HashAttention's two MLPs of one layer (arXiv 2412.14468), and how well their codes find the best keys.

The objective is the authors': soft codes tanh(MLP(x)), score = their dot product, binary cross-entropy of
sigmoid(score - threshold) against whether the key is one of the ``top`` best by exact score; Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from sah_transformers.maskers.hash_attention import mlp_outputs
from sah_transformers.maskers.hash_weights import DEPTH, Mlp

HELD_OUT = 8
"""One of so many rows is never trained on: the last ones of each block."""

MEASURED_BLOCKS = 4

NEAR = 0.1
"""The share of the candidates among which ``Recall.near`` looks for the best keys."""


@dataclass(frozen=True)
class HashSettings:
    """How the hashes are trained.

    Attributes:
        bits, hidden: the MLPs map D to hidden to hidden to bits.
        shared: one pair of MLPs per KV head instead of one per query head.
        steps, lr: of Adam, per layer.
        rows: queries per step.
        top: how many keys count as the best ones of a row.
        sink, local: how many first and last visible keys are no candidates, because other maskers take them.
        alpha: weight of a best key in the loss; any other candidate has 1.
        threshold: subtracted from the soft score.
        seed: of the first weights and of the rows.
    """

    bits: int = 32
    hidden: int = 128
    shared: bool = False
    steps: int = 300
    lr: float = 1e-3
    rows: int = 256
    top: int = 32
    sink: int = 128
    local: int = 128
    alpha: float = 20.0
    threshold: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("steps", "sink", "local", "threshold", "seed") else 1
            least = 2 if field.name == "hidden" else least
            if field.type == "int" and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} must be an int >= {least}, got {value!r}")
            if field.type == "float" and not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value!r}")
        if self.lr <= 0 or self.alpha <= 0:
            raise ValueError(f"lr and alpha must be positive, got {self.lr!r} and {self.alpha!r}")

    def trained_rows(self, block: int) -> range:
        """The rows of a block that are trained on: from the first with ``top`` candidates to the held-out ones.

        Raises:
            ValueError: where there are none.
        """
        start, stop = self.sink + self.local + self.top, block - max(1, block // HELD_OUT)
        if start >= stop:
            raise ValueError(
                f"block must be larger for sink {self.sink}, local {self.local} and top {self.top}: of {block} tokens "
                f"the last {block - stop} are held out, and the {stop} before them leave no row with {self.top} "
                "candidates"
            )
        return range(start, stop)


@dataclass(frozen=True)
class Recall:
    """Of held-out rows: the loss; the share of the ``top`` best keys that are among as many, and among the best 10 %,
    by the codes; both for random planes too."""

    loss: float
    same: float
    near: float
    planes_same: float
    planes_near: float


def as_mlp(tensors: Sequence[torch.Tensor]) -> Mlp:
    """(weight, bias) of each of an MLP's layers."""
    return tuple((tensors[2 * i], tensors[2 * i + 1]) for i in range(DEPTH))


def best_keys(
    queries: torch.Tensor, keys: torch.Tensor, rows: range, settings: HashSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys are candidates and which of them the best by exact score.

    Args:
        queries: ``[H, q, D]``, the rows' own; keys: ``[G, K, D]`` of the whole block.

    Returns:
        (candidates bool ``[q, K]``, best bool ``[H, q, K]``).
    """
    at, key = torch.tensor(rows, device=keys.device)[:, None], torch.arange(keys.shape[1], device=keys.device)
    candidates = (key >= settings.sink) & (key <= at - settings.local) & (key <= at)
    grouped = queries.unflatten(0, (keys.shape[0], -1))
    scores = (grouped @ keys[:, None].transpose(-1, -2)).flatten(0, 1).masked_fill(~candidates, -math.inf)
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(-1, scores.topk(min(settings.top, scores.shape[-1]), dim=-1).indices, True)
    return candidates, best & candidates


def soft_scores(queries: torch.Tensor, keys: torch.Tensor, weights: dict[str, Any]) -> torch.Tensor:
    """Dot products of the soft codes ``[H, q, K]``; differentiable."""
    sides = {"q": queries, "k": keys}
    codes = {side: torch.tanh(mlp_outputs(x[None], as_mlp(weights[side]))[0]) for side, x in sides.items()}
    share = codes["q"].shape[0] // codes["k"].shape[0]
    return codes["q"] @ codes["k"].repeat_interleave(share, dim=0).transpose(-1, -2)


def loss_of(
    queries: torch.Tensor, keys: torch.Tensor, rows: range, weights: dict[str, Any], settings: HashSettings
) -> torch.Tensor:
    """The loss of some rows of a block: its mean over candidates."""
    last = max(rows) + 1
    keys = keys[:, :last]
    candidates, best = best_keys(queries, keys, rows, settings)
    scores = soft_scores(queries, keys, weights) - settings.threshold
    weight = candidates * torch.where(best, settings.alpha, 1.0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, best.float(), weight, reduction="sum")
    return loss / (candidates.sum() * len(scores))


def rows_of_step(settings: HashSettings, layer: int, step: int, blocks: int, block: int) -> tuple[int, range]:
    """(number of the block, rows) of a step: drawn from the seed, the layer and the step alone."""
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + layer) * 1_000_003 + step)
    allowed = settings.trained_rows(block)
    number = int(torch.randint(blocks, (), generator=generator))
    room = max(0, len(allowed) - settings.rows)
    start = allowed.start + int(torch.randint(room + 1, (), generator=generator))
    return number, range(start, min(start + settings.rows, allowed.stop))


@torch.no_grad()
def measure(
    queries: torch.Tensor, keys: torch.Tensor, weights: dict[str, Any], settings: HashSettings, layer: int
) -> Recall:
    """Loss and recall of the held-out rows of some of the blocks ``[N, H, n, D]``, ``[N, G, n, D]``."""
    count, _, block, dim = queries.shape
    allowed = settings.trained_rows(block)
    held_out = range(allowed.stop, block)
    rows = held_out[:: -(-len(held_out) // settings.rows)]  # no more at once than a step has
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer)
    planes = torch.randn(dim, settings.bits, generator=generator).to(keys.device)
    sums = [0.0] * 5
    measured = range(0, count, max(1, count // MEASURED_BLOCKS))
    for number in measured:
        q, k = queries[number][:, list(rows)].float(), keys[number].float()
        candidates, best = best_keys(q, k, rows, settings)
        sums[0] += float(loss_of(q, k, rows, weights, settings))
        learned_q, learned_k = (mlp_outputs(x[None], as_mlp(weights[side]))[0] for side, x in (("q", q), ("k", k)))
        for at, q_code, k_code in ((1, learned_q, learned_k), (3, q @ planes, k @ planes)):
            same, near = found(q_code, k_code, candidates, best)
            sums[at] += same
            sums[at + 1] += near
    return Recall(*(one / len(measured) for one in sums))


def found(
    queries: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor
) -> tuple[float, float]:
    """The share of the ``best`` keys that are among as many, and among the best 10 %, by the signs of codes.

    Args:
        queries, keys: the numbers whose signs are the codes, ``[H, q, bits]``, ``[S, K, bits]``.
    """
    signs = [torch.where(x >= 0, 1.0, -1.0) for x in (queries, keys)]
    scores = signs[0] @ signs[1].repeat_interleave(len(queries) // len(keys), dim=0).transpose(-1, -2)
    key = torch.arange(scores.shape[-1], device=scores.device)
    scores = (scores.double() * len(key) - key).masked_fill(~candidates, -math.inf)  # the lowest index among equals
    many = best.sum(-1, keepdim=True)
    wide = torch.maximum(many, (candidates.sum(-1)[:, None] * NEAR).ceil().long())
    ranked = best.gather(-1, scores.topk(int(wide.max()), dim=-1).indices)
    place = torch.arange(ranked.shape[-1], device=ranked.device)
    total = many.sum().clamp(min=1)
    return float((ranked & (place < many)).sum() / total), float((ranked & (place < wide)).sum() / total)
