"""Which kernel realises a call: the Triton ones where they are asked for, else the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sah_transformers.kernels import decode, prefill

if TYPE_CHECKING:
    from sah_transformers.attention import Call


def fast_attention(call: Call) -> torch.Tensor | None:
    """Attention of all rows by a Triton kernel, ``[B, Q, H, Dv]``, or None where the reference has to do it.

    ``"auto"`` takes the reference: in their present form the kernels have passed the interpreter's tests and the
    benchmarks' checks on a GPU, but not yet the whole GPU test run that a default needs.

    Raises:
        ValueError: for ``kernel="triton"``, with the reason why no kernel takes the call.
    """
    if call.kernel != "triton":
        return None
    few = call.queries.shape[2] <= decode.MOST_QUERIES
    reason = decode.why_not(call) if few else prefill.why_not(call)
    if reason:
        raise ValueError(f"kernel 'triton' cannot take this call: {reason}")
    return decode.decode(call) if few else prefill.prefill(call)
