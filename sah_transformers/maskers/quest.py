"""Quest: the pages of keys whose best possible score is highest (arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sah_transformers.budget import check_number, most, resolve_budget
from sah_transformers.kernels.select import select_top_k
from sah_transformers.maskers.registry import MaskerRegistry
from sah_transformers.maskers.top_k import TopKMasker, TopKMaskerConfig, group_counts
from sah_transformers.rows import Context, Rows, by_group, dot
from sah_transformers.selections import Pages, Selection
from sah_transformers.state import Fold


@dataclass(frozen=True)
class QuestTopKMaskerConfig(TopKMaskerConfig):
    """``ceil(heavy_size / page_size)`` pages of ``page_size`` consecutive keys, per query head or per KV head."""

    type: ClassVar[str] = "quest"
    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("page_size", self.page_size, "an int >= 1 (keys per page)")
        if not isinstance(self.page_size, int) or self.page_size < 1:
            raise ValueError(f"page_size must be an int >= 1 (keys per page), got {self.page_size!r}")


@MaskerRegistry.register(QuestTopKMaskerConfig)
class QuestTopKMasker(TopKMasker):
    """Selects every visible key of the pages with the highest bounds among those that still hold a candidate.

    Pages count from the sequence's first real token. Of each page and KV head the smallest and the largest value of
    every channel is kept, ``2 D / page_size`` numbers per key in the keys' dtype; the bound of a query is
    ``sum_d max(q_d min_d, q_d max_d)``. The row's own page, that of its last visible key, is taken first where it
    holds a candidate, whatever its bound: its keys behind the row count in the bound. For the same reason it has no
    part in the softmax of ``gqa="group"``, which is over ``scaling`` times the bounds of the other pages that the
    head sees. The authors take at least three pages and floor the budget.
    """

    config: QuestTopKMaskerConfig

    def describe(self) -> Selection:
        return Pages(self.config.heavy_size, self.config.gqa == "group", self.config.page_size)

    def append(self, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> dict[str, torch.Tensor]:
        return {"low": keys, "high": keys}

    def pages(self) -> dict[str, tuple[int, Fold]]:
        return {"low": (self.config.page_size, "amin"), "high": (self.config.page_size, "amax")}

    def score(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Upper bounds of q·k over the keys of each page, ``[B, H, q, pages]``; 0 for pages without real tokens."""
        low, high = page_bounds(ctx)
        return dot(queries.clamp(min=0), high) + dot(queries.clamp(max=0), low)

    def score_error(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        low, high = page_bounds(rows.context)
        reach = torch.maximum(low.abs(), high.abs())
        dtype = torch.promote_types(reach.dtype, torch.float32)
        page = torch.linalg.vector_norm(reach, dim=-1, dtype=dtype).amax(-1)  # [B, G]
        query = torch.linalg.vector_norm(rows.queries, dim=-1, keepdim=True, dtype=dtype)
        scale = query * page.repeat_interleave(rows.group_size, dim=1)[:, :, None, None]
        error = 8 * rows.queries.shape[-1] ** 0.5 * 2**-24 * scale  # two dot products and their sum
        return error.nan_to_num(nan=float("inf"), posinf=float("inf"))

    def choose(self, rows: Rows, active: torch.Tensor | None, exact: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        bounds = self.row_scores(rows)  # [B, H, q, P]
        exact = exact or bounds.dtype == torch.float64
        positions, size, count = rows.context.positions, self.config.page_size, bounds.shape[-1]
        assert positions is not None
        page = torch.where(positions < 0, -1, positions // size)  # [B, K]
        grouped = self.config.gqa == "group"
        candidates = self.group_candidates(rows, active) if grouped else rows.candidates(active)
        visible = rows.group_visible() if grouped else rows.visible
        own = torch.arange(count, device=page.device) == last_page(visible, page)
        held = pages_with(candidates, page, count)
        estimates, margin = bounds, None if exact else 2 * self.score_error(rows, bounds)
        if grouped:
            estimates = self.page_mass(rows, bounds, page, own)
            margin = None if margin is None else self.group_margin(rows, estimates, margin * abs(rows.context.scaling))
        if exact:
            estimates = estimates.float()
        budget = resolve_budget(self.config.heavy_size, group_counts(rows) if grouped else rows.counts)
        first = held & own
        room = (budget + size - 1) // size - first.sum(-1, keepdim=True)
        bound = -(-most(self.config.heavy_size, rows.shape[-1]) // size)
        taken, undecided = select_top_k(estimates, held & ~own, room.clamp(min=1), max(1, bound), margin)
        taken = (taken & (room > 0)) | first
        if undecided is not None:
            undecided = undecided & (room > 0).squeeze(-1)
        real = (page >= 0)[:, None, None]
        selected = taken.gather(-1, page.clamp(min=0)[:, None, None].expand(*taken.shape[:3], -1)) & real
        return selected if visible is None else selected & visible, undecided

    def page_mass(self, rows: Rows, bounds: torch.Tensor, page: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Each head's softmax over the pages it sees but the row's own, summed per KV head: ``[B, G, q, P]``."""
        heads = own if own.shape[1] == 1 else own.repeat_interleave(rows.group_size, dim=1)
        seen = pages_with(rows.visible, page, bounds.shape[-1]) & ~heads
        shown = (bounds * rows.context.scaling).masked_fill(~seen, float("-inf"))
        return by_group(shown.softmax(-1).nan_to_num(nan=0.0), rows.keys.shape[1]).sum(dim=2)


def page_bounds(ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """(smallest, largest) key of each page, ``[B, G, P, D]``; zeros for pages without real tokens."""
    low, high = ctx.side["low"], ctx.side["high"]
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def last_page(visible: torch.Tensor | None, page: torch.Tensor) -> torch.Tensor:
    """The page of each row's last visible key, ``[B, 1|H, 1|q, 1]``; -1 for rows that see none."""
    pages = page[:, None, None]
    return (pages if visible is None else torch.where(visible, pages, -1)).amax(-1, keepdim=True)


def pages_with(flags: torch.Tensor | None, page: torch.Tensor, count: int) -> torch.Tensor:
    """Which of ``count`` pages hold a real key of ``flags [B|1, 1|H, 1|q, K]`` (None = all): ``[B, 1|H, 1|q, P]``."""
    real = (page >= 0)[:, None, None]
    flags = real if flags is None else flags & real
    found = torch.zeros(*flags.shape[:3], count, dtype=torch.int32, device=page.device)
    index = page.clamp(min=0)[:, None, None].expand(flags.shape)
    return found.scatter_add_(-1, index, flags.to(torch.int32)) > 0
