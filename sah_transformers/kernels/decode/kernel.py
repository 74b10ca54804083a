"""The launches of one decode call, in order, on the current stream; nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from sah_transformers.kernels.decode.bands import bands_kernel, merge_kernel
from sah_transformers.kernels.decode.bracket import sample_keys_kernel, sample_scores_kernel
from sah_transformers.kernels.decode.combine import combine_kernel
from sah_transformers.kernels.decode.gather import gather_group_kernel, gather_kernel, stream_kernel
from sah_transformers.kernels.decode.histogram import histogram_kernel
from sah_transformers.kernels.decode.limits import bounds_kernel
from sah_transformers.kernels.decode.score import score_kernel
from sah_transformers.kernels.decode.stack import Stack, bits_of
from sah_transformers.kernels.decode.threshold import threshold_kernel
from sah_transformers.kernels.decode.tuned import Tuning, tuning_of

INTERPRETED = isinstance(score_kernel, InterpretedFunction)

POISON = False
"""Tests set it: scratch and output are filled with NaN or a large number before use."""


@dataclass
class Inputs:
    """Tensors and numbers of one call: ``q [B, H, Q, D]``, ``k [B, G, K, D]``, ``v [B, G, K, Dv]``, bool ``mask
    [B|1, Q|1, K]`` or None, ``sinks [H]`` or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: bool
    scaling: float
    softcap: float | None
    least: int
    stack: Stack


@dataclass
class Plan:
    """What calls of one class of shapes have in common: tile sizes, compile-time constants, compiled kernels."""

    tuning: Tuning
    shape: dict[str, Any]
    dims: dict[str, int]
    sight: dict[str, Any]
    unit: int  # strides of keys and values are passed in multiples of this
    bm: int
    keys: int  # upper bound of K
    digits: dict[str, int]
    compiled: list[Any] = field(default_factory=list)

    def steps(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """The strides of keys or values over batch, head and position, in units."""
        b, g, k, _ = tensor.stride()
        return b // self.unit, g // self.unit, k // self.unit


class Launcher:
    """Launches kernels; from the second call of a plan on without Triton's own look-up, which costs more."""

    def __init__(self, plan: Plan):
        self.plan, self.step = plan, 0
        self.ready = bool(plan.compiled) and not INTERPRETED

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, **constants: Any) -> None:
        grid = (*grid, 1, 1)[:3]
        if self.ready:
            self.plan.compiled[self.step][grid](*args, *constants.values())
            self.step += 1
            return
        compiled = kernel[grid](*args, **constants, num_warps=warps)
        self.plan.compiled.append(compiled)


PLANS: dict[tuple, Plan] = {}


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def plan_of(x: Inputs) -> Plan:
    """The plan of this class of shapes, made on its first call."""
    q, k, v, mask, stack = x.q, x.k, x.v, x.mask, x.stack
    batch, heads, rows, dim = q.shape
    groups, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    bound = max(256, power_of_2(keys))
    strides = (*k.stride(), *v.stride())
    aligned = all(s % 8 == 0 for s in (*strides[:3], *strides[4:7])) and dim % 8 == 0 and value_dim % 8 == 0
    key = (
        stack, q.device.index, q.dtype, batch, heads, groups, rows, dim, value_dim, bound, x.causal, x.softcap is None,
        aligned, q.stride(), strides[2], strides[6], max(strides) < 2**31, tuple(t.data_ptr() % 16 for t in (q, k, v)),
        None if mask is None else (mask.stride()[2], mask.data_ptr() % 16),
        None if x.sinks is None else (x.sinks.dtype, x.sinks.data_ptr() % 16),
    )  # fmt: skip
    plan = PLANS.get(key)
    if plan is None:
        digits = (bound - 1).bit_length()
        dims = {"D": dim, "BD": max(16, power_of_2(dim))}
        in_group = heads // groups * rows
        plan = Plan(
            tuning=tuning_of(stack.kind, q.element_size(), max(16, power_of_2(max(dim, value_dim))), bound),
            shape={"H": heads, "G": groups, "Q": rows},
            dims=dims,
            sight={"CAUSAL": x.causal, "MASKED": mask is not None},
            unit=8 if aligned else 1,
            bm=min(64, max(16, power_of_2(in_group))),
            keys=bound,
            digits={"FIXED": min(24, 61 - 2 * digits), "COUNT_BITS": digits + 1},
        )
        PLANS[key] = plan
    return plan


