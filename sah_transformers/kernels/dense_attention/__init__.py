"""Dense attention with the best kernel that is exact for the case: PyTorch's SDPA.

Softcap, learned sinks, position bias and index lists are beyond SDPA; those cases take the masked-attention
reference over all visible keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

ROWS = 1024
"""Rows per call where a causal mask has to be written out, so that memory stays linear."""


def dense_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over every visible key.

    Args:
        queries, keys, values: ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``.
        attention_mask: boolean (True = visible) or additive ``[B|1, 1|H, Q, K]``, or None.
        is_causal: lower-right causal order; only without a mask.
        scaling: factor on q·k.
        dropout: share of the weights to drop.

    Returns:
        ``[B, Q, H, Dv]`` in the queries' dtype; rows that see nothing are zeros.
    """
    rows, total = queries.shape[2], keys.shape[2]
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    if attention_mask is None and (not is_causal or rows == 1 or rows == total):
        causal = is_causal and rows > 1
        if rows == 1 and not _splits_keys(queries):
            return _packed(queries, keys, values, None, options)
        out = scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, enable_gqa=_grouped(queries, keys), **options
        )
        return out.transpose(1, 2)
    if attention_mask is not None:
        if rows == 1 and attention_mask.shape[1] == 1:
            return _packed(queries, keys, values, attention_mask, options)
        keys, values = _repeated(queries, keys), _repeated(queries, values)
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=attention_mask, **options)
        return out.transpose(1, 2)
    keys, values = _repeated(queries, keys), _repeated(queries, values)
    if queries.device.type == "cuda" and total > rows:
        bias = causal_lower_right(rows, total)
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, **options).transpose(1, 2)
    parts = []
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        reach = max(0, min(total, stop + total - rows))
        last = torch.arange(start, stop, device=queries.device) + (total - rows)
        mask = torch.arange(reach, device=queries.device) <= last[:, None]
        part = (queries[:, :, start:stop], keys[:, :, :reach], values[:, :, :reach])
        parts.append(scaled_dot_product_attention(*part, attn_mask=mask, **options))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _grouped(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    return queries.shape[1] != keys.shape[1]


def _splits_keys(queries: torch.Tensor) -> bool:
    """Whether SDPA reads the keys of one query by many programs, if it sees that there is one: nine times faster."""
    return queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16)


def _repeated(queries: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """SDPA's fast kernels take no mask together with grouped heads."""
    times = queries.shape[1] // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


def _packed(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, options: dict
) -> torch.Tensor:
    """One query per sequence: the heads of a group become rows of one head, so KV heads are read once."""
    batch, heads, _, dim = queries.shape
    groups = keys.shape[1]
    folded = queries.reshape(batch, groups, heads // groups, dim)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, **options)
    return out.reshape(batch, 1, heads, values.shape[-1])
