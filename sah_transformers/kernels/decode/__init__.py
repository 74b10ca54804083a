"""Attention of few queries over long caches, realising a stack of maskers without a mask.

Contract: ``decode(call)`` equals ``attention.run(call)[0]`` for every call that ``why_not`` has nothing against, up to
the rounding of scores: exactly the budgeted number of keys per row, equal scores taken lower position first, the same
bits in every run. Shapes ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]`` -> ``[B, Q, H, Dv]``; D and Dv up to
256, Q up to 16, K up to 2**20, float16, bfloat16, float32; caches with any strides whose head dimension is contiguous.
Nothing waits for the device, so a call can be captured in a CUDA graph. Scratch is about ``4 * B * H * Q * K`` bytes
where keys are selected by score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sah_transformers.kernels.decode.stack import Stack, read_stack
from sah_transformers.kernels.device import no_kernels, on_device

if TYPE_CHECKING:
    from sah_transformers.attention import Call
    from sah_transformers.kernels.decode.kernel import Inputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_QUERIES = 16
MOST_KEYS = 2**20
MOST_SCRATCH = 2**30

__all__ = ["decode", "decode_checked", "unfit", "why_not"]


def why_not(call: Call) -> str:
    """Why these kernels cannot take ``call``, or "" when they can."""
    reason = unfit(call)
    if reason:
        return reason
    stack = stack_of(call)
    return stack if isinstance(stack, str) else ""


def stack_of(call: Call) -> Stack | str:
    """The call's stack in these kernels' words, or why there is none."""
    return call.described.read(read_stack, call.queries.shape[1] // call.keys.shape[1])


def unfit(call: Call) -> str:
    """Why no kernel for few queries can take ``call``, whatever its stack, or ""."""
    queries, keys, values = call.queries, call.keys, call.values
    sight = call.visibility
    reason = no_kernels(queries)
    if reason:
        return reason
    (batch, heads, rows, dim), (total, value_dim) = queries.shape, values.shape[2:]
    if rows > MOST_QUERIES:
        return f"the call has {rows} queries, more than {MOST_QUERIES}"
    if not (queries.numel() and keys.numel() and values.numel()):
        return "a dimension is empty"
    if total > MOST_KEYS:
        return f"the cache has {total} keys, more than {MOST_KEYS}"
    if 4 * batch * heads * rows * total > MOST_SCRATCH:
        return "scores of all rows would need more than 1 GiB"
    dtype = queries.dtype
    if dtype not in DTYPES or keys.dtype != dtype or values.dtype != dtype:
        return f"the dtypes are {dtype}, {keys.dtype}, {values.dtype}; one of float16, bfloat16, float32 is needed"
    if dim > 256 or value_dim > 256:
        return f"head dimensions are {dim} and {value_dim}, more than 256"
    if queries.stride(3) != 1 or keys.stride(3) != 1 or values.stride(3) != 1:
        return "the head dimension of a tensor is not contiguous"
    if call.dropout:
        return "dropout is on"
    if call.previous is not None:
        return "the call starts from a previous mask"
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad or values.requires_grad):
        return "gradients are needed"
    if sight.position_bias is not None or sight.indices is not None:
        return "the call has a position bias or a list of keys per row"
    if sight.mask is not None and (sight.mask.dtype != torch.bool or sight.mask.shape[1] != 1):
        return "the attention mask is additive or differs between heads"
    if sight.mask is not None and sight.valid is not None:
        return "the call has two masks"
    if call.sinks is not None and (call.sinks.dim() != 1 or call.sinks.requires_grad):
        return "learned sinks differ between sequences or rows, or need gradients"
    if call.min_keys > 1 and sight.is_prefix() and call.min_keys > total - rows + 1:
        return f"rows see fewer than min_keys = {call.min_keys} keys"
    return ""


def decode(call: Call) -> torch.Tensor:
    """Attention of every row over the keys that the stack selects, ``[B, Q, H, Dv]``.

    Raises:
        ValueError: with the reason, for a call that these kernels cannot take.
    """
    reason = why_not(call)
    if reason:
        raise ValueError(f"kernel 'triton' cannot take this call: {reason}")
    return decode_checked(call)


def decode_checked(call: Call) -> torch.Tensor:
    """``decode`` of a call that ``why_not`` has nothing against."""
    from sah_transformers.kernels.decode.kernel import decode_rows

    stack = stack_of(call)
    assert not isinstance(stack, str)
    with on_device(call.queries):
        return decode_rows(inputs_of(call, stack))


def inputs_of(call: Call, stack: Stack) -> Inputs:
    """The tensors and numbers of a call."""
    from sah_transformers.kernels.decode.kernel import Inputs

    sight = call.visibility
    mask = sight.mask[:, 0] if sight.mask is not None else None
    if sight.valid is not None:
        mask = sight.valid[:, None]
    return Inputs(
        q=call.queries,
        k=call.keys,
        v=call.values,
        mask=mask,
        sinks=None if call.sinks is None else call.sinks.contiguous(),
        causal=sight.is_causal,
        scaling=call.context.scaling,
        softcap=call.context.softcap,
        least=call.min_keys,
        stack=stack,
    )
