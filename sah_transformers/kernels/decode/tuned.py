"""Launch parameters per class of shapes, measured on an H100 (docs/kernels.md); kept here so that nothing is searched
at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tuning:
    """How the stages of a decode call are cut into programs.

    Attributes:
        tile, tiles, score_warps, score_stages, look_segments: keys per tile, tiles per program of the score stage;
            thousands of a mask's keys that a program beside it counts at once.
        samples, slice, sample_stages, sample_warps: keys sampled per row, and how many are loaded at once.
        bins, listed: bins of the histogram, keys that the list of the boundary bin holds.
        histogram_chunk, histogram_warps, threshold_warps: keys per program of the second look; the cut.
        chunk, rows, gather_programs, gather_warps, gather_registers: keys compacted at once, values gathered at once,
            programs to aim for, registers per thread at most.
        stream_tile, stream_warps, stream_stages: keys per tile where all values are read.
        parts, combine_warps: partial sums added at once.
        band_tile, band_programs, band_warps: keys per tile and programs to aim for of the bands; long_band,
            long_band_programs: the same of at least so many keys.
    """

    tile: int = 128
    tiles: int = 1
    score_warps: int = 4
    score_stages: int = 1
    look_segments: int = 4
    samples: int = 512
    slice: int = 64
    sample_stages: int = 4
    sample_warps: int = 8
    bins: int = 1024
    listed: int = 64
    histogram_chunk: int = 1024
    histogram_warps: int = 4
    threshold_warps: int = 8
    chunk: int = 512
    gather_programs: int = 2048
    gather_warps: int = 1
    gather_registers: int | None = 128
    rows: int = 32
    stream_tile: int = 64
    stream_warps: int = 4
    stream_stages: int = 1
    parts: int = 64
    combine_warps: int = 4
    band_tile: int = 64
    band_programs: int = 128
    long_band: int = 8192
    long_band_programs: int = 256
    band_warps: int = 4


def tuning_of(kind: str, itemsize: int, dim: int, keys: int) -> Tuning:
    """Parameters for a kind of stack, bytes per element, padded head dimension and number of keys."""
    bins, listed = (256, 64) if keys <= 4096 else (1024, 64) if keys <= 2**18 else (2048, 128)
    wide = itemsize * dim
    slim = max(16, min(64, 64 * 256 // wide))
    tuning = Tuning(
        tile=max(16, min(128, 128 * 256 // wide)),
        slice=slim,
        bins=bins,
        listed=listed,
        rows=max(8, min(32, 32 * 256 // wide)),
        stream_tile=max(16, min(64, 128 * 256 // wide)),
        band_tile=slim,
    )
    if itemsize == 4:
        tuning = replace(tuning, tile=slim, tiles=2, score_stages=2)
    if kind == "group":
        gather: dict[str, Any] = {"chunk": 2048, "gather_programs": 256, "gather_warps": 4}
        rows = max(16, min(128, 128 * 256 // wide))
        return replace(tuning, samples=1024, histogram_chunk=512, rows=rows, **gather)
    if kind == "mass":
        return replace(tuning, samples=1024, bins=2 * bins)
    return replace(tuning, samples=256, listed=32) if keys <= 2**15 else tuning
