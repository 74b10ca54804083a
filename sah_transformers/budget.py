"""Budgets: an ``int`` is a number of keys, a ``float`` in (0, 1] a share of the row's visible keys."""

from __future__ import annotations

import math

import torch

Budget = int | float

RULE = "an int >= 1 (a number of keys) or a float in (0, 1] (a share of the row's visible keys)"


def check_number(name: str, value: object, rule: str) -> None:
    """Refuse what only looks like a number (bool, str, nan), with a hint for YAML's ``1e-3``.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} must be {rule}, got {value!r}{_yaml_hint(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _yaml_hint(text: str) -> str:
    """YAML reads ``1e-3`` as a string: how to write it."""
    mantissa, _, exponent = text.lower().partition("e")
    try:
        if not 0.0 < float(text) <= 1.0 or not exponent:
            return ""
    except ValueError:
        return ""
    whole = mantissa if "." in mantissa else f"{mantissa}.0"
    return f" (a string; write {whole}e{int(exponent):+d})"


def check_budget(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a budget; the message names the field, the rule and the value."""
    check_number(name, value, RULE)
    valid = value >= 1 if isinstance(value, int) else 0.0 < value <= 1.0  # type: ignore[operator]
    if not valid:
        raise ValueError(f"{name} must be {RULE}, got {value!r}")


def resolve_budget(budget: Budget, n: torch.Tensor) -> torch.Tensor:
    """Keys that ``budget`` grants to rows with ``n`` visible keys.

    Args:
        budget: a checked budget.
        n: int64 tensor of any shape, visible keys per row.

    Returns:
        int64 tensor of ``n``'s shape: ``budget`` itself, or ``max(1, int(budget * n))``.
    """
    if isinstance(budget, int):
        return torch.full_like(n, budget)
    return (n.double() * budget).long().clamp_(min=1)


def most(budget: Budget, n: int) -> int:
    """The largest number of keys that ``budget`` grants to any row with at most ``n`` visible keys."""
    return min(n, budget if isinstance(budget, int) else max(1, int(n * budget)))
