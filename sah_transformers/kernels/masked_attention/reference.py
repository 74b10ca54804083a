"""The definition of masked attention, in PyTorch."""

from __future__ import annotations

import torch

from sah_transformers.mask import Mask

HIDDEN = float("-inf")


def masked_attention(
    scores: torch.Tensor,
    values: torch.Tensor,
    mask: Mask,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the active keys times the values.

    Args:
        scores: full scores ``[B, H, q, K]``, float32 or float64; what is not active is never read.
        values: ``[B, G, K, Dv]``.
        mask: ``[B, H, q, K]``, weights of the keys.
        visible: bool broadcastable to the mask; what it hides is not active whatever the mask says.
        sinks: learned sink logits, broadcastable to ``[B, H, q, 1]``, or None.
        dropout: share of the normalised weights to drop (the caller says 0 outside training).

    Returns:
        (out, weights): ``[B, q, H, Dv]`` in the scores' dtype and the normalised weights ``[B, H, q, K]``.
    """
    active = mask.form.compact()
    if visible is not None:
        active = active & visible
    if not mask.form.unit:
        weight = mask.get_dense_mask().to(scores.dtype)
        scores = scores - torch.where(active, weight, 1.0).log()
    weights = softmax_of(torch.where(active, scores, HIDDEN), sinks)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout, training=True)
    batch, heads, rows, size = weights.shape
    groups = values.shape[1]
    folded = weights.reshape(batch, groups, heads // groups * rows, size)
    out = (folded @ values.to(weights.dtype)).view(batch, heads, rows, values.shape[-1])
    return out.transpose(1, 2), weights


def softmax_of(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Normalised weights ``[B, H, q, K]`` of scores that are -inf where not active; zeros where all of a row is."""
    if sinks is None and scores.shape[-1]:
        empty = scores.detach().amax(-1, keepdim=True) == HIDDEN
        return scores.masked_fill(empty, 0.0).softmax(-1) * ~empty if bool(empty.any()) else scores.softmax(-1)
    if scores.shape[-1]:
        peak = scores.detach().amax(-1, keepdim=True)
    else:
        peak = scores.new_full((*scores.shape[:-1], 1), HIDDEN)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)
        peak = torch.maximum(peak, sinks.detach())
    peak = peak.masked_fill(peak == HIDDEN, 0.0)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - peak).exp()
    return weights / total.masked_fill(total == 0, 1.0)
