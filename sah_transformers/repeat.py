"""Calls that the layers of a step make alike: the first runs in full, the others repeat its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sah_transformers.attention import Call, run
from sah_transformers.kernels.device import on_a_gpu, on_device
from sah_transformers.kernels.tape import Tape, recording
from sah_transformers.maskers import MaskerStack
from sah_transformers.state import LayerState

MOST_TAPES = 64
"""Kept at once: a growing cache needs others at each step."""

_tapes: dict[tuple[Any, ...], Tape] = {}


def attend(
    make: Callable[[], Call],
    stack: MaskerStack,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: LayerState | None,
    *numbers: Any,
) -> torch.Tensor:
    """``run(make())[0]``, ``[B, Q, H, Dv]``, by the launches of a call like this one where there was one.

    Args:
        make: makes the call, and brings ``state`` up to date.
        queries, keys, values, mask, sinks: the call's tensors; numbers: all else that it depends on, beside ``stack``.
    """
    known = stack.in_launches and (state is not None or not stack.stateful)
    if not known or torch.is_grad_enabled() or not on_a_gpu(queries):
        return run(make())[0]
    given = [tensor for tensor in (queries, keys, values, mask, sinks) if tensor is not None]
    if state is not None:
        storages = state.room(stack.stateful, keys, queries.shape[2]) if mask is None else None
        if storages is None:
            return run(make())[0]
        given += storages
    key = (
        stack.in_launches, numbers, mask is None, sinks is None, queries.device,
        *[(tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16) for tensor in given],
    )  # fmt: skip
    tape = _tapes.get(key)
    if tape is None:
        with recording(given) as noted:
            out = run(make())[0]
        tape = noted.tape(out)
        if tape is not None:
            if len(_tapes) >= MOST_TAPES:
                _tapes.clear()
            _tapes[key] = tape
        return out
    if state is not None:  # before a launch may fail: what it has of these keys is then cropped with them
        state.follow(stack.stateful, keys.shape[2])
    with on_device(queries):
        return tape.play(given)
