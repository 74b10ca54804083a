"""The launches of one call that attends to the keys with the best estimated scores, found by levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sah_transformers.kernels.approximate.launch import Edges, Levels, Samples, Scoring, Tile
from sah_transformers.kernels.approximate.levels import (
    edge_kernel,
    level_cut_kernel,
    level_kernel,
    level_list_kernel,
)
from sah_transformers.kernels.approximate.line import line_kernel
from sah_transformers.kernels.approximate.methods import LOGARITHMIC, method_of, tiles_of
from sah_transformers.kernels.decode.kernel import power_of_2, see
from sah_transformers.selections import Estimated

if TYPE_CHECKING:
    from sah_transformers.kernels.approximate.pipeline import Work

F32, I32, U8 = torch.float32, torch.int32, torch.uint8

MOST_COUNTS = 2**15
"""Counts of levels in all chunks of a row: one program holds them."""


@dataclass(frozen=True)
class Sizes:
    """Of the arrays of a call.

    Attributes:
        whole: whether scores are few whole numbers, which are their levels; then nothing is kept of scores.
        early: whether levels are written with the scores, on lines that are known before.
        bins: levels; chunk, chunks: keys of a program that walks a row, programs of a row.
        stride: length of a row of scores or levels; longest: of a list; pieces: programs that score a row, where they
            keep peaks.
    """

    whole: bool
    early: bool
    bins: int
    chunk: int
    chunks: int
    stride: int
    longest: int
    pieces: int

    @property
    def counted(self) -> int:
        """Integers that hold the counts of a chunk."""
        return 8 if self.bins == 16 else self.bins

    @property
    def at_once(self) -> int:
        """Thousands of keys in a chunk."""
        return max(1, self.chunk // 1024)

    def wide(self, keys: int) -> int:
        """Length of a list with room for its edge."""
        return self.longest + (0 if self.whole else keys)


def sizes_of(work: Work, levels: int, early: bool, tile: Tile) -> Sizes:
    """``levels``: how many a method's scores are, 0 if they are no whole numbers."""
    t, budget = work.tuning, work.x.stack.size
    bins = power_of_2(max(64, levels + 1)) if levels else t.level_bins
    chunk = max(t.chunk * max(1, bins // 128), work.plan.keys * bins // MOST_COUNTS)
    direct = levels > 0 or early
    span = chunk if direct else max(chunk, tile.span)
    stride = -(-work.keys // span) * span
    longest = min(work.keys, max(budget[0], int(budget[1] * work.keys)) + 1)
    pieces = 0 if direct else stride // tile.span
    return Sizes(levels > 0, early, bins, chunk, -(-work.keys // chunk), stride, longest, pieces)


def attend_by_levels(work: Work) -> None:
    """Levels of the keys, the cut of each row, attention over what is listed."""
    x, selection = work.x, work.selection
    assert isinstance(selection, Estimated)
    method = method_of(selection.estimate)
    grouped, skewed = selection.group and selection.reduce == "softmax", selection.estimate in LOGARITHMIC
    scoring = Scoring(
        q=x.q, k=x.k, keys=work.keys, stride=0, mask=None, look=(0, 0, 0), limits=None, lines=None, scores=None,
        histogram=None, peaks=None, aboves=None, masses=None, scaling=x.scaling, bands=work.bands, causal=x.causal,
        masked=work.plan.sight["MASKED"], masses_too=grouped, bins=0, summed=selection.group and not grouped,
    )  # fmt: skip
    tile = tiles_of(method, scoring, work.given)[0]
    levels = method.levels(scoring, work.given)
    n = sizes_of(work, levels, not levels and not selection.group and hasattr(method, "line"), tile)
    error = method.error(scoring, work.given) if n.bins == 16 and hasattr(method, "error") else 0.0
    scoring = replace(scoring.long(n.stride), coarse=error > 0)
    own = method.scratch(scoring, work.side, work.given)
    counts = work.selections * n.chunks * n.counted * (2 if error else 1)
    scored = 0 if n.whole else work.selections if scoring.summed else work.all_rows
    s = work.scratch(lambda: {
        "scores": (scored * n.stride, F32), "peaked": (scored * n.pieces, F32),
        "masses": (scored * n.pieces if grouped else 1, F32), "stats": (2 * work.all_rows, F32),
        "lines": (3 * work.selections, F32), "ranking": (work.selections * n.stride if grouped else 1, F32),
        "levels": (work.selections * n.stride, U8), "histogram": (counts, I32),
        "cuts": (5 * work.selections, I32), "offsets": (2 * work.selections * n.chunks, I32),
        "lists": (work.selections * n.wide(work.keys), I32), "unused": (1, F32), **own,
    }, work.keys, n.stride, n.pieces, n.chunks, n.bins)  # fmt: skip
    mask, look = see(x, work.plan, work.launch, s)
    scoring = scoring.on(s, mask, look)
    of_method = {name: s[name] for name in own}
    method.look_up(work.launch, scoring, work.side, work.given, of_method)
    if n.early:
        samples = Samples(s["lines"], work.size, *samples_of(work), n.bins)
        method.line(work.launch, scoring, work.side, work.given, of_method, samples)
    if n.whole or n.early:
        warps = min(16, (method.LEVEL_WARPS if n.early else work.tuning.level_warps) * n.at_once)
        cut = Levels(s["lines"], s["levels"], s["histogram"], n.chunk, n.bins, warps)
        method.level(work.launch, scoring, work.side, work.given, of_method, cut)
    else:
        method.score(work.launch, scoring, work.side, work.given, of_method, tile)
        level_scores(work, n, s, tile, scoring, skewed, error)
    list_best(work, n, s, error > 0)
    if error:
        edges = Edges(s["cuts"], s["lists"], n.wide(work.keys), n.longest)
        method.settle(work.launch, scoring, work.side, work.given, of_method, edges)
    if not n.whole:
        cut_edges(work, n, s, s["ranking" if grouped else "scores"], skewed)
    work.gather(s, mask, look, None, s["lists"], n.wide(work.keys), 1)


def samples_of(work: Work, closer: bool = False) -> tuple[int, int]:
    """Sampled keys of a row and warps of its program; ``closer``: where an edge costs more."""
    more = max(1, min(2, work.plan.keys // 2**17))
    count = work.tuning.samples * more * (2 if closer and work.plan.keys >= 2**17 else 1)
    return count, min(16, work.tuning.sample_warps * more)


def level_scores(
    work: Work, n: Sizes, s: dict[str, Any], tile: Tile, scoring: Scoring, skewed: bool, error: float
) -> None:
    """Levels of stored scores, on a line through a bracket of the cut; ``skewed``: of `methods.LOGARITHMIC`; ``error``:
    how far they may be off."""
    plan, t = work.plan, work.tuning
    numbers = (work.keys, work.batch, n.stride // 16)
    samples, warps = samples_of(work, closer=error > 0)  # every key of an edge is scored again
    kinds = {
        **work.sighted, "H": work.groups if scoring.summed else work.heads,
        "SOFTMAX": scoring.masses_too, "LOGARITHMIC": scoring.masses_too or skewed,
    }  # fmt: skip
    work.launch(
        line_kernel, (work.selections, 1, 1), s["scores"], s["limits"], s["peaked"], s["masses"], s["stats"],
        s["lines"], *numbers, n.pieces, *work.bands, *work.size,
        **kinds, CHUNKS=power_of_2(-(-plan.keys // tile.span)), SAMPLES=samples,
        HEADS=power_of_2(work.heads // work.groups), BINS=n.bins, warps=warps,
    )  # fmt: skip
    work.launch(
        level_kernel, (n.chunks, work.selections, 1), s["scores"], s["ranking"], s["limits"], s["stats"], s["lines"],
        s["levels"], s["histogram"], *numbers, n.chunks, *work.bands,
        **kinds, CHUNK=n.chunk, BINS=n.bins, ERROR=error, warps=min(16, t.level_warps * n.at_once),
    )  # fmt: skip


def list_best(work: Work, n: Sizes, s: dict[str, Any], coarse: bool) -> None:
    """The level of the cut, and lists of what is above and of its keys."""
    plan, t = work.plan, work.tuning
    wide, most_chunks = n.wide(work.keys), power_of_2(-(-plan.keys // n.chunk))
    work.launch(
        level_cut_kernel, (work.selections, 1, 1), s["histogram"], s["limits"], s["cuts"], s["offsets"], s["counts"],
        work.keys, work.batch, n.chunks, *work.bands, *work.size,
        Q=work.rows, **plan.sight, ROWS=work.selections // work.batch, EDGES=not n.whole, COARSE=coarse,
        CHUNKS=most_chunks, BINS=n.bins, warps=min(16, max(4, t.level_cut_warps * most_chunks * n.bins // 2**13)),
    )  # fmt: skip
    work.launch(
        level_list_kernel, (n.chunks, work.selections, 1), s["levels"], s["cuts"], s["offsets"], s["lists"],
        n.stride // 16, n.chunks, wide, n.longest,
        EDGES=not n.whole, COARSE=coarse, CHUNK=n.chunk, warps=min(16, t.list_warps * n.at_once),
    )  # fmt: skip


def cut_edges(work: Work, n: Sizes, s: dict[str, Any], ranking: Any, skewed: bool) -> None:
    """The best keys of the cut's level behind those above it; ``skewed`` scores have longer edges."""
    t = work.tuning
    more = max(2 if skewed else 1, min(4, work.plan.keys // 2**18))
    work.launch(
        edge_kernel, (work.selections, 1, 1), ranking, s["cuts"], s["lists"], n.stride // 16, n.wide(work.keys),
        n.longest, WIDTH=t.edge * more, BLOCK=t.edge_block, warps=min(16, t.edge_warps * more),
    )  # fmt: skip
