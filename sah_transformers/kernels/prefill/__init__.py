"""Prefill: attention of many queries over what First, Last, Everything and one Best or Mass select.

Contract of ``prefill(call) -> out``: ``call`` as ``attention.make_call`` checked it, ``queries [B, H, Q, D]``, ``keys
[B, G, K, D]``, ``values [B, G, K, Dv]`` of one dtype (float16, bfloat16, float32), any strides; ``out [B, Q, H, Dv]``
in that dtype. D and Dv up to 256; causal or not, with a boolean mask ``[B|1, 1, Q, K]`` or padding ``[B, K]`` or
without; rows without keys give zeros. Each query head selects, or each KV head for its query heads, up to 32.
Budgets and ties are those of ``kernels.select``; scores are float32 sums of exact products. Memory beyond inputs
and output is at most about 1.3 GiB, nothing waits for the device, and two runs give the same bits.

``why_not(call)`` names what is not covered: additive masks and masks per head, position bias, index lists,
previous masks, dropout, gradients, two scored maskers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sah_transformers.kernels.device import no_kernels, on_device
from sah_transformers.kernels.prefill.stack import Stack, stack_of
from sah_transformers.selections import Best, Mass

if TYPE_CHECKING:
    from sah_transformers.attention import Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 256
MAX_HEADS = 4096
"""Beyond it the lists of a single query of each head could pass 2 GiB, which is what ``emit_kernel`` addresses."""

MAX_GROUP = 32
"""Query heads of a KV head that rank together: a tile of rows holds them all."""

LEAST_TOP_P = 0.001
"""Below it the mass above the cut is too small a share for float32 sums."""


__all__ = ["prefill", "why_not"]


def why_not(call: Call) -> str:
    """Why the kernels cannot take this call; empty where they can."""
    stack = stack_of(call.described)
    if isinstance(stack, str):
        return stack
    reason = no_kernels(call.queries) or _why_not_tensors(call) or _why_not_rows(call)
    return reason or _why_not_scored(call, stack.scored)


def _why_not_tensors(call: Call) -> str:
    queries, keys, values = call.queries, call.keys, call.values
    if queries.dtype not in DTYPES or keys.dtype != queries.dtype or values.dtype != queries.dtype:
        return f"dtypes {queries.dtype}, {keys.dtype}, {values.dtype} are not one of float16, bfloat16, float32"
    if not (1 <= queries.shape[-1] <= MAX_DIM and 1 <= values.shape[-1] <= MAX_DIM):
        return f"head dimensions {queries.shape[-1]}, {values.shape[-1]} are beyond {MAX_DIM}"
    if min(call.shape) == 0:
        return "there are no queries or no keys"
    if call.shape[0] * call.shape[1] > 65535:
        return "batch times heads is beyond 65,535"
    tensors = (queries, keys, values, call.sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "gradients are asked for"
    return ""


def _why_not_rows(call: Call) -> str:
    visibility = call.visibility
    mask = visibility.mask
    if visibility.indices is not None:
        return "rows have lists of keys"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return "the attention mask is additive or differs between heads"
    if visibility.position_bias is not None:
        return "a position bias is added"
    if call.previous is not None:
        return "the stack starts from a mask"
    if call.dropout:
        return "dropout is asked for"
    if call.sinks is not None and call.sinks.dim() != 1:
        return "learned sinks differ between rows"
    return ""


def _why_not_scored(call: Call, scored: Best | Mass | None) -> str:
    if scored is None:
        return ""
    share = call.queries.shape[1] // call.keys.shape[1]
    if scored.group and share > MAX_GROUP:
        return f"keys are ranked per KV head and {share} query heads are beyond {MAX_GROUP}"
    if isinstance(scored, Mass) and not LEAST_TOP_P <= scored.top_p < 1.0:
        return f"top_p is {scored.top_p!r}, outside [{LEAST_TOP_P}, 1)"
    if call.context.scaling <= 0:
        return "the scaling is not positive"
    if call.shape[0] * call.shape[1] > MAX_HEADS:
        return f"batch times heads is beyond {MAX_HEADS:,}"
    return ""


def prefill(call: Call, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of a call that ``why_not`` accepts.

    Args:
        call: the checked call.
        counts: int32 ``[B, H, Q]``, receives how many keys each row attended to (for tests and measurements).

    Returns:
        ``[B, Q, H, Dv]`` in the queries' dtype.
    """
    from sah_transformers.kernels.prefill.launch import launch

    stack = stack_of(call.described)
    assert isinstance(stack, Stack)
    with on_device(call.queries):
        return launch(call, stack, counts)
