"""The launches of one call, in order, on the current stream; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sah_transformers.kernels.approximate.by_levels import attend_by_levels
from sah_transformers.kernels.approximate.gather import gather_group_kernel, gather_head_kernel
from sah_transformers.kernels.approximate.launch import Given, form_of
from sah_transformers.kernels.approximate.page_select import select_pages_kernel
from sah_transformers.kernels.approximate.pages import page_score_and_look_kernel, page_score_kernel
from sah_transformers.kernels.approximate.tuned import Tuning, tuning_of
from sah_transformers.kernels.decode.kernel import (
    MOST_SPLITS,
    Elements,
    Inputs,
    Launcher,
    Plan,
    Scratch,
    bits_of,
    budgets,
    count_seen,
    limit_sizes,
    mask_of,
    merge,
    plan_of,
    power_of_2,
    segments_of,
)
from sah_transformers.kernels.tape import new
from sah_transformers.selections import Estimated, Pages

F32, I32 = torch.float32, torch.int32

LEAST_SPLIT = 4096
"""Pages from which on a row lies in registers in two parts: fewer would not fill a program's threads."""


@dataclass
class Work:
    """One call on its way through the stages.

    Attributes:
        x: tensors and numbers; side: side data by name, ``[B, heads, K or pages, ...]``; given: what the kernels of an
            estimate need beside it.
        positions: int64 ``[B, K]``, needed with a mask.
        memory: what must live until everything is launched.
    """

    x: Inputs
    selection: Pages | Estimated
    side: dict[str, torch.Tensor]
    given: Any
    positions: torch.Tensor | None
    plan: Plan
    tuning: Tuning
    launch: Launcher
    out: torch.Tensor
    memory: Scratch | None = None

    def __post_init__(self) -> None:
        x = self.x
        self.batch, self.heads, self.rows, _ = x.q.shape
        self.groups, self.keys, self.value_dim = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        self.all_rows = self.batch * self.heads * self.rows
        self.selections = self.batch * self.groups * self.rows if self.selection.group else self.all_rows
        self.shared = self.selection.group and self.heads > self.groups
        self.bands = budgets(x.stack)
        self.size = (x.stack.size[0], bits_of(x.stack.size[1]))
        self.sighted = {**self.plan.shape, **self.plan.sight}

    def scratch(self, sizes: Callable[[], Elements], *lengths: int) -> dict[str, Any]:
        """The call's arrays, of ``sizes`` for ``lengths``; those that every stage shares are added."""
        self.splits = self.split()
        parts = self.all_rows * self.splits
        layout = self.plan.layout(lambda: {
            **sizes(), **limit_sizes(self.x, self.plan), "counts": (self.selections, I32),
            "sums": (parts * self.value_dim, F32), "peaks": (parts, F32), "totals": (parts, F32),
        }, self.splits, *lengths)  # fmt: skip
        self.memory = scratch = Scratch(self.x.q.device, not self.launch.ready, layout)
        return scratch.arrays()

    def split(self) -> int:
        """Parts that a row's keys are attended to in."""
        t = self.tuning
        rows, programs = (self.selections, t.group_programs) if self.shared else (self.all_rows, t.head_programs)
        if self.shared and isinstance(self.selection, Estimated):
            programs = t.key_group_programs
        return max(1, min(MOST_SPLITS, programs // rows))

    def gather(
        self, s: dict[str, Any], mask: Any, look: tuple[int, ...], slots: Any, lists: Any, stride: int, page: int
    ) -> None:
        """Attend to the listed pages or keys and to the bands, and add the parts up."""
        x, t, plan, launch = self.x, self.tuning, self.plan, self.launch
        tokens = -(-self.keys // page) * page
        wide = power_of_2(page)
        at_once = t.group_keys if self.shared else t.head_keys
        even = t.even and isinstance(self.selection, Estimated)
        common = (
            launch.address(x.q), launch.address(x.k), launch.address(x.v), mask, s["limits"], lists, s["counts"],
            *((lists, lists) if slots is None else (slots, s["shifts"])), s["sums"], s["peaks"], s["totals"],
            self.keys, self.batch, stride, tokens,
            *x.q.stride()[:3], *plan.steps(x.k), *plan.steps(x.v), *look, x.scaling, x.softcap or 1.0, *self.bands,
        )  # fmt: skip
        constants = {
            **plan.shape, **plan.dims, **plan.wide, **plan.sight, "SOFTCAP": x.softcap is not None, "UNIT": plan.unit,
            "SLOTS": slots is not None, "PAGE": page, "WIDE": wide, "UNITS": max(1, at_once // wide),
            "EVEN": even,
        }  # fmt: skip
        if self.shared:
            launch(
                gather_group_kernel, (self.splits, self.selections, 1), *common, **constants,
                BM=max(8, power_of_2(self.heads // self.groups)), STAGES=t.group_stages, warps=t.group_warps,
            )  # fmt: skip
        else:
            launch(
                gather_head_kernel, (self.splits, self.all_rows, 1), *common, **constants,
                warps=t.head_warps, cap=t.head_registers,
            )  # fmt: skip
        merge(x, plan, launch, s, self.splits, self.out)


def parts_of(pages: int) -> tuple[int, int]:
    """How wide a row of so many pages lies in registers: a power of two, and an eighth or a quarter of it, or 0."""
    whole = max(32, power_of_2(pages))
    half = whole // 2
    rest = max(half // 8, power_of_2(pages - half))
    return (half, rest) if half >= LEAST_SPLIT and rest <= half // 4 else (whole, 0)


def attend_pages(work: Work) -> None:
    """Bounds of the pages, the best of each row, attention over their keys."""
    x, plan, launch, t = work.x, work.plan, work.launch, work.tuning
    assert isinstance(work.selection, Pages)
    page, pages = work.selection.size, work.side["low"].shape[2]
    stride, tokens = -(-pages // 16) * 16, pages * page
    masked = plan.sight["MASKED"]
    blanks = -(-work.batch * tokens // 16) * 16 + 2 * work.batch * work.rows * stride if masked else 1
    s = work.scratch(lambda: {
        "scores": (work.all_rows * stride, F32), "lists": (work.selections * stride, I32),
        "slots": (blanks, I32), "shifts": (work.batch * work.rows, I32),
    }, pages)  # fmt: skip
    mask, look = mask_of(x, launch)
    score_pages(work, s, mask, look, pages, stride, tokens, blanks)
    width, rest = parts_of(-(-work.keys // page))
    warps = t.group_select_warps if work.selection.group else t.select_warps
    at_once = t.select_scores // width
    if width + rest > 16384:  # a thread has half the registers
        warps, at_once = 32, at_once // 2
    launch(
        select_pages_kernel, (work.selections, 1, 1), s["scores"], s["limits"], s["shifts"], s["slots"],
        s["lists"], s["counts"], work.keys, work.batch, tokens, stride, x.scaling, *work.bands, *work.size,
        **work.sighted, GROUP=work.selection.group, PAGE=page, PAGES=width, REST=rest,
        HEADS=min(8, power_of_2(work.heads // work.groups), max(1, at_once)), warps=warps, fuse=False,
    )  # fmt: skip
    work.gather(s, mask, look, s["slots"] if masked else None, s["lists"], stride, page)


def score_pages(
    work: Work, s: dict[str, Any], mask: Any, look: tuple[int, ...], pages: int, stride: int, tokens: int, blanks: int
) -> None:
    """Launch what scores the pages and, where there is a mask, looks at it."""
    x, plan, launch, t = work.x, work.plan, work.launch, work.tuning
    low, high = work.side["low"], work.side["high"]
    chunks, tiles = -(-pages // t.score_pages), -(-work.heads // work.groups * work.rows // plan.bm)
    scored = (launch.address(x.q), launch.address(low), launch.address(high), s["scores"])
    sizes = (pages, low.stride(1) // low.shape[3], stride)
    constants = {**plan.shape, **plan.dims, "BM": plan.bm, "BN": t.score_pages}
    if x.mask is None:
        launch(
            page_score_kernel, (chunks, work.batch * work.groups, tiles), *scored, *sizes, *x.q.stride()[:3],
            **constants, warps=t.score_warps,
        )  # fmt: skip
        return
    assert work.positions is not None
    counts = s["counts_seen"]
    counted = work.batch, work.rows, work.keys
    segments = count_seen(launch, mask, counts, counted, look, x.causal, s["slots"], blanks)
    looks = max(1, t.look_programs // (work.batch * work.groups * work.rows))
    launch(
        page_score_and_look_kernel, (looks * work.rows + chunks, work.batch * work.groups, tiles), *scored,
        mask, counts, s["limits"], launch.address(work.positions), s["slots"], s["shifts"],
        *sizes, work.keys, work.batch, segments, tokens, *x.q.stride()[:3], work.positions.stride(0), *look,
        *work.bands, x.least,
        **constants, CAUSAL=x.causal, PAGE=tokens // pages, LOOKS=looks, **segments_of(plan.keys), warps=t.score_warps,
    )  # fmt: skip


def attend_rows(
    x: Inputs, selection: Pages | Estimated, side: dict[str, torch.Tensor], given: Any, positions: torch.Tensor | None
) -> torch.Tensor:
    """``out [B, Q, H, Dv]`` of a checked call."""
    batch, heads, rows, _ = x.q.shape
    known: list[Any] = [(name, *form_of(t)) for name, t in side.items()]
    if isinstance(given, Given):
        known.append(given.traits)
    if isinstance(selection, Pages):
        known.append(parts_of(-(-x.k.shape[2] // selection.size)))
    plan = plan_of(x, selection, *known)
    out = new((batch, rows, heads, x.v.shape[3]), x.q.dtype, x.q.device)
    tuning = tuning_of(x.q.element_size(), max(plan.dims["BD"], plan.wide["BDV"]))
    work = Work(x, selection, side, given, positions, plan, tuning, Launcher(plan, x.q.device), out)
    try:
        (attend_pages if isinstance(selection, Pages) else attend_by_levels)(work)
    except Exception:
        plan.compiled.clear()  # half a plan would be taken for a whole one
        raise
    return out
