"""The launches of one decode call, in order, on the current stream; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sah_transformers.kernels.built import built
from sah_transformers.kernels.decode.bands import bands_kernel, merge_kernel
from sah_transformers.kernels.decode.bracket import sample_keys_kernel, sample_scores_kernel
from sah_transformers.kernels.decode.combine import combine_kernel
from sah_transformers.kernels.decode.gather import gather_group_kernel, gather_kernel, stream_kernel
from sah_transformers.kernels.decode.histogram import histogram_kernel
from sah_transformers.kernels.decode.limits import bounds_kernel, count_kernel
from sah_transformers.kernels.decode.look import score_and_look_kernel
from sah_transformers.kernels.decode.score import score_kernel
from sah_transformers.kernels.decode.stack import Stack, bits_of, power_of_2
from sah_transformers.kernels.decode.threshold import threshold_kernel
from sah_transformers.kernels.decode.tuned import Tuning, tuning_of
from sah_transformers.kernels.tape import Address, new, note

MOST_SPLITS = 64  # of the bands

OUTPUTS = 32  # numbers of a row's output that a program adds up

SEGMENT = 1024  # keys of a mask that are counted together

MASSES = {"best": 0, "group": 1, "mass": 2}  # that scoring sums up: none, all visible mass, of candidates and bands


@dataclass
class Inputs:
    """Tensors and numbers of one call.

    Attributes:
        q, k, v: ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``, the last dimension contiguous.
        mask: bool ``[B|1, Q|1, K]`` or None.
        sinks: logits ``[H]`` or None.
        least: rows that see fewer keys are dense.
    """

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


Elements = dict[str, tuple[int, torch.dtype]]
"""How many elements arrays have, and of which type."""


@dataclass
class Layout:
    """Where arrays lie in one allocation, in bytes."""

    sizes: Elements

    def __post_init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.total = 0
        for name, (size, dtype) in self.sizes.items():
            self.offsets[name] = self.total
            self.total += -(-size * dtype.itemsize // 256) * 256


@dataclass
class Plan:
    """What calls of one class of shapes have in common: tile sizes, compile-time constants, compiled kernels.

    ``keys`` bounds K; nothing here may depend on K itself. Strides of keys and values travel in multiples of ``unit``.
    ``bm`` rows of a group are taken at once; fewer than 16 want `values.dot_few`. ``sliced``: ``wide`` where a program
    makes a part of the output.
    """

    tuning: Tuning
    keys: int
    unit: int
    bm: int
    shape: dict[str, int]
    dims: dict[str, int]
    wide: dict[str, int]
    sliced: dict[str, int]
    sight: dict[str, bool]
    digits: dict[str, int]
    streams: bool
    compiled: list[tuple] = field(default_factory=list)
    last: tuple[tuple[int, ...], Layout] | None = None

    def steps(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """The strides of keys or values over batch, head and position, in units."""
        b, g, k, _ = tensor.stride()
        return b // self.unit, g // self.unit, k // self.unit

    def layout(self, sizes: Callable[[], Elements], *lengths: int) -> Layout:
        """Of arrays of ``sizes``, which depend on the plan and on ``lengths``; the last one is kept, as the layers of
        a model ask for the same one after the other."""
        last = self.last
        if last is None or last[0] != lengths:
            last = self.last = lengths, Layout(sizes())
        return last[1]


PLANS: dict[tuple, Plan] = {}


def plan_of(x: Inputs, *more: Any) -> Plan:
    """The plan of this class of shapes (and of what else tells calls apart), made on its first call."""
    q, k, v, stack = x.q, x.k, x.v, x.stack
    qs, ks, vs = q.stride(), k.stride(), v.stride()
    bound = max(256, power_of_2(k.shape[2]))
    ored = ks[0] | ks[1] | ks[2] | vs[0] | vs[1] | vs[2] | q.shape[3] | v.shape[3]
    unit = 1 if ored % 8 else 8  # whether 8 divides each
    key = (
        more, stack, q.dtype, q.device.index, q.shape, k.shape[1], v.shape[3], bound, unit, qs, ks[2], vs[2],
        max(ks[0], vs[0]) < 2**31, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16, x.causal,
        x.softcap is None, None if x.mask is None else (x.mask.stride(), x.mask.data_ptr() % 16),
        None if x.sinks is None else (x.sinks.dtype, x.sinks.data_ptr() % 16),
    )  # fmt: skip
    plan = PLANS.get(key)
    if plan is None:
        plan = PLANS[key] = _make_plan(x, bound, unit)
    return plan


def _make_plan(x: Inputs, bound: int, unit: int) -> Plan:
    _, heads, rows, dim = x.q.shape
    groups, value_dim = x.k.shape[1], x.v.shape[3]
    digits = (bound - 1).bit_length()
    padded = max(16, power_of_2(dim))
    padded_value = max(16, power_of_2(value_dim))
    share = min(1.0, 2 * x.stack.size[0] / bound + x.stack.size[1])
    return Plan(
        tuning=tuning_of(x.stack.kind, x.q.element_size(), max(padded, padded_value), bound),
        keys=bound,
        unit=unit,
        bm=min(64, max(8, power_of_2(heads // groups * rows))),
        shape={"H": heads, "G": groups, "Q": rows},
        dims={"D": dim, "BD": padded},
        wide={"DV": value_dim, "BDV": padded_value},
        sliced={"DV": value_dim, "BDV": min(OUTPUTS, padded_value)},
        sight={"CAUSAL": x.causal, "MASKED": x.mask is not None},
        digits={"FIXED": min(24, 61 - 2 * digits), "COUNT_BITS": digits + 1},
        streams=x.stack.kind == "best" and 3 * share > 1,
    )


class Scratch:
    """Arrays of one call in one allocation; addresses once kernels are compiled, tensors for the first call."""

    def __init__(self, device: torch.device, as_tensors: bool, layout: Layout):
        self.buffer = new((layout.total,), torch.uint8, device)
        self.layout, self.as_tensors = layout, as_tensors

    def arrays(self) -> dict[str, Any]:
        """By name."""
        offsets = self.layout.offsets
        if not self.as_tensors:
            base = self.buffer.data_ptr()
            return {name: Address(base + offset) for name, offset in offsets.items()}
        return {
            name: self.buffer.narrow(0, offsets[name], size * dtype.itemsize).view(dtype)
            for name, (size, dtype) in self.layout.sizes.items()
        }


class Launcher:
    """Launches kernels; from the second call of a plan on without Triton's look-up, which costs more than the rest."""

    def __init__(self, plan: Plan, device: torch.device):
        self.plan, self.step = plan, 0
        self.ready = bool(plan.compiled)
        if self.ready:
            self.stream = torch._C._cuda_getCurrentRawStream(device.index)

    def address(self, tensor: torch.Tensor) -> Any:
        """What stands for a tensor in a launch."""
        return Address(tensor.data_ptr()) if self.ready else tensor

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        *args: Any,
        warps: int = 4,
        cap: int | None = None,
        fuse: int = True,
        **constants: Any,
    ) -> None:
        """``cap``, ``fuse``: see ``built``."""
        if self.ready:
            known = run, function, metadata, values = self.plan.compiled[self.step]
            self.step += 1
            note(known, grid, args)
            run(*grid, self.stream, function, metadata, None, None, None, *args, *values)
            return
        note(None, grid, args)
        entry = built(kernel, grid, args, constants, warps, cap, fuse)
        if entry is not None:
            self.plan.compiled.append(entry)


