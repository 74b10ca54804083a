"""Calls that are alike, as those of a step's layers are: the first runs in full, the others repeat its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sah_transformers.kernels.device import on_a_gpu, on_device
from sah_transformers.kernels.tape import Tape, recording
from sah_transformers.maskers import MaskerStack
from sah_transformers.state import LayerState

MOST_TAPES = 64
"""Kept at once: a growing cache needs others at each step."""

_tapes: dict[tuple[Any, ...], Tape | None] = {}
"""By what tells calls apart; None: there was such a call, not recorded."""


def attend(
    run: Callable[[], torch.Tensor],
    stack: MaskerStack,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: LayerState | None,
    *numbers: Any,
    seldom: bool = False,
) -> torch.Tensor:
    """``run()``, ``[B, Q, H, Dv]``, by the launches of a call like this one where there was one.

    Args:
        seldom: there may be no second call like this one, so that the first is not recorded.
        run: makes the call, brings ``state`` up to date, and attends.
        queries, keys, values, mask, sinks: the call's tensors; numbers: all else that it depends on, beside ``stack``.
    """
    if torch.is_grad_enabled() or not on_a_gpu(queries):
        return run()
    if not stack.in_launches or (state is None and stack.stateful):
        return run()
    given = [tensor for tensor in (queries, keys, values, mask, sinks) if tensor is not None]
    if state is not None:
        storages = state.room(stack.stateful, keys, queries.shape[2]) if mask is None else None
        if storages is None:
            return run()
        given += storages
    key = (
        stack.in_launches, numbers, mask is None, sinks is None, queries.device,
        *[(tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16) for tensor in given],
    )  # fmt: skip
    tape = _tapes.get(key)
    if tape is None and seldom and key not in _tapes:
        keep(key, None)
        return run()
    if tape is None:
        with recording(given) as noted:
            out = run()
        tape = noted.tape(out)
        if tape is not None:
            keep(key, tape)
        return out
    if state is not None:  # before a launch may fail: what it has of these keys is then cropped with them
        state.follow(stack.stateful, keys.shape[2])
    with on_device(queries):
        return tape.play(given)


def keep(key: tuple[Any, ...], tape: Tape | None) -> None:
    """Into ``_tapes``, which is emptied before when it is full."""
    if len(_tapes) >= MOST_TAPES:
        _tapes.clear()
    _tapes[key] = tape
