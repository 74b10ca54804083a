"""What ``sah bench`` prints: a table for each suite, then one line of JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sah_transformers.bench.run import Result, Setup
from sah_transformers.bench.suites import AT_LEAST, AT_MOST

COLUMNS = ("case", "ours: p50 ms", "p20-p80", "dense: p50 ms", "ratio", "target", "MB moved", "of copy", "extra MiB")


def table(title: str, results: Iterable[Result]) -> Any:
    """A ``rich`` table of one suite's results."""
    from rich.table import Table

    drawn = Table(title=title)
    for name in COLUMNS:
        drawn.add_column(name, justify="left" if name in ("case", "target") else "right")
    for result in results:
        drawn.add_row(*_cells(result))
    return drawn


def steps_table(results: Iterable[Result]) -> Any:
    """A ``rich`` table of how whole decode steps split: ms per token, and memory."""
    from rich.table import Table

    from sah_transformers.bench.step import PARTS

    parts = (*PARTS, "rest")
    drawn = Table(title="ms per token of generate()")
    for name in ("case", "way", "wall", "device", "host", *parts, "peak GiB", "x need"):
        drawn.add_column(name, justify="left" if name in ("case", "way") else "right")
    for result in results:
        for name, step in result.steps.items():
            if step.error:
                drawn.add_row(result.case.label, name, step.error)
                continue
            times = (step.wall_ms, step.gpu_ms, step.host_ms, *(step.parts_ms[part] for part in parts))
            memory = ("" if value is None else f"{value:.2f}" for value in (step.peak_gib, step.of_need))
            drawn.add_row(result.case.label, name, *(f"{ms:.2f}" for ms in times), *memory)
    return drawn


def prompts_table(results: Iterable[Result]) -> Any:
    """A ``rich`` table of what reading whole prompts takes."""
    from rich.table import Table

    drawn = Table(title="up to the first token of generate()")
    for name in ("case", "way", "seconds", "peak GiB", "x weights + KV"):
        drawn.add_column(name, justify="left" if name in ("case", "way") else "right")
    for result in results:
        for name, prompt in result.prompts.items():
            memory = ("" if value is None else f"{value:.2f}" for value in (prompt.peak_gib, prompt.of_need))
            drawn.add_row(result.case.label, name, prompt.error or f"{prompt.seconds:.2f}", *memory)
    return drawn


def _cells(result: Result) -> list[str]:
    case, measures, ours = result.case, result.measures, result.ours
    targets = "\n".join(_target(result, name) for name in case.target if result.status != "skipped")
    if result.status != "ok":
        return [case.label, result.status, "", "", "", f"{result.note}\n{targets}".strip()]
    dense = [f"{name} {_ms(times.p50)}" for name, times in result.dense.items()]
    if case.predecessor_ms is not None:
        dense.append(f"predecessor {_ms(case.predecessor_ms)}")
    host = [f"{name} {us['p50_us']:.0f} us" for name, us in result.host.items()]
    return [
        case.label,
        "\n".join(host) if ours is None else _ms(ours.p50) + ("" if ours.method == "graph" else f" ({ours.method})"),
        "" if ours is None else f"{_ms(ours.p20)}-{_ms(ours.p80)}",
        "\n".join(dense),
        f"{measures['dense_ratio']:.3f}" if "dense_ratio" in measures else "",
        targets,
        f"{result.bytes / 1e6:.1f}" if result.bytes else "",
        f"{result.share_of_copy:.2f}" if result.share_of_copy else "",
        f"{measures['extra_mib']:.1f}" if "extra_mib" in measures else "",
    ]


def _target(result: Result, name: str) -> str:
    """``yes: 0.837 <= 0.84x dense``."""
    sign, unit = ("<=", AT_MOST[name]) if name in AT_MOST else (">=", AT_LEAST[name])
    value, said = result.measures.get(name), {True: "yes: ", False: "NO: ", None: ""}[result.met(name)]
    return said + ("" if value is None else f"{value:.3g} ") + f"{sign} {result.case.target[name]:g}{unit}"


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def summary(results: Sequence[Result]) -> dict[str, int]:
    """How many cases and targets: passed, failed, met, missed."""
    statuses = [result.status for result in results]
    # what failed or is not covered misses its targets; what was skipped was not asked
    reached = [bool(one.met(name)) for one in results if one.status != "skipped" for name in one.case.target]
    counts = {name: statuses.count(name) for name in ("ok", "FAILED", "not covered", "skipped")}
    return {**counts, "targets met": sum(reached), "targets missed": len(reached) - sum(reached)}


def data(results: Sequence[Result], setup: Setup) -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "benchmark": "sah bench",
        **machine(setup.device),
        "kernel": setup.kernel,
        "copy_tb_s": round(setup.copy_rate / 1e12, 4),
        "summary": summary(results),
        "cases": [result.to_dict() for result in results],
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),  # figures of a busy machine say nothing
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "sah-transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