def empty(device: torch.device, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(size, dtype=dtype, device=device)
    return tensor.fill_(float("nan") if dtype.is_floating_point else 2**30) if POISON else tensor


def decode_bands(x: Inputs, plan: Plan, launch: Launcher, out: torch.Tensor) -> None:
    """Two launches: parts of the bands, and their sum."""
    q, k, v, t = x.q, x.k, x.v, plan.tuning
    batch, heads, rows, _ = q.shape
    groups, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    mask, limits, look = sight_of(x, launch)
    most = min(keys, sum(max(n, int(keys * share)) for n, share in (x.stack.first, x.stack.last)))
    most = min(keys, most + rows)
    tiles = -(-heads // groups * rows // plan.bm)
    splits = max(1, min(64, -(-most // t.band_tile), t.band_programs // max(1, batch * groups * tiles)))
    sums = empty(q.device, batch * heads * rows, splits, value_dim)
    peaks, totals = (empty(q.device, batch * heads * rows, splits) for _ in range(2))
    bdv = max(16, power_of_2(value_dim))
    launch(
        bands_kernel, (splits, batch * groups, tiles),
        q, k, v, mask, limits, sums, peaks, totals,
        keys, batch, *q.stride()[:3], *plan.steps(k), *plan.steps(v), *look,
        x.scaling, x.softcap or 1.0, *budgets(x.stack),
        **plan.shape, **plan.dims, DV=value_dim, BDV=bdv, **plan.sight, SOFTCAP=x.softcap is not None,
        UNIT=plan.unit, BM=plan.bm, BN=t.band_tile, warps=t.band_warps,
    )  # fmt: skip
    launch(
        merge_kernel, (batch * heads * rows,), sums, peaks, totals, q if x.sinks is None else x.sinks, out, splits,
        H=heads, Q=rows, DV=value_dim, BDV=bdv, SINKS=x.sinks is not None, BS=power_of_2(splits),
    )  # fmt: skip


def budgets(stack: Stack) -> tuple[int, int, int, int]:
    return stack.first[0], bits_of(stack.first[1]), stack.last[0], bits_of(stack.last[1])


def sight_of(x: Inputs, launch: Launcher) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """(mask, limits, the mask's strides); without a mask the first two stand in for pointers that are never read."""
    if x.mask is None:
        return x.q, x.q, (0, 0, 0)
    batch, rows, keys = x.q.shape[0], x.q.shape[2], x.k.shape[2]
    limits = empty(x.q.device, 5, batch * rows, dtype=torch.int32)
    strides = x.mask.stride()
    look = (0 if x.mask.shape[0] == 1 else strides[0], 0 if x.mask.shape[1] == 1 else strides[1], strides[2])
    launch(
        bounds_kernel, (batch * rows,), x.mask, limits, keys, batch, *look, *budgets(x.stack), x.least,
        Q=rows, CAUSAL=x.causal, BLOCK=min(8192, max(256, power_of_2(keys))), warps=8,
    )  # fmt: skip
    return x.mask, limits, look


def decode_scored(x: Inputs, plan: Plan, launch: Launcher, out: torch.Tensor) -> None:
    """Bands and one selection by score: bracket, scores, histogram, cut, values, sum."""
    q, k, v, t, stack = x.q, x.k, x.v, plan.tuning, x.stack
    batch, heads, rows, _ = q.shape
    groups, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    kind, mass = stack.kind, stack.kind == "mass"
    all_rows = batch * heads * rows
    selections = batch * groups * rows if kind == "group" else all_rows
    span = t.tile * t.tiles
    chunks = -(-keys // span)
    stride = chunks * span
    device = q.device
    mask, limits, look = sight_of(x, launch)
    lines = empty(device, 3, selections)
    histogram = empty(device, selections, t.bins, dtype=torch.int64 if mass else torch.int32)
    scores = empty(device, all_rows, stride)
    peaks = empty(device, all_rows, chunks)
    stats = empty(device, 3, all_rows)
    cap = {"SOFTCAP": x.softcap is not None, "UNIT": plan.unit}
    bands, size = budgets(stack), (stack.size[0], bits_of(stack.size[1]))
    keyed = (*q.stride()[:3], *plan.steps(k), *look, x.scaling, x.softcap or 1.0, *bands)
    if kind == "best":
        aboves, masses = empty(device, all_rows, chunks, dtype=torch.int32), peaks
        launch(
            sample_keys_kernel, (all_rows,), q, k, mask, limits, lines, histogram, keys, batch, *keyed, *size,
            **plan.shape, **plan.dims, **plan.sight, **cap,
            SAMPLES=t.samples, SLICE=min(64, plan.dims["BD"]), BINS=t.bins, warps=t.sample_warps,
        )  # fmt: skip
    else:
        aboves, masses = peaks, empty(device, 2, all_rows, chunks)
    launch(
        score_kernel, (chunks, batch * groups, -(-(heads // groups * rows) // plan.bm)),
        q, k, mask, limits, lines, scores, histogram, peaks, aboves, masses, keys, batch, stride // 16, chunks, *keyed,
        **plan.shape, **plan.dims, **plan.sight, **cap,
        MASSES=kind != "best", BINS=t.bins, BM=plan.bm, BN=t.tile, TILES=t.tiles, STAGES=t.score_stages,
        warps=t.score_warps,
    )  # fmt: skip
    ranking, most_chunks = scores, power_of_2(-(-plan.keys // span))
    if kind != "best":
        launch(
            sample_scores_kernel, (selections,), scores, limits, lines, histogram, peaks, masses, stats,
            keys, batch, stride // 16, chunks, stack.top_p, *bands, *size,
            **plan.shape, **plan.sight, MASS=mass, TOTAL=stack.total, CHUNKS=most_chunks, SAMPLES=t.samples,
            BINS=t.bins, warps=t.sample_warps,
        )  # fmt: skip
        chunks = -(-stride // t.histogram_chunk)
        most_chunks = power_of_2(-(-power_of_2(stride) // t.histogram_chunk))
        aboves = empty(device, selections, chunks, dtype=torch.int32)
        masses = empty(device, selections, chunks)
        ranking = scores if mass else empty(device, selections, stride)
        launch(
            histogram_kernel, (chunks, selections), scores, ranking, limits, lines, histogram, stats, aboves, masses,
            keys, batch, stride // 16, chunks, *bands,
            **plan.shape, **plan.sight, MASS=mass, BINS=t.bins, **plan.digits, CHUNK=t.histogram_chunk,
        )  # fmt: skip
    cuts, bounds = empty(device, 4, selections), empty(device, 4, selections, dtype=torch.int32)
    needs, count = (empty(device, selections, dtype=kind) for kind in (torch.int64, torch.int32))
    launch(
        threshold_kernel, (selections,),
        ranking, limits, lines, histogram, peaks, aboves, masses, stats, cuts, bounds, needs, count,
        keys, batch, stride // 16, chunks, stack.top_p, *bands, *size,
        **plan.shape, **plan.sight, KIND=kind, TOTAL=stack.total, BINS=t.bins, **plan.digits, CHUNKS=most_chunks,
        LIST=t.listed, BLOCK=1024, warps=t.threshold_warps,
    )  # fmt: skip
    listed = empty(device, selections, t.listed, dtype=torch.int32), empty(device, selections, t.listed)
    share = min(1.0, stack.size[0] / keys + stack.size[1])
    stream = mass or (kind == "best" and share * 3 > 1)
    gather = mass or not stream
    most = -(-keys // t.chunk)
    splits = max(1, min(most, t.gather_programs // selections))
    per_split = -(-most // splits)
    splits = -(-most // per_split)
    sums, totals = empty(device, all_rows, splits, value_dim), empty(device, all_rows, splits)
    valued = (keys, batch, stride // 16)
    value_strides = plan.steps(v)
    wide = {"DV": value_dim, "BDV": max(16, power_of_2(value_dim))}
    packed = empty(device, selections, splits, t.chunk, dtype=torch.int32)
    many = max(16, power_of_2(heads // groups * rows))
    if kind == "group":
        launch(
            gather_group_kernel, (splits, selections),
            v, scores, ranking, cuts, bounds, stats, packed, *listed, count, sums, totals,
            *valued, per_split, *value_strides,
            **plan.shape, **wide, UNIT=plan.unit, CHUNK=t.chunk, BT=t.group_rows,
            BM=max(16, power_of_2(heads // groups)), LIST=t.listed, warps=t.gather_warps,
        )  # fmt: skip
    elif gather:
        launch(
            gather_kernel, (splits, all_rows),
            v, scores, cuts, bounds, stats, packed, empty(device, selections, splits, t.chunk), *listed, count,
            sums, totals, *valued, per_split, *value_strides,
            **plan.shape, **wide, EITHER=stream, UNIT=plan.unit, CHUNK=t.chunk, BT=t.rows, BM=many,
            LIST=t.listed, warps=t.gather_warps,
        )  # fmt: skip
    if stream:
        launch(
            stream_kernel, (splits, batch * groups, -(-many // plan.bm)),
            v, scores, cuts, bounds, stats, *listed, count, sums, totals,
            *valued, per_split * (t.chunk // t.stream_tile), *value_strides,
            **plan.shape, **wide, EITHER=gather, UNIT=plan.unit, BN=t.stream_tile, BM=plan.bm, MANY=many,
            LIST=t.listed, STAGES=t.stream_stages, warps=t.stream_warps,
        )  # fmt: skip
    launch(
        combine_kernel, (all_rows,),
        v, scores, lines, bounds, needs, stats, *listed, count, empty(device, all_rows, t.listed, dtype=torch.int32),
        sums, totals, q if x.sinks is None else x.sinks, out, *valued, splits, *value_strides,
        **plan.shape, **wide, KIND=kind, SINKS=x.sinks is not None, UNIT=plan.unit, FIXED=plan.digits["FIXED"],
        LIST=t.listed, BT=16, BS=16, warps=t.combine_warps,
    )  # fmt: skip


def decode_rows(x: Inputs) -> torch.Tensor:
    """``out [B, Q, H, Dv]`` of a checked call."""
    batch, heads, rows, _ = x.q.shape
    plan = plan_of(x)
    launch = Launcher(plan)
    out = torch.empty(batch, rows, heads, x.v.shape[3], dtype=x.q.dtype, device=x.q.device)
    if POISON:
        out.fill_(float("nan"))
    run = decode_bands if x.stack.kind == "bands" else decode_scored
    run(x, plan, launch, out)
    return out
