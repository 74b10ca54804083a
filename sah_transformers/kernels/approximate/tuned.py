"""Launch parameters per class of shapes, measured on an H100; kept here so that nothing is searched at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Tuning:
    """How the stages of a call are cut into programs.

    Attributes:
        score_pages, score_warps: pages per program of the bounds.
        select_warps, group_select_warps, select_scores: of the program that selects a row's pages; how many scores of
            heads it holds at once.
        look_programs: programs to aim for that look at a mask's rows.
        head_keys, head_warps, head_programs, head_registers: keys at once per query head, programs to aim for,
            registers per thread at most.
        group_keys, group_warps, group_programs, group_stages: the same of a group; key_group_programs: programs for
            lists of single keys; even: whether parts of these are equal instead of whole multiples of keys at once.
        samples, sample_warps, chunk: sampled scores of a row; keys per program that walks a row's scores.
        level_bins: levels on the line through a bracket, 16 or more; level_warps, list_warps, level_cut_warps: of
            1,024 keys of a chunk, of 2**13 counts.
        edge, edge_block, edge_warps: keys of an edge that are cut in registers, keys at once of a longer one; the
            program's warps.
    """

    score_pages: int = 64
    score_warps: int = 4
    select_warps: int = 8
    group_select_warps: int = 16
    select_scores: int = 2**15
    look_programs: int = 32
    head_keys: int = 32
    head_warps: int = 1
    head_programs: int = 1536
    head_registers: int | None = None
    group_keys: int = 64
    group_warps: int = 4
    group_programs: int = 396
    group_stages: int = 2
    key_group_programs: int = 512
    even: bool = True
    samples: int = 1024
    sample_warps: int = 8
    chunk: int = 1024
    level_bins: int = 16
    level_warps: int = 4
    list_warps: int = 4
    level_cut_warps: int = 4
    edge: int = 2048
    edge_block: int = 4096
    edge_warps: int = 8


@cache
def tuning_of(itemsize: int, dim: int) -> Tuning:
    """Parameters for bytes per element and the larger padded head dimension."""
    wide = itemsize * dim
    return Tuning(
        score_pages=max(16, min(64, 64 * 256 // wide)),
        head_keys=max(8, min(32, 32 * 256 // wide)),
        group_keys=max(16, min(64, 64 * 256 // wide)),
    )
