"""Times and memory. All sides of a comparison take turns, so that clocks and heat are the same for all."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

Function = Callable[[], Any]

LEAST, MOST = 5, 25
"""Samples of each side; between them ``SECONDS`` decide."""
SECONDS = 2.0

SHORT_MS, IN_A_ROW = 1.0, 10
"""What takes less is captured this many times in one graph: the launch of the graph is not what is timed."""


@dataclass(frozen=True)
class Times:
    """Quantiles in ms of one call, and how they were taken: ``"graph"``, ``"events"`` or ``"clock"``."""

    p20: float
    p50: float
    p80: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        quantiles = {"p20_ms": self.p20, "p50_ms": self.p50, "p80_ms": self.p80}
        return {name: float(f"{value:.4g}") for name, value in quantiles.items()} | {"method": self.method}


def compare(
    functions: dict[str, Function], cuda: bool, seconds: float = SECONDS, expected: torch.Tensor | None = None
) -> dict[str, Times]:
    """Times of each function, sampled in turns for about ``seconds`` in all.

    Raises:
        RuntimeError: when the first function, replayed back to back, does not give the bits ``expected`` of it.
    """
    kind: type[Replay] | type[Clock] = Replay if cuda else Clock
    sides = {name: kind(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = defaultdict(list)
    start = time.perf_counter()
    for i in range(MOST):
        for name, side in sides.items():
            samples[name].append(side.sample())
        if i + 1 >= LEAST and time.perf_counter() - start > seconds:
            break
    first = next(iter(sides.values()))
    if expected is not None and not torch.equal(first.result, expected):
        raise RuntimeError("calls back to back give another result")
    return {name: _times(taken, sides[name].method) for name, taken in samples.items()}


def _times(samples: list[float], method: str) -> Times:
    p20, p50, p80 = (float(numpy.percentile(samples, q)) for q in (20, 50, 80))
    return Times(p20, p50, p80, method)


class Clock:
    """Wall time of a call on the CPU."""

    method = "clock"

    def __init__(self, function: Function):
        self.function = function
        self.result = function()

    def sample(self) -> float:
        """ms of one call."""
        start = time.perf_counter()
        self.result = self.function()
        return (time.perf_counter() - start) * 1e3


class Replay:
    """A call captured in a CUDA graph; timed by events alone where it waits for the device."""

    def __init__(self, function: Function):
        self.once: Function = function
        self.calls = 1
        self.result: Any = None
        side = torch.cuda.Stream()
        torch.cuda.synchronize()  # the side stream does not wait for the inputs
        with torch.cuda.stream(side):
            for _ in range(3):
                self.result = function()
            waits = _waits_for_device(function)
        torch.cuda.synchronize()
        self.method = "events" if waits or not self._captures(function, side) else "graph"
        self.once()

    def _captures(self, function: Function, side: torch.cuda.Stream) -> bool:
        """Capture the call if it can be."""
        try:
            self._capture(function, 1, side)
            if min(self.sample() for _ in range(3)) < SHORT_MS:
                self._capture(function, IN_A_ROW, side)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # what CUDA does not let into a graph
            self.once, self.calls = function, 1
            return False
        return True

    def _capture(self, function: Function, calls: int, side: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                self.result = function()  # the last one's memory is written by each replay
        self.once, self.calls = graph.replay, calls

    def sample(self) -> float:
        """ms of one call."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.once()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / self.calls


def _waits_for_device(function: Function) -> bool:
    """Whether a (warm) call synchronises; a failed capture would leave the allocator in a bad state."""
    with warnings.catch_warnings(action="ignore"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


def copy_rate(cuda: bool) -> float:
    """Bytes per second that a copy reads and writes: the ceiling of what is bound by memory."""
    source = torch.ones(2**28 if cuda else 2**24, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    times = compare({"copy": lambda: target.copy_(source)}, cuda, 0.3)
    return 2 * source.nbytes / times["copy"].p50 * 1e3


def first_call(function: Callable[[], torch.Tensor], cuda: bool) -> tuple[torch.Tensor, float | None]:
    """The result of a first call, and the MiB that it took beside its result (None on a CPU).

    What the call keeps for later calls counts, so it has to be the first one.
    """
    if not cuda:
        return function(), None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    torch.cuda.synchronize()
    return out, (torch.cuda.max_memory_allocated() - before - out.nbytes) / 2**20


def host_us(function: Function, cuda: bool, repeats: int = 200) -> dict[str, float]:
    """Microseconds of the host's time of a warm eager call: quantiles. The device works meanwhile."""
    for _ in range(10):
        function()
    times = []
    for i in range(repeats if cuda else repeats // 4):
        if cuda and i % 20 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e6)
    return {f"p{q}_us": round(float(numpy.percentile(times, q)), 1) for q in (20, 50, 80)}


def stage_us(function: Function, cuda: bool, repeats: int = 5) -> dict[str, float]:
    """Microseconds of each kernel (on a CPU: each operator) of a call, its launches summed, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    function()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with warnings.catch_warnings(action="ignore"), profile(activities=[activity]) as profiled:
        for _ in range(repeats):
            function()
        if cuda:
            torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.events() or ():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == cuda:
            times[event.name] += event.device_time if cuda else event.self_cpu_time_total
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {name: round(total / repeats, 1) for name, total in ordered if total / repeats >= 0.05}
