"""Which kernel realises a call: a Triton one where it covers the call, else the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sah_transformers.kernels import approximate, decode, prefill, select
from sah_transformers.kernels.faults import cannot_be_built

if TYPE_CHECKING:
    from sah_transformers.attention import Call

logger = logging.getLogger(__name__)

_said: set[str] = set()
_unbuildable: dict[tuple[Any, ...], str] = {}


def fast_attention(call: Call) -> torch.Tensor | None:
    """Attention of all rows by a Triton kernel, ``[B, Q, H, Dv]``, or None where the reference has to do it.

    With ``"auto"`` a call on a CUDA device that no kernel takes, or whose kernel cannot be built there (an old GPU, too
    little shared memory, no compiler), goes to the reference; the log names each reason once.

    Raises:
        ValueError: for ``kernel="triton"``, with the reason why no kernel takes the call.
    """
    if call.queries.shape[2] <= decode.MOST_QUERIES:
        if approximate.by_side_data(call):
            return _attempt(call, "approximate", approximate.why_not, approximate.attend)
        return _attempt(call, "decode", decode.why_not, decode.decode_checked)
    return _attempt(call, "prefill", prefill.why_not, prefill.prefill)


def fast_selection(call: Call) -> torch.Tensor | None:
    """The mask of a call by a Triton kernel, bool ``[B, H, Q, K]``, or None; otherwise as ``fast_attention``."""
    return _attempt(call, "select", select.why_not, select.select_mask)


def _attempt(
    call: Call,
    kernel: str,
    why_not: Callable[[Call], str],
    run: Callable[[Call], torch.Tensor],
) -> torch.Tensor | None:
    asked = call.kernel == "triton"
    if not asked and not (call.kernel == "auto" and call.queries.is_cuda):
        return None
    reason = why_not(call)
    if asked and reason:
        raise ValueError(f"kernel 'triton' cannot take this call: {reason}")
    if not asked and not reason and _unbuildable:
        reason = _unbuildable.get(_kind(call, kernel), "")
    if not reason:
        try:
            return run(call)
        except Exception as error:
            if asked or not cannot_be_built(error):
                raise
            reason = f"the kernel cannot be built here: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            _unbuildable[_kind(call, kernel)] = reason
    if reason not in _said:
        _said.add(reason)
        logger.warning("kernel 'auto' takes the reference: %s", reason)
    return None


def _kind(call: Call, kernel: str) -> tuple[Any, ...]:
    """Calls of one kind need the same kernels."""
    _, heads, _, dim = call.queries.shape
    groups, keys = call.keys.shape[1:3]
    width = keys.bit_length() if kernel == "select" else 0  # a row lies in one program
    return (
        kernel, call.described, call.queries.dtype, call.queries.device, heads, groups, dim, call.values.shape[3], width
    )  # fmt: skip
