"""How much of dense attention's mass the selected keys hold, over all keys and over the needle's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sah_transformers.attention import Call, run
from sah_transformers.kernels.dispatch import fast_attention
from sah_transformers.kernels.masked_attention.reference import HIDDEN, softmax_of
from sah_transformers.mask import Mask
from sah_transformers.record import attached


class Mass:
    """Receives the calls of a model's attention modules and adds up what their selections hold.

    Attributes:
        rows: per layer, the number of sparse queries so far.
    """

    def __init__(self, needle: range = range(0)):
        self.needle = needle
        self.rows: Counter[int] = Counter()
        self._sums = torch.zeros(6, dtype=torch.float64)  # visible, active, recall, rows; needle: held, all
        self._length = 0  # of the sequence: what the longest layer holds

    @property
    def density(self) -> float | None:
        """Share of the visible keys that were active; None where nothing was sparse."""
        return self._share(1, 0)

    @property
    def recall(self) -> float | None:
        """Dense softmax mass that the active keys hold, mean over the sparse rows."""
        return self._share(2, 3)

    @property
    def needle_recall(self) -> float | None:
        """The dense mass on the needle's keys that is held, of all that the sparse rows put there.

        A sum over rows and heads before the division: the few heads that read the needle decide.
        """
        return self._share(4, 5)

    def _share(self, part: int, whole: int) -> float | None:
        sums = self._sums.tolist()
        return sums[part] / sums[whole] if sums[whole] else None

    def sparse(
        self, layer_idx: int, make: Callable[[], Call], side_bytes: Callable[[], float], weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a sparse call and measure its selection."""
        call = make()
        masks: list[Mask] = []
        fast = None if weights else fast_attention(call)
        if fast is None:
            out, given = run(call, return_weights=weights, masks=masks)
        else:
            out, given, masks = fast, None, call.masks()
        self.rows[layer_idx] += call.shape[2]
        self._length = max(self._length, call.shape[3])
        self._measure(call, masks)
        return out, given

    def dense(self, layer_idx: int, queries: int, keys: int, attend: Callable[[], Any]) -> Any:
        """Run a dense call; it loses nothing and is not counted."""
        self._length = max(self._length, keys)
        return attend()

    @torch.no_grad()
    def _measure(self, call: Call, masks: list[Mask]) -> None:
        for (start, stop), mask in zip(call.blocks(), masks, strict=True):
            rows = call.rows(start, stop, call.queries[:, :, start:stop], call.keys, call.values)
            scores, active = rows.scores(), mask.active()
            if rows.visible is not None:
                scores, active = scores.masked_fill(~rows.visible, HIDDEN), active & rows.visible
            weights = softmax_of(scores, call.block_sinks(start, stop))
            mass, held = weights.sum(-1), weights * active
            recall = held.sum(-1) / mass.masked_fill(mass == 0, 1.0)
            first = self._length - call.shape[3]  # a layer with a window has dropped the keys before
            at = [key - first for key in self.needle if 0 <= key - first < rows.shape[-1]]
            parts = [rows.counts.expand(*rows.shape[:3], 1).sum(), active.sum(), recall.sum(), (mass > 0).sum()]
            parts += [held[..., at].sum(), weights[..., at].sum()]
            self._sums += torch.stack([part.double().cpu() for part in parts])


@contextmanager
def measuring(model: Any, needle: range = range(0)) -> Iterator[Mass]:
    """Measure every sparse call of ``model``; ``needle`` are the positions of the needle's tokens."""
    from sah_transformers.integration.models import attention_modules

    mass = Mass(needle)
    with attached([module for _, module in attention_modules(model)], mass):
        yield mass
