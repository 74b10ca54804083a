"""Scoring kernels of the published methods on a GPU: checked against their maskers, then timed in every cut.

    python -m benchmarks.approximate_scores [--keys 131072] [--batch 1] [--method NAME]

Prints one short table: microseconds of CUDA-graph replays over as many copies of the side data as do not fit into the
cache. ``peaks``: scores and peaks alone; ``masses``: with masses; ``bins``: with a histogram of a tenth of the keys.
HashAttention's levels and their counts, which take the place of scores, are timed by chunk and warps, and so are levels
beside scores (Double Sparsity, PQCache), and the lines that they are laid on.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sah_transformers.bench.timing import compare
from sah_transformers.kernels.approximate import methods
from sah_transformers.kernels.approximate.launch import Edges, Levels, Samples, Scoring, Tile
from sah_transformers.kernels.approximate.place import Direct
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.maskers.channel_file import write_channels
from sah_transformers.maskers.hash_weights import write_hash_weights
from sah_transformers.rows import Context

H, G, D = 32, 8, 128
METHODS = ("hash_attention", "double_sparsity", "pq_cache", "socket")
SUMMED = ("hash_attention", "socket")
BINS = 1024
CACHE = 100 * 2**20


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs, with random channels and weights."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(D, generator=generator).tolist() for _ in range(H)]
    write_channels(folder / "channels.json", {0: orders})
    sizes = [(D, D), (D, D), (D, 32)]
    sides = {
        side: [(torch.randn(H, o, i, generator=generator) / i**0.5, torch.zeros(H, o)) for i, o in sizes]
        for side in "qk"
    }
    write_hash_weights(folder / "hash.safetensors", {0: sides}, H, G)
    return {
        "hash_attention": {"hat_weight_file": str(folder / "hash.safetensors")},
        "double_sparsity": {"sorted_channel_file": str(folder / "channels.json")},
        "pq_cache": {"pq_sub_dim": 0.5},
        "socket": {},
    }


@dataclass
class Case:
    """One method's masker, tensors and side data, in copies."""

    module: Any
    masker: Any
    ctx: Context
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sides: list[dict[str, torch.Tensor]]

    @property
    def given(self) -> Any:
        return self.masker.given(self.ctx, self.q.shape[3], self.q.device)


