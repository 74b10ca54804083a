"""The launches of one call that attends to the keys with the best estimated scores, found by levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sah_transformers.kernels.approximate.launch import Levels, Scoring, Tile
from sah_transformers.kernels.approximate.levels import (
    edge_kernel,
    level_cut_kernel,
    level_kernel,
    level_list_kernel,
    line_kernel,
)
from sah_transformers.kernels.approximate.methods import method_of
from sah_transformers.kernels.decode.kernel import power_of_2, see
from sah_transformers.selections import Estimated

if TYPE_CHECKING:
    from sah_transformers.kernels.approximate.pipeline import Work

F32, I32, U8 = torch.float32, torch.int32, torch.uint8

MOST_COUNTS = 2**15
"""Counts of levels in the chunks of a row that one program can hold."""


def attend_by_levels(work: Work) -> None:
    """Levels of the keys (of their estimated scores, where these are not few whole numbers), the cut, attention."""
    x, plan, launch, t, selection = work.x, work.plan, work.launch, work.tuning, work.selection
    assert isinstance(selection, Estimated)
    method = method_of(selection.estimate)
    tile: Tile = method.TILES[0]
    grouped = selection.group and selection.reduce == "softmax"
    scoring = Scoring(
        q=x.q, k=x.k, keys=work.keys, stride=0, mask=None, look=(0, 0, 0), limits=None, lines=None, scores=None,
        histogram=None, peaks=None, aboves=None, masses=None, scaling=x.scaling, bands=work.bands, causal=x.causal,
        masked=plan.sight["MASKED"], masses_too=grouped, bins=0, summed=selection.group and not grouped,
    )  # fmt: skip
    whole = method.levels(scoring, work.given)  # numbers
    bins = power_of_2(max(64, whole + 1)) if whole else t.level_bins
    chunk = max(t.chunk * max(1, bins // 128), plan.keys * bins // MOST_COUNTS)
    at_once = max(1, chunk // 1024)
    warps = min(16, t.level_warps * at_once)
    span = chunk if whole else max(chunk, tile.span)
    stride = -(-work.keys // span) * span
    scored = work.selections if scoring.summed else work.all_rows
    pieces, chunks = stride // tile.span, -(-work.keys // chunk)
    longest = min(work.keys, max(x.stack.size[0], int(x.stack.size[1] * work.keys)) + 1)
    wide = longest + (0 if whole else work.keys)
    scoring = scoring.long(stride)
    own = method.scratch(scoring, work.side, work.given)
    s = work.scratch(
        {
            "scores": (1 if whole else scored * stride, F32), "peaked": (1 if whole else scored * pieces, F32),
            "masses": (2 * scored * pieces if grouped else 1, F32), "stats": (3 * work.all_rows, F32),
            "lines": (2 * work.selections, F32), "ranking": (work.selections * stride if grouped else 1, F32),
            "levels": (work.selections * stride, U8), "histogram": (work.selections * chunks * bins, I32),
            "cuts": (5 * work.selections, I32), "offsets": (2 * work.selections * chunks, I32),
            "lists": (work.selections * wide, I32), "unused": (1, F32), **own,
        }
    )  # fmt: skip
    mask, look = see(x, plan, launch, s["limits"])
    scoring = scoring.on(s, mask, look)
    of_method = {name: s[name] for name in own}
    method.look_up(launch, scoring, work.side, work.given, of_method)
    ranking = s["ranking"] if grouped else s["scores"]
    numbers = (work.keys, work.batch, stride // 16)
    if whole:
        cut = Levels(s["levels"], s["histogram"], chunk, bins, warps)
        method.level(launch, scoring, work.side, work.given, of_method, cut)
    else:
        method.score(launch, scoring, work.side, work.given, of_method, tile)
        kinds: dict[str, Any] = {**work.sighted, "H": work.groups if scoring.summed else work.heads, "SOFTMAX": grouped}
        launch(
            line_kernel, (work.selections, 1, 1), s["scores"], s["limits"], s["peaked"], s["masses"], s["stats"],
            s["lines"], *numbers, pieces, *work.bands, *work.size,
            **kinds, CHUNKS=power_of_2(-(-plan.keys // tile.span)), SAMPLES=t.samples * max(1, plan.keys // 2**17),
            HEADS=power_of_2(work.heads // work.groups), BINS=bins, warps=t.sample_warps,
        )  # fmt: skip
        launch(
            level_kernel, (chunks, work.selections, 1), s["scores"], ranking, s["limits"], s["stats"], s["lines"],
            s["levels"], s["histogram"], *numbers, chunks, *work.bands,
            **kinds, CHUNK=chunk, BINS=bins, warps=warps,
        )  # fmt: skip
    most_chunks = power_of_2(-(-plan.keys // chunk))
    launch(
        level_cut_kernel, (work.selections, 1, 1), s["histogram"], s["limits"], s["cuts"], s["offsets"], s["counts"],
        *numbers[:2], chunks, *work.bands, *work.size,
        Q=work.rows, **plan.sight, ROWS=work.selections // work.batch, EDGES=not whole, CHUNKS=most_chunks, BINS=bins,
        warps=min(16, max(1, t.level_cut_warps * most_chunks * bins // 2**13)),
    )  # fmt: skip
    launch(
        level_list_kernel, (chunks, work.selections, 1), s["levels"], s["cuts"], s["offsets"], s["lists"],
        stride // 16, chunks, wide, longest, EDGES=not whole, CHUNK=chunk, warps=min(16, t.list_warps * at_once),
    )  # fmt: skip
    if not whole:
        launch(
            edge_kernel, (work.selections, 1, 1), ranking, s["cuts"], s["lists"], stride // 16, wide, longest,
            WIDTH=t.edge, BLOCK=t.edge_block, warps=t.edge_warps,
        )  # fmt: skip
    work.gather(s, mask, look, None, s["lists"], wide, 1)
