"""Which kernel realises a call: the Triton ones where they cover it, else the reference."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sah_transformers.kernels.decode import MOST_QUERIES

if TYPE_CHECKING:
    from sah_transformers.attention import Call

logger = logging.getLogger(__name__)

_said: set[str] = set()


def fast_attention(call: Call) -> torch.Tensor | None:
    """Attention of all rows by a Triton kernel, ``[B, Q, H, Dv]``, or None where the reference has to do it.

    Args:
        call: the checked call. Its ``kernel``: ``"auto"`` falls back to the reference and says why once in the log (on
            a GPU; elsewhere there is nothing to say); ``"triton"`` raises; ``"reference"`` gives None.

    Raises:
        ValueError: for ``kernel="triton"``, with the reason why no kernel takes the call.
    """
    kernel = call.kernel
    if kernel == "reference" or (kernel == "auto" and not call.queries.is_cuda):
        return None
    if call.queries.shape[2] <= MOST_QUERIES:
        from sah_transformers.kernels import decode as kind

        attend = kind.decode
    else:
        from sah_transformers.kernels import prefill as kind  # type: ignore[no-redef]

        attend = kind.prefill  # type: ignore[attr-defined]
    reason = kind.why_not(call)
    if not reason:
        if kernel == "triton":
            return attend(call)
        try:
            return attend(call)
        except Exception as error:
            if not _cannot_compile(error):
                raise
            reason = f"a kernel does not compile here: {type(error).__name__}: {str(error).splitlines()[0]}"
    if kernel == "triton":
        raise ValueError(f"kernel 'triton' cannot take this call: {reason}")
    if reason not in _said:
        _said.add(reason)
        logger.warning("kernel 'auto' takes the reference: %s", reason)
    return None


def _cannot_compile(error: Exception) -> bool:
    """Whether Triton refused to build a kernel (too little shared memory, an old GPU), as opposed to a wrong call."""
    return type(error).__module__.startswith("triton") or "PassManager" in str(error)
