"""Shared machinery of maskers that take the best-scored keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sah_transformers.budget import Budget, check_budget, most, resolve_budget
from sah_transformers.kernels.select import select_top_k
from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.rows import SCORE_EPS, Context, Rows, by_group


def check_gqa(value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a GQA mode."""
    if value not in ("head", "group"):
        raise ValueError(f"gqa must be 'head' (each query head selects) or 'group' (each KV head), got {value!r}")


@dataclass(frozen=True)
class TopKMaskerConfig(MaskerConfig):
    """Config of a top-k masker.

    Attributes:
        heavy_size: budget of the selection, a number of keys or a share of the row's visible keys.
        gqa: ``"head"``: each query head selects; ``"group"``: once per KV head, by the summed estimates.
    """

    heavy_size: Budget
    gqa: Literal["head", "group"] = "head"

    def __post_init__(self) -> None:
        check_budget("heavy_size", self.heavy_size)
        check_gqa(self.gqa)


class ScoredMasker(Masker):
    """A masker that ranks keys by an estimate of their score; ``score`` is all a method has to write."""

    group_reduce: ClassVar[Literal["softmax", "sum"]] = "softmax"
    """``gqa="group"``: sum each head's softmax of the scores over its visible keys, or the raw scores."""

    rounds: ClassVar[bool] = True
    """Whether scores carry rounding errors. False (whole numbers) skips the float64 check of close cuts."""

    @abstractmethod
    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Estimated scores.

        Called in the model's dtype for all rows, and again in float64 for the few rows whose cut lies between
        scores closer than rounding, so that the selection does not depend on how a matrix product was tiled.

        Args:
            queries: ``[B, H, q, D]``; keys: ``[B, G, K, D]``; values: ``[B, G, K, Dv]``.
            ctx: layer, scaling, positions and the stored side data (``ctx.side``).

        Returns:
            ``[B, H, q, K]``, in float32 or better.
        """

    def row_scores(self, rows: Rows) -> torch.Tensor:
        """Scores ``[B, H, q, K]`` of a block of rows."""
        scores = self.score(rows.queries, rows.keys, rows.values, rows.context)
        if tuple(scores.shape) != rows.shape and not self.pages():  # scores of pages have their own form
            shapes = f"[B, H, q, K] = {list(rows.shape)}, got {list(scores.shape)}"
            raise ValueError(f"{type(self).__name__}.score must return {shapes}")
        return scores

    def score_error(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        """Bound on the rounding error of each row's scores, ``[B, H, q, 1]``."""
        low, high = scores.aminmax(dim=-1, keepdim=True)
        return SCORE_EPS * torch.maximum(low.abs(), high.abs())

    def group_candidates(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor | None:
        """Keys that some head of the group sees and has not active, bool ``[B|1, G|1, q, K]``; None = all."""
        candidates = rows.candidates(active)
        if candidates is None or candidates.shape[1] == 1:
            return candidates
        return by_group(candidates, rows.keys.shape[1]).any(dim=2)

    def group_mass(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        """Scores summed over the heads of each KV head, as ``group_reduce`` says, ``[B, G, q, K]``."""
        if self.group_reduce == "softmax":
            if rows.visible is not None:
                scores = scores.masked_fill(~rows.visible, float("-inf"))
            scores = scores.softmax(-1).nan_to_num(nan=0.0)
        return by_group(scores, rows.keys.shape[1]).sum(dim=2)

    def decide_exactly(
        self, rows: Rows, active: torch.Tensor | None, selected: torch.Tensor, undecided: torch.Tensor
    ) -> None:
        """Redo in float64, in place, the rows of ``selected`` ``[B, R, q, K]`` that ``undecided`` ``[B, R, q]`` marks.

        R is H or, for a selection per KV head, G.
        """
        ranks = undecided.shape[1]
        groups = rows.keys.shape[1]
        per_group = undecided.unflatten(1, (groups, ranks // groups)).any(dim=2)
        active = None if active is None else active.expand(rows.shape)
        for b, g in per_group.any(dim=-1).nonzero().tolist():
            index = per_group[b, g].nonzero().squeeze(-1)
            heads = slice(g * rows.group_size, (g + 1) * rows.group_size)
            part = slice(g * ranks // groups, (g + 1) * ranks // groups)
            known = None if active is None else active[b : b + 1, heads][:, :, index]
            chosen, _ = self.choose(rows.exact(b, g, index), known, exact=True)
            selected[b, part, index] = chosen.expand(1, part.stop - part.start, len(index), -1)[0]

    @abstractmethod
    def choose(self, rows: Rows, active: torch.Tensor | None, exact: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(selected ``[B, R, q, K]``, undecided ``[B, R, q]`` or None); ``exact`` rows are always decided."""

    def select(self, rows: Rows, active: torch.Tensor | None) -> torch.Tensor:
        selected, undecided = self.choose(rows, active, exact=not self.rounds)
        if undecided is not None:
            self.decide_exactly(rows, active, selected, undecided)
        if selected.shape[1] == rows.shape[1]:
            return selected
        selected = selected.repeat_interleave(rows.group_size, dim=1)
        return selected if rows.visible is None else selected & rows.visible


class TopKMasker(ScoredMasker):
    """Takes the ``heavy_size`` best-scored keys among the visible ones that are not yet active."""

    config: TopKMaskerConfig

    def choose(self, rows: Rows, active: torch.Tensor | None, exact: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores = self.row_scores(rows)
        exact = exact or scores.dtype == torch.float64
        margin = None if exact else 2 * self.score_error(rows, scores)
        if self.config.gqa == "head":
            candidates, counts, estimates = rows.candidates(active), rows.counts, scores
        else:
            candidates, counts = self.group_candidates(rows, active), group_counts(rows)
            estimates = self.group_mass(rows, scores)
            margin = None if margin is None else self.group_margin(rows, estimates, margin)
        if exact:
            estimates = estimates.float()
        rescore = self.rescore(rows) if self.config.gqa == "head" else None
        budget = resolve_budget(self.config.heavy_size, counts)
        bound = most(self.config.heavy_size, rows.shape[-1])
        return select_top_k(estimates, candidates, budget, max(1, bound), margin, rescore)

    def rescore(self, rows: Rows) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What computes the exact estimates ``[n]`` at single positions ``[n, 4]``; None redoes whole rows instead."""
        return None

    def group_margin(self, rows: Rows, mass: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        """Margin ``[B, G, q, 1]`` of the summed estimates from that of the heads' scores ``[B, H, q, 1]``."""
        heads = by_group(margin, rows.keys.shape[1])
        if self.group_reduce == "sum":
            return heads.sum(dim=2)
        margin = 2 * (heads.amax(dim=2) + 1e-6) * mass.amax(-1, keepdim=True)
        return margin.nan_to_num(nan=float("inf"))  # no bound on scores beyond float32, whose mass may be nothing


def group_counts(rows: Rows) -> torch.Tensor:
    """Keys that some head of the group sees, per row: int64 ``[B|1, G|1, q|1, 1]``."""
    visible = rows.group_visible()
    return rows.counts if visible is None else visible.sum(-1, keepdim=True)