def case_of(name: str, fields: dict[str, Any], batch: int, keys: int) -> Case:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(batch, H, 1, D), normal(batch, G, keys, D), normal(batch, G, keys, D)
    masker = MaskerRegistry.create_masker({"type": name, "heavy_size": 0.05, **fields})
    ctx = Context(scaling=D**-0.5, heads=H, positions=torch.arange(keys, device="cuda").expand(batch, keys))
    prepared = masker.prepare(k, v, ctx)
    side = {} if prepared is None else {**prepared[0], "ready": prepared[1]}
    made = masker.append(k, v, replace(ctx, side=side))
    if name == "socket":
        made["buckets"] = made["buckets"].mT.contiguous().mT
    size = sum(t.nbytes for t in made.values())
    copies = [made] + [{n: t.clone() for n, t in made.items()} for _ in range(min(8, CACHE // size))]
    module = importlib.import_module(f"sah_transformers.kernels.approximate.{name}")
    return Case(module, masker, replace(ctx, side={**side, **made}), q, k, v, copies)


def call_of(case: Case, tile: Tile, summed: bool, tally: str, truth: torch.Tensor | None) -> Scoring:
    batch, keys = case.k.shape[0], case.k.shape[2]
    chunks = -(-keys // tile.span)
    rows = batch * (G if summed else H)
    lines = torch.zeros(2, rows, device="cuda")
    if truth is not None:
        some = truth.flatten(0, 2)[:, :: max(1, keys // 4096)].float()
        low, high = some.quantile(0.9, dim=1), some.quantile(0.995, dim=1)
        lines[0] = BINS / (high - low).clamp(min=1e-6)
        lines[1] = -low * lines[0]
    f32, i32 = {"device": "cuda"}, {"device": "cuda", "dtype": torch.int32}
    return Scoring(
        case.q, case.k, keys, chunks * tile.span, case.q, (0, 0, 0), torch.empty(1, **i32), lines,
        torch.empty(rows, chunks * tile.span, **f32), torch.zeros(rows, BINS, **i32), torch.empty(rows, chunks, **f32),
        torch.empty(rows, chunks, **i32), torch.empty(rows, chunks, **f32), case.ctx.scaling, (128, 0, 128, 0), True,
        False, tally == "masses", BINS if tally == "bins" else 0, summed,
    )  # fmt: skip


def scratch_of(case: Case, call: Scoring, given: Any) -> dict[str, torch.Tensor]:
    sizes = case.module.scratch(call, case.sides[0], given)
    return {name: torch.empty(size, dtype=dtype, device="cuda") for name, (size, dtype) in sizes.items()}


def truth_of(case: Case, summed: bool) -> torch.Tensor:
    truth = case.masker.score(case.q.double(), case.k.double(), case.v.double(), case.ctx)
    return truth.unflatten(1, (G, -1)).sum(2) if summed else truth


def check(case: Case, tile: Tile, summed: bool, truth: torch.Tensor) -> float:
    """Largest error of a score, of the largest score."""
    given, launch, keys = case.given, Direct(), case.k.shape[2]
    call = call_of(case, tile, summed, "masses", None)
    scratch = scratch_of(case, call, given)
    case.module.look_up(launch, call, case.sides[0], given, scratch)
    case.module.score(launch, call, case.sides[0], given, scratch, tile)
    flat = truth.flatten(0, 2)
    error = ((call.scores[:, :keys] - flat).abs().max() / flat.abs().max()).item()
    assert error == 0 if case.masker.config.type == "hash_attention" else error < 4e-6, (tile, summed, error)
    assert torch.equal(call.peaks.amax(1), call.scores.amax(1))
    return error


def score_us(case: Case, tile: Tile, summed: bool, tally: str, truth: torch.Tensor) -> float:
    given, launch = case.given, Direct()
    call = call_of(case, tile, summed, tally, truth)
    scratch = scratch_of(case, call, given)
    case.module.look_up(launch, call, case.sides[0], given, scratch)

    def run() -> None:
        for side in case.sides:
            case.module.score(launch, call, side, given, scratch, tile)

    return replay_us(run) / len(case.sides)


def replay_us(function: Callable[[], None]) -> float:
    """Microseconds of one replay."""
    return compare({"": function}, True, 0.1)[""].p50 * 1e3


def rest_us(case: Case, summed: bool) -> tuple[float, float]:
    """(look-up, append of one key) in microseconds, each as ten in a row."""
    given, launch = case.given, Direct()
    call = call_of(case, tiles_of(case, summed)[0], summed, "peaks", None)
    scratch = scratch_of(case, call, given)
    start = torch.tensor([case.k.shape[2] - 1], device="cuda")
    k, v = case.k[:, :, -1:].clone(), case.v[:, :, -1:].clone()

    def look_up() -> None:
        for _ in range(10):
            case.module.look_up(launch, call, case.sides[0], given, scratch)

    def append() -> None:
        for _ in range(10):
            case.module.append(case.sides[0], k, v, start, given)

    before = {name: t.clone() for name, t in case.sides[0].items()}
    append()
    for name, t in case.sides[0].items():
        assert torch.equal(t, before[name]), f"append of {name} differs from the masker's"
    looked = 0.0 if case.masker.config.type == "double_sparsity" else replay_us(look_up) / 10
    return looked, replay_us(append) / 10


def level_us(case: Case, summed: bool, chunk: int, warps: int, truth: torch.Tensor) -> float:
    """Of levels in place of scores, which are checked."""
    given, launch, keys = case.given, Direct(), case.k.shape[2]
    call = call_of(case, Tile(chunk, 1, warps), summed, "peaks", None)
    most = case.module.levels(call, given)
    bins = 1 << max(6, most.bit_length())
    rows, chunks = len(call.scores), call.stride // chunk
    cut = Levels(
        None, torch.empty(rows, call.stride, dtype=torch.uint8, device="cuda"),
        torch.empty(rows, chunks, bins, dtype=torch.int32, device="cuda"), chunk, bins, warps,
    )  # fmt: skip
    scratch = scratch_of(case, call, given)
    case.module.look_up(launch, call, case.sides[0], given, scratch)
    case.module.level(launch, call, case.sides[0], given, scratch, cut)
    wanted = torch.nn.functional.pad((truth.flatten(0, 2) + most + 1) // 2, (0, call.stride - keys)).to(torch.uint8)
    wanted[:, :128] = 0
    wanted[:, keys - 128 :] = 0
    assert torch.equal(cut.levels, wanted), "levels differ from the masker's scores"
    counts = torch.nn.functional.one_hot(wanted[:2].long().unflatten(1, (chunks, chunk)), bins).sum(2)
    assert torch.equal(cut.histogram[:2].long(), counts), "counts of levels differ"

    def run() -> None:
        for side in case.sides:
            case.module.level(launch, call, side, given, scratch, cut)

    return replay_us(run) / len(case.sides)


def scored_levels_us(case: Case, chunk: int, warps: int, truth: torch.Tensor) -> tuple[float, float]:
    """Of levels beside scores, and of the lines that they are laid on; both are checked."""
    given, launch, keys = case.given, Direct(), case.k.shape[2]
    call = call_of(case, Tile(chunk, 1, warps), False, "peaks", None)
    rows, chunks = len(call.scores), call.stride // chunk
    samples = Samples(torch.empty(3, rows, device="cuda"), (keys // 20, 0), 1024, 8, 16)
    cut = Levels(
        samples.lines, torch.empty(rows, call.stride, dtype=torch.uint8, device="cuda"),
        torch.empty(rows, chunks, 8, dtype=torch.int32, device="cuda"), chunk, 16, warps,
    )  # fmt: skip
    scratch = scratch_of(case, call, given)
    case.module.look_up(launch, call, case.sides[0], given, scratch)

    def run_line() -> None:
        for side in case.sides:
            case.module.line(launch, call, side, given, scratch, samples)

    def run_level() -> None:
        for side in case.sides:
            case.module.level(launch, call, side, given, scratch, cut)

    line = replay_us(run_line) / len(case.sides)
    level = replay_us(run_level) / len(case.sides)
    flat = truth.flatten(0, 2)
    assert (call.scores[:, :keys] - flat).abs().max() < 4e-6 * flat.abs().max(), "scores differ"
    reached = [(cut.levels >= low).sum(1) for low in (15, 2)]
    assert bool(((reached[0] < keys // 20) & (reached[1] > keys // 20)).all()), "a line misses the cut"
    counts = torch.nn.functional.one_hot(cut.levels[:2].long().unflatten(1, (chunks, chunk)), 16).sum(2)
    assert torch.equal(cut.histogram[:2].long(), counts[..., :8] | counts[..., 8:] << 16), "counts of levels differ"
    return level, line


def coarse_us(case: Case, tile: Tile, truth: torch.Tensor) -> tuple[float, float]:
    """Of coarse scores, and of exact ones of 1,024 keys of each row; both are checked."""
    given, launch, keys = case.given, Direct(), case.k.shape[2]
    call = replace(call_of(case, tile, False, "peaks", None), coarse=True)
    scratch = scratch_of(case, call, given)
    case.module.look_up(launch, call, case.sides[0], given, scratch)
    rows, flat = len(call.scores), truth.flatten(0, 2)
    lists = torch.rand(rows, keys, device="cuda").topk(1024).indices.sort().values
    cuts = torch.full((5, rows), 1024, dtype=torch.int32, device="cuda")
    edges = Edges(cuts, lists.int(), 1024, 0)

    def run_score() -> None:
        for side in case.sides:
            case.module.score(launch, call, side, given, scratch, tile)

    def run_settle() -> None:
        for side in case.sides:
            case.module.settle(launch, call, side, given, scratch, edges)

    times = [replay_us(run_score) / len(case.sides)]
    case.module.score(launch, call, case.sides[0], given, scratch, tile)
    off = (call.scores[:, :keys] / flat - 1).abs().max().item()
    assert off <= case.module.error(call, given), f"coarse scores are off by {off}"
    times.append(replay_us(run_settle) / len(case.sides))
    case.module.settle(launch, call, case.sides[0], given, scratch, edges)
    apart = (call.scores.gather(1, lists) - flat.gather(1, lists)).abs().max() / flat.max()
    assert apart < 4e-6, f"exact scores of an edge are off by {apart}"
    return times[0], times[1]


def tiles_of(case: Case, summed: bool) -> tuple[Tile, ...]:
    """The cuts of the score kernel."""
    return methods.tiles_of(case.module, call_of(case, case.module.TILES[0], summed, "peaks", None), case.given)


def report(case: Case, label: str, summed: bool) -> None:
    truth = truth_of(case, summed)
    best: tuple[float, str] | None = None
    print(f"{label}{' summed' if summed else ''}: ", end="")
    for tile in tiles_of(case, summed):
        try:
            check(case, tile, summed, truth)
            times = [score_us(case, tile, summed, tally, truth) for tally in ("peaks", "masses", "bins")]
        except Exception as fault:  # one cut that fails leaves the others
            print(f"{tile.keys}x{tile.count}w{tile.warps}: {type(fault).__name__} {str(fault)[:80]}", end="; ")
            continue
        text = "/".join(f"{t:.1f}" for t in times)
        print(f"{tile.keys}x{tile.count}w{tile.warps} {text}", end="; ", flush=True)
        if best is None or times[0] < best[0]:
            best = times[0], f"{tile.keys}x{tile.count}w{tile.warps}"
    if case.masker.config.type == "hash_attention":
        cuts = [(1024, 4), (1024, 2), (1024, 8), (2048, 8), (2048, 4), (4096, 8), (512, 2)]
        found = "; ".join(f"{c}w{w} {level_us(case, summed, c, w, truth):.1f}" for c, w in cuts)
        print(f"\n  levels: {found}", end="")
    if hasattr(case.module, "line"):
        cuts = [(1024, 4), (1024, 2), (1024, 8), (2048, 8), (2048, 4)]
        times = [(cut, scored_levels_us(case, *cut, truth)) for cut in cuts]
        found = "; ".join(f"{c}w{w} {level:.1f}" for (c, w), (level, _) in times)
        print(f"\n  levels beside scores: {found}; lines {times[0][1][1]:.1f}", end="")
    looked, appended = rest_us(case, summed)
    print(f"\n  best {best}, look-up {looked:.1f}, append {appended:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--method", choices=METHODS, action="append")
    given = parser.parse_args()
    print(f"B={given.batch} H={H} G={G} D={D} K={given.keys}; tile x tiles w warps: peaks/masses/bins, us", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        configs = files(Path(folder))
        for name in given.method or METHODS:
            case = case_of(name, configs[name], given.batch, given.keys)
            report(case, name, False)
            if name in SUMMED:
                report(case, name, True)
            if name == "socket":
                truth = truth_of(case, False)
                for tile in (*case.module.TILES, Tile(512, 1, 2), Tile(2048, 1, 8)):
                    score, settle = coarse_us(case, tile, truth)
                    print(
                        f"  coarse {tile.keys}x{tile.count}w{tile.warps}: {score:.1f}, edges {settle:.1f}", flush=True
                    )
                for piece in (3, 6):
                    case.module.PIECE = piece
                    report(case, f"socket pieces of {piece} bits", False)
                case.module.PIECE = 4
                for side in case.sides:
                    side["buckets"] = side["buckets"].contiguous()
                report(case, "socket, words together", False)
            del case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