def budgets(stack: Stack) -> tuple[int, int, int, int]:
    return stack.first[0], bits_of(stack.first[1]), stack.last[0], bits_of(stack.last[1])


def limit_sizes(x: Inputs, plan: Plan) -> Elements:
    """Scratch that ``see`` needs."""
    rows = x.q.shape[0] * x.q.shape[2]
    counts = 1 if x.mask is None else rows * -(-plan.keys // SEGMENT)
    return {"limits": (5 * rows, torch.int32), "counts_seen": (counts, torch.int32)}


def mask_of(x: Inputs, launch: Launcher) -> tuple[Any, tuple[int, int, int]]:
    """(mask, its strides over (B, Q, K), 0 where it has only one); without one the query stands in for the pointer."""
    if x.mask is None:
        return launch.address(x.q), (0, 0, 0)
    (batch, rows, _), strides = x.mask.shape, x.mask.stride()
    return launch.address(x.mask), (0 if batch == 1 else strides[0], 0 if rows == 1 else strides[1], strides[2])


def see(x: Inputs, plan: Plan, launch: Launcher, s: dict[str, Any]) -> tuple[Any, tuple[int, int, int]]:
    """``mask_of``; finds the rows' limits where there is a mask."""
    mask, look = mask_of(x, launch)
    if x.mask is not None:
        sizes, bands = (x.q.shape[0], x.q.shape[2], x.k.shape[2]), (*budgets(x.stack), x.least)
        find_limits(launch, mask, s["counts_seen"], s["limits"], sizes, look, bands, x.causal, plan.keys)
    return mask, look


def count_seen(
    launch: Any, mask: Any, counts: Any, sizes: tuple[int, int, int], look: tuple[int, ...], causal: bool,
    blank: Any = None, blanks: int = 0,
) -> int:  # fmt: skip
    """Segments per row whose visible keys ``counts`` holds, see ``find_limits``; ``blank``: int32, ``blanks`` numbers
    that become -1."""
    batch, rows, keys = sizes
    segments = -(-keys // SEGMENT)
    launch(
        count_kernel, (segments, batch * rows, 1), mask, counts, counts if blank is None else blank,
        keys, segments, blanks, *look,
        Q=rows, CAUSAL=causal, LENGTH=SEGMENT,
    )  # fmt: skip
    return segments


def segments_of(bound: int) -> dict[str, int]:
    """Constants of ``bounds_of`` for at most ``bound`` keys, a power of two."""
    return {"SEGMENTS": max(16, bound // SEGMENT), "LENGTH": SEGMENT}


def find_limits(
    launch: Any, mask: Any, counts: Any, limits: Any, sizes: tuple[int, int, int], look: tuple[int, ...],
    bands: tuple[int, ...], causal: bool, bound: int,
) -> None:  # fmt: skip
    """``limits [5, B*Q]`` of a mask's rows, see ``bounds_kernel``.

    Args:
        counts: int32 ``[B*Q, ceil(K / SEGMENT)]``, scratch.
        sizes: (B, Q, K); look: the mask's strides over them.
        bound: at least K, a power of two.
    """
    batch, rows, keys = sizes
    segments = count_seen(launch, mask, counts, sizes, look, causal)
    launch(
        bounds_kernel, (batch * rows, 1, 1), mask, counts, limits, keys, batch, segments, *look, *bands,
        Q=rows, CAUSAL=causal, **segments_of(bound),
    )  # fmt: skip


def decode_bands(x: Inputs, plan: Plan, launch: Launcher, out: torch.Tensor) -> None:
    """Two launches: parts of the bands, and their sum."""
    t = plan.tuning
    batch, heads, rows, _ = x.q.shape
    groups, keys, value_dim = x.k.shape[1], x.k.shape[2], x.v.shape[3]
    most = min(keys, sum(max(n, int(keys * share)) for n, share in (x.stack.first, x.stack.last)) + rows)
    bm = max(16, plan.bm)
    tiles = -(-heads // groups * rows // bm)
    programs = t.band_programs if most < t.long_band else t.long_band_programs
    splits = max(1, min(MOST_SPLITS, -(-most // t.band_tile), programs // max(1, batch * groups * tiles)))
    parts = batch * heads * rows * splits
    layout = plan.layout(lambda: {
        **limit_sizes(x, plan), "sums": (parts * value_dim, torch.float32),
        "peaks": (parts, torch.float32), "totals": (parts, torch.float32),
    }, keys)  # fmt: skip
    scratch = Scratch(x.q.device, not launch.ready, layout)
    s = scratch.arrays()
    mask, look = see(x, plan, launch, s)
    launch(
        bands_kernel, (splits, batch * groups, tiles),
        launch.address(x.q), launch.address(x.k), launch.address(x.v), mask, s["limits"],
        s["sums"], s["peaks"], s["totals"],
        keys, batch, *x.q.stride()[:3], *plan.steps(x.k), *plan.steps(x.v), *look,
        x.scaling, x.softcap or 1.0, *budgets(x.stack),
        **plan.shape, **plan.dims, **plan.wide, **plan.sight, SOFTCAP=x.softcap is not None, UNIT=plan.unit,
        BM=bm, BN=t.band_tile, warps=t.band_warps,
    )  # fmt: skip
    merge(x, plan, launch, s, splits, out)


def merge(x: Inputs, plan: Plan, launch: Launcher, s: dict[str, Any], splits: int, out: torch.Tensor) -> None:
    """Add up what each row's parts hold, each relative to a peak of its own."""
    batch, heads, rows, _ = x.q.shape
    launch(
        merge_kernel, (batch * heads * rows, -(-x.v.shape[3] // OUTPUTS), 1), s["sums"], s["peaks"], s["totals"],
        launch.address(x.q if x.sinks is None else x.sinks), launch.address(out), splits,
        H=heads, Q=rows, **plan.sliced, SINKS=x.sinks is not None, BS=MOST_SPLITS,
    )  # fmt: skip


def decode_scored(x: Inputs, plan: Plan, launch: Launcher, out: torch.Tensor) -> None:
    """Bands and one selection by score: bracket, scores, histogram, cut, values, sum."""
    t, stack, kind = plan.tuning, x.stack, x.stack.kind
    mass, masses, after = kind == "mass", MASSES[kind], kind != "best"
    batch, heads, rows, _ = x.q.shape
    groups, keys, value_dim = x.k.shape[1], x.k.shape[2], x.v.shape[3]
    in_group = heads // groups * rows
    all_rows = batch * heads * rows
    selections = batch * groups * rows if kind == "group" else all_rows
    span = t.tile * t.tiles
    chunks = -(-keys // span)
    stride = chunks * span
    side_by_side = power_of_2(heads // groups)
    piece = max(128, 4 * t.histogram_chunk // side_by_side) if kind == "group" else t.histogram_chunk
    looks = -(-stride // piece)
    pieces = -(-keys // t.chunk)
    per_split = -(-pieces // max(1, min(pieces, t.gather_programs // selections)))
    splits = -(-pieces // per_split)
    packs = selections * splits * t.chunk
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    layout = plan.layout(lambda: {
        **limit_sizes(x, plan), "lines": (3 * selections, f32),
        "histogram": (selections * t.bins, i64 if mass else i32), "scores": (all_rows * stride, f32),
        "peaks": (all_rows * chunks, f32), "stats": ((1 + masses) * all_rows, f32),
        "aboves": (selections * looks if after else all_rows * chunks, i32),
        "masses": (max(1, masses * all_rows * chunks), f32), "over": (selections * looks if after else 1, f32),
        "ranking": (selections * stride if kind == "group" else 1, f32), "cuts": (4 * selections, f32),
        "bounds": (4 * selections, i32), "needs": (selections, i64), "count": (selections, i32),
        "list_pos": (selections * t.listed, i32), "list_val": (selections * t.listed, f32),
        "samples": (1 if after else all_rows * t.samples, f32),
        "packed": (packs, i64 if kind != "group" else i32),
        "weights": (selections * stride * side_by_side if kind == "group" else 1, x.v.dtype),
        "sums": (all_rows * splits * value_dim, f32), "totals": (all_rows * splits, f32),
    }, keys)  # fmt: skip
    scratch = Scratch(x.q.device, not launch.ready, layout)
    s = scratch.arrays()
    q, k, v = launch.address(x.q), launch.address(x.k), launch.address(x.v)
    looks_too = kind == "group" and x.mask is not None
    mask, look = mask_of(x, launch) if looks_too else see(x, plan, launch, s)
    bands, size = budgets(stack), (stack.size[0], bits_of(stack.size[1]))
    keyed = (*x.q.stride()[:3], *plan.steps(x.k), *look, x.scaling, x.softcap or 1.0, *bands)
    scored = {**plan.shape, **plan.dims, **plan.sight, "SOFTCAP": x.softcap is not None, "UNIT": plan.unit}
    rowed = {**plan.shape, **plan.sight}
    if not after:
        launch(
            sample_keys_kernel, (all_rows, 1, 1), q, k, mask, s["limits"], s["lines"], s["histogram"], s["samples"],
            keys, batch, *keyed, *size, **scored,
            SAMPLES=t.samples, SLICE=t.slice, STAGES=t.sample_stages, BINS=t.bins, warps=t.sample_warps,
        )  # fmt: skip
    tiles = -(-in_group // plan.bm)
    tiled = {"BM": plan.bm, "BN": t.tile, "TILES": t.tiles, "STAGES": t.score_stages}
    if looks_too:
        launch(
            score_and_look_kernel, (rows + chunks, batch * groups, tiles),
            q, k, mask, s["counts_seen"], s["limits"], s["scores"], s["peaks"], s["masses"],
            keys, batch, stride // 16, chunks, *keyed, x.least, **scored, **tiled,
            AT_ONCE=t.look_segments, **segments_of(plan.keys), warps=t.score_warps,
        )  # fmt: skip
    else:
        launch(
            score_kernel, (chunks, batch * groups, tiles),
            q, k, mask, s["limits"], s["lines"], s["scores"], s["histogram"], s["peaks"], s["aboves"], s["masses"],
            keys, batch, stride // 16, chunks, *keyed, **scored, MASSES=masses, BINS=t.bins, **tiled,
            warps=t.score_warps,
        )  # fmt: skip
    ranking, most_chunks = s["scores"], power_of_2(-(-plan.keys // span))
    if after:
        launch(
            sample_scores_kernel, (selections, 1, 1),
            s["scores"], s["limits"], s["lines"], s["histogram"], s["peaks"], s["masses"], s["stats"],
            keys, batch, stride // 16, chunks, stack.top_p, *bands, *size, **rowed,
            MASS=mass, TOTAL=stack.total, CHUNKS=most_chunks,
            HEADS=side_by_side, SAMPLES=t.samples, BINS=t.bins, warps=t.sample_warps,
        )  # fmt: skip
        chunks, most_chunks = looks, power_of_2(-(-(plan.keys + span) // piece))
        ranking = s["scores"] if mass else s["ranking"]
        launch(
            histogram_kernel, (chunks, selections, 1),
            s["scores"], ranking, s["weights"], s["limits"], s["lines"], s["histogram"], s["stats"], s["aboves"],
            s["over"],
            keys, batch, stride // 16, chunks, *bands, **rowed,
            MASS=mass, BINS=t.bins, **plan.digits, CHUNK=piece, HEADS=side_by_side, warps=t.histogram_warps,
        )  # fmt: skip
    launch(
        threshold_kernel, (selections, 1, 1),
        ranking, s["limits"], s["lines"], s["histogram"], s["peaks"], s["aboves"], s["over"], s["stats"], s["cuts"],
        s["bounds"], s["needs"], s["count"], keys, batch, stride // 16, chunks, stack.top_p, *bands, *size, **rowed,
        KIND=kind, TOTAL=stack.total, BINS=t.bins, **plan.digits, CHUNKS=most_chunks, LIST=t.listed, BLOCK=1024,
        warps=t.threshold_warps,
    )  # fmt: skip
    cut = (s["cuts"], s["bounds"], s["stats"])
    listed = (s["list_pos"], s["list_val"], s["count"])
    parts = (s["sums"], s["totals"])
    sized, steps = (keys, batch, stride // 16), plan.steps(x.v)
    valued = {**plan.shape, **plan.wide, "UNIT": plan.unit, "LIST": t.listed}
    many = max(16, power_of_2(in_group))
    if kind == "group":
        launch(
            gather_group_kernel, (splits, selections, 1), v, ranking, s["weights"], s["cuts"], s["bounds"],
            s["packed"], *listed, *parts,
            *sized, per_split, *steps, **valued,
            CHUNK=t.chunk, BT=t.rows, BM=max(16, side_by_side), HEADS=side_by_side, warps=t.gather_warps,
        )  # fmt: skip
    if mass or (kind == "best" and not plan.streams):
        launch(
            gather_kernel, (splits, all_rows, 1), v, s["scores"], *cut, s["packed"], *listed, *parts,
            *sized, per_split, *steps, **valued,
            EITHER=mass, CHUNK=t.chunk, BT=t.rows, BM=many, warps=t.gather_warps, cap=t.gather_registers,
        )  # fmt: skip
    if mass or plan.streams:
        launch(
            stream_kernel, (splits, batch * groups, tiles), v, s["scores"], *cut, *listed, *parts,
            *sized, per_split * (t.chunk // t.stream_tile), *steps, **valued,
            EITHER=mass, BN=t.stream_tile, BM=plan.bm, MANY=many, STAGES=t.stream_stages, warps=t.stream_warps,
        )  # fmt: skip
    launch(
        combine_kernel, (all_rows, -(-value_dim // OUTPUTS), 1),
        v, s["scores"], s["lines"], s["needs"], s["stats"], *listed, *parts,
        launch.address(x.q if x.sinks is None else x.sinks), launch.address(out),
        *sized, splits, *steps, **{**valued, **plan.sliced},
        KIND=kind, SINKS=x.sinks is not None, FIXED=plan.digits["FIXED"],
        BT=min(32, t.listed), BS=t.parts, warps=t.combine_warps,
    )  # fmt: skip


def decode_rows(x: Inputs) -> torch.Tensor:
    """``out [B, Q, H, Dv]`` of a checked call."""
    batch, heads, rows, _ = x.q.shape
    plan = plan_of(x)
    launch = Launcher(plan, x.q.device)
    out = new((batch, rows, heads, x.v.shape[3]), x.q.dtype, x.q.device)
    run = decode_bands if x.stack.kind == "bands" else decode_scored
    try:
        run(x, plan, launch, out)
    except Exception:
        plan.compiled.clear()  # half a plan would be taken for a whole one
        raise
    return out
