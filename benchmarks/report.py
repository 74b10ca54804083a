"""What every benchmark prints: a table, then one line of JSON with versions, shapes and quantiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy
from rich.console import Console
from rich.table import Table

from sah_transformers.bench.report import machine


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
    print(json.dumps({"benchmark": name, **machine("cpu"), **data}))
