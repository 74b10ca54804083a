"""What the evaluations print: means per stack as a table and as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sah_transformers.evaluate.needle import Answer, Outcome
from sah_transformers.evaluate.stacks import Stack
from sah_transformers.evaluate.text import Fidelity

ALL = "all"
"""Stands for every length in a row over all of them."""


def needle_rows(outcomes: Sequence[Outcome], stacks: Sequence[Stack], setups: Sequence[str]) -> list[dict[str, Any]]:
    """One row per stack, task, length (and over all lengths) and setup, over the prompts that dense answers.

    Each holds ``found`` of ``scored`` of ``asked`` prompts, the share of the number's tokens that were right, and the
    means of density and recalls; None where nothing was scored.
    """
    rows = []
    for stack in stacks:
        for task in _unique(one.prompt.task for one in outcomes):
            lengths = _unique(one.prompt.length for one in outcomes if one.prompt.task == task)
            for length in [*lengths, *([ALL] if len(lengths) > 1 else [])]:
                part = [one for one in outcomes if one.prompt.task == task and length in (ALL, one.prompt.length)]
                for setup in setups:
                    rows.append(_needle_row(part, stack, setup) | {"task": task, "length": length})
    return rows


def _needle_row(outcomes: Sequence[Outcome], stack: Stack, setup: str) -> dict[str, Any]:
    answers: list[Answer] = [
        answer for one in outcomes for answer in one.answers if answer.stack == stack and answer.setup == setup
    ]
    return {
        "stack": stack.name,
        "budget": stack.budget,
        "setup": setup,
        "asked": len(outcomes),
        "scored": len(answers),
        "found": sum(answer.found for answer in answers),
        "share": _mean(float(answer.found) for answer in answers),
        "tokens_right": _mean(answer.right / answer.tokens for answer in answers),
        "density": _mean(answer.density for answer in answers),
        "recall": _mean(answer.recall for answer in answers),
        "needle_recall": _mean(answer.needle_recall for answer in answers),
    }


def text_rows(found: Sequence[Sequence[Fidelity]], stacks: Sequence[Stack]) -> list[dict[str, Any]]:
    """One row per stack: means over the segments, which are of one length."""
    rows = []
    for stack in stacks:
        own = [one for segment in found for one in segment if one.stack == stack]
        rows.append(
            {
                "stack": stack.name,
                "budget": stack.budget,
                "segments": len(own),
                "tokens": sum(one.tokens for one in own),
                "kl": _mean(one.kl for one in own),
                "agreement": _mean(one.agreement for one in own),
                "density": _mean(one.density for one in own),
                "recall": _mean(one.recall for one in own),
            }
        )
    return rows


def needle_table(rows: Sequence[dict[str, Any]]) -> Any:
    """A ``rich`` table of ``needle_rows``, the setups beside each other."""
    setups = _unique(row["setup"] for row in rows)
    each = [f"{name}: {what}" for name in setups for what in ("found", "recall", "on the needle")]
    drawn = _table("numbers found, of the prompts that dense attention answers", ["task", "tokens", *each])
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["stack"], row["budget"], row["task"], row["length"]), []).append(row)
    before = None
    for (stack, budget, task, length), group in grouped.items():
        cells = [cell for row in group for cell in (_found(row), _number(row["recall"]), _number(row["needle_recall"]))]
        if before not in (None, (stack, budget)):
            drawn.add_section()
        name = "" if before == (stack, budget) else stack
        drawn.add_row(name, "" if not name else _budget(budget), task, str(length), *cells)
        before = stack, budget
    return drawn


def text_table(rows: Sequence[dict[str, Any]]) -> Any:
    """A ``rich`` table of ``text_rows``."""
    drawn = _table(
        "next-token distributions beside dense attention's", ["tokens", "KL, nats", "agreement", "density", "recall"]
    )
    for row in rows:
        cells = [_number(row[name]) for name in ("kl", "agreement", "density", "recall")]
        drawn.add_row(row["stack"], _budget(row["budget"]), str(row["tokens"]), *cells)
    return drawn


def needle_details(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Every prompt and answer as plain data."""
    return [
        {
            "task": one.prompt.task,
            "length": one.prompt.length,
            "tokens": one.prompt.ids.shape[1],
            "depth": one.prompt.depth,
            "seed": one.prompt.seed,
            "number": one.prompt.number,
            "dense": one.dense,
            "answers": [_plain(answer) | {"found": answer.found} for answer in one.answers],
        }
        for one in outcomes
    ]


def text_details(found: Iterable[Sequence[Fidelity]]) -> list[dict[str, Any]]:
    """Every segment's figures as plain data."""
    return [_plain(one) for segment in found for one in segment]


def _plain(one: Answer | Fidelity) -> dict[str, Any]:
    return {**asdict(one), "stack": one.stack.name, "budget": one.stack.budget}


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    drawn = Table(title=title)
    drawn.add_column("stack")
    for name in ("budget", *columns):
        drawn.add_column(name, justify="left" if name == "task" else "right")
    return drawn


def _found(row: dict[str, Any]) -> str:
    share = "" if row["share"] is None else f", {row['share']:.0%}"
    return f"{row['found']} of {row['scored']}{share}"


def _budget(budget: float | None) -> str:
    return "" if budget is None else f"{budget:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
