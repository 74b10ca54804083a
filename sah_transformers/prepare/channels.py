"""Double Sparsity's offline calibration: each head's channels by how much they add to its scores (arXiv 2408.07092)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sah_transformers.integration.listen import listening

SELECTIONS = ("qk_proj", "q_proj", "k_proj")

Tell = Callable[[int, int], None]
"""Told how much is done, of how much."""


def calibrate_double_sparsity(
    model: Any, blocks: torch.Tensor, selection: str = "qk_proj", tell: Tell | None = None
) -> dict[int, torch.Tensor]:
    """The channels of every layer and query head from the most to the least important.

    Args:
        model: a Transformers model; it is left as it was.
        blocks: token ids ``[N, block]``, each read on its own.
        selection: ``"qk_proj"`` orders by the mean over tokens of |q_d k_d|, query and key of the same token;
            ``"q_proj"`` by |q_d|, ``"k_proj"`` by |k_d|.
        tell: called after each block.

    Returns:
        ``{layer: int64 [H, D]}``; among equals the lower channel comes first.

    Raises:
        ValueError: for an unknown selection, a model that cannot be sparse, queries or keys that are not finite.

    Queries and keys are taken after the rotary embedding, keys repeated to the query heads. The authors' script takes
    them before it for ``q_proj`` and ``k_proj``, keeps only the last block of ``qk_proj`` and mixes heads with tokens
    when it reshapes; here every block counts and every head has its own mean, as their paper has it.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    sums: dict[int, torch.Tensor] = {}

    def hear(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if queries.shape[2:] != keys.shape[2:]:
            raise ValueError(f"layer {layer} has queries {list(queries.shape)} but keys {list(keys.shape)}")
        total = importance(queries, keys, selection)
        if layer in sums and sums[layer].shape != total.shape:
            raise ValueError(f"layer {layer} stands for attention of two shapes")
        sums[layer] = total + sums[layer] if layer in sums else total

    with listening(model, hear) as read:
        for number, ids in enumerate(blocks):
            read(ids[None])
            if tell:
                tell(number + 1, len(blocks))
    for layer, total in sums.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"layer {layer}: queries or keys are not finite; try another dtype")
    return {layer: total.sort(dim=-1, descending=True, stable=True).indices for layer, total in sorted(sums.items())}


def importance(queries: torch.Tensor, keys: torch.Tensor, selection: str) -> torch.Tensor:
    """Sums over sequences and tokens, float64 ``[H, D]`` on the CPU."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if selection == "qk_proj":
        values = queries.to(dtype) * keys.to(dtype)
    else:
        values = (queries if selection == "q_proj" else keys).to(dtype)
    return values.abs().sum((0, 2)).cpu().double()
