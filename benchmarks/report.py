"""What every benchmark prints: a table, then one line of JSON with versions, shapes and quantiles."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from rich.console import Console
from rich.table import Table

import sah_transformers


def quantiles(samples: Sequence[float], unit: str) -> dict[str, float]:
    """``{"p20_<unit>": ..., "p50_<unit>": ..., "p80_<unit>": ...}``."""
    return {f"p{q}_{unit}": round(float(numpy.percentile(samples, q)), 4) for q in (20, 50, 80)}


def publish(name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], data: dict[str, Any]) -> None:
    """Print the table and the line of JSON."""
    table = Table(title=name)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps({"benchmark": name, **machine(), **data}))


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),  # figures of a busy machine say nothing
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sah_transformers": sah_transformers.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
