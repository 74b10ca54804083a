"""Random sampling: a uniform sample of the keys, the baseline of vAttention (arXiv 2510.05688)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.budget import check_number, most, resolve_budget
from sah_transformers.kernels.select import select_top_k
from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.rows import Rows

MOST_SEED = 2**62

GOLDEN, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants as int64."""


@dataclass(frozen=True)
class RandomSamplingMaskerConfig(MaskerConfig):
    """``sampling_rate``: the share of the candidates that a row takes; ``seed``: which ones.

    A candidate is a visible key that is not yet active.
    """

    type: ClassVar[str] = "random_sampling"
    sampling_rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        rule = "a float in (0, 1] (a share of the candidates)"
        check_number("sampling_rate", self.sampling_rate, rule)
        if not isinstance(self.sampling_rate, float) or not 0.0 < self.sampling_rate <= 1.0:
            raise ValueError(f"sampling_rate must be {rule}, got {self.sampling_rate!r}")
        check_number("seed", self.seed, "an int from 0 to 2**62")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed must be an int from 0 to 2**62, got {self.seed!r}")


@MaskerRegistry.register(RandomSamplingMaskerConfig)
class RandomSamplingMasker(Masker):
    """Selects ``m = max(1, int(sampling_rate * c))`` of a row's ``c`` candidates, each with weight ``m / c``.

    Without replacement: the ``m`` candidates with the largest ``uniform`` numbers, the lower position first among
    equals. These hang on the seed, the layer, the global query head and the positions of the row's last visible key
    and of the key alone, so that chunks, padding, batch and device do not matter.
    """

    config: RandomSamplingMaskerConfig
    needs_positions = True

    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        context, rate = rows.context, self.config.sampling_rate
        assert context.positions is not None
        keys = context.positions[:, None, None]  # [B, 1, 1, K]
        last = (keys if rows.visible is None else torch.where(rows.visible, keys, -1)).amax(-1, keepdim=True)
        heads = context.head_offset + torch.arange(rows.shape[1], device=keys.device)[:, None, None]
        numbers = uniform(self.config.seed, context.layer_idx, heads, last, keys)
        candidates = rows.candidates(active)
        count = rows.counts if candidates is None else candidates.sum(-1, keepdim=True)
        size = resolve_budget(rate, count)
        taken, _ = select_top_k(numbers.expand(rows.shape), candidates, size, max(1, most(rate, rows.shape[-1])))
        return taken * (size.double() / count.clamp(min=1)).float()


def uniform(*counters: torch.Tensor | int) -> torch.Tensor:
    """Numbers in [0, 1), multiples of 2**-53 in float64, that hang on the counters alone.

    Args:
        counters: int64 tensors that broadcast, and ints.
    """
    state = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        state = mixed(state + counter + GOLDEN)
    return ((state >> 11) & (2**53 - 1)).double() * 2.0**-53


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on the bits of int64; products wrap."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
