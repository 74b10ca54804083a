"""Exact selection of keys by estimate: the k best, or the fewest that hold a share of the mass.

Contract, for both: estimates ``[..., K]`` with any leading dimensions, candidates a bool tensor broadcastable to
them or None for all, ties broken towards the lower position, and each row decided on its own. ``margin``
flags the rows whose estimates cannot decide the cut within it; the caller decides those in float64.

``select_mask(call)`` is the whole of ``OracleTopK.add_mask`` on a GPU: bool ``[B, H, Q, K]``, what the call starts from
plus each row's best candidates, by score per query head. ``why_not(call)`` names what it does not cover: other
selections, a bias, index lists, a previous mask with weights, more than 16,384 keys, other dtypes than float16,
bfloat16, float32.

Each row takes exactly its budget (or all its candidates), lower position first among equal scores; -0 equals +0, NaN
and -inf rank last. A score is a float32 dot product times ``scaling`` in float32, where the definition rounds the
float64 score once: a row may differ from it only in keys whose scores are closer than the float32 rounding of their dot
product. Where that product is exact (zeros, whole numbers) and ``scaling`` a float32 number, the mask is the
definition's to the bit, with the ties that scaling makes by rounding. Equal keys tie as long as the matrix product sums
every column in the same order. What is beyond float32 before scaling is inf or NaN here.

Two runs give the same bits, nothing waits for the device, scores of at most 2**28 keys (1 GiB) are held at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sah_transformers.kernels.device import no_kernels, on_device
from sah_transformers.kernels.select.reference import select_top_k, select_top_p, top_p_thresholds
from sah_transformers.selections import Best

if TYPE_CHECKING:
    from sah_transformers.attention import Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_KEYS = 2**14
"""A row lies in the registers of one program."""

__all__ = ["select_mask", "select_top_k", "select_top_p", "top_p_thresholds", "why_not"]


def why_not(call: Call) -> str:
    """Why ``select_mask`` cannot take ``call``, or "" when it can."""
    queries, keys = call.queries, call.keys
    sight = call.visibility
    reason = no_kernels(queries)
    if reason:
        return reason
    selection = call.described[0] if len(call.described) == 1 else None
    if not isinstance(selection, Best) or selection.group or call.min_keys > 1:
        return "masks have a kernel for top-k by exact score per query head alone"
    if queries.dtype not in DTYPES or keys.dtype != queries.dtype:
        return f"the dtypes are {queries.dtype}, {keys.dtype}; one of float16, bfloat16, float32 is needed"
    if min(*queries.shape, *keys.shape) == 0:
        return "a dimension is empty"
    if keys.shape[2] > MOST_KEYS:
        return f"rows have {keys.shape[2]} keys, more than {MOST_KEYS}"
    if sight.position_bias is not None or sight.indices is not None:
        return "the call has a position bias or a list of keys per row"
    if sight.mask is not None and sight.mask.dtype != torch.bool:
        return "the attention mask is additive"
    if call.previous is not None and call.previous.dtype != torch.bool:
        return "the previous mask has weights"
    return ""


@torch.no_grad()
def select_mask(call: Call) -> torch.Tensor:
    """The mask of a call that ``why_not`` has nothing against, bool ``[B, H, Q, K]``."""
    from sah_transformers.kernels.select.kernel import top_k_mask

    selection = call.described[0]
    assert isinstance(selection, Best)
    with on_device(call.queries):
        return top_k_mask(call, selection.budget)
