"""Kernels with other launch parameters than those that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sah_transformers.kernels.decode.kernel import PLANS


@contextmanager
def tuned(module: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Calls whose plans ``module`` makes take these fields of its ``Tuning``."""
    original = module.tuning_of
    PLANS.clear()
    module.tuning_of = lambda *sizes: replace(original(*sizes), **changes)
    try:
        yield
    finally:
        module.tuning_of = original
        PLANS.clear()


def apart(out: torch.Tensor, expected: torch.Tensor | None) -> float:
    """How far an output is from the ``expected`` one, over its size."""
    return 0.0 if expected is None else ((out - expected).norm() / expected.norm()).item()
