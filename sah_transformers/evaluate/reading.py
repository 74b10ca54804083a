"""Putting tokens through a model, onto a cache that is read once and copied for each stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sah_transformers.config import SparseAttentionConfig

Tell = Callable[[str], None]
"""Receives what has just been done, for a progress bar."""


def silent(_: str) -> None:
    """Tells nobody."""


@contextmanager
def sparse(model: Any, config: SparseAttentionConfig) -> Iterator[None]:
    """Make a dense model sparse for a while."""
    from sah_transformers.integration import disable, enable

    enable(model, config)
    try:
        yield
    finally:
        disable(model)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any = None) -> Any:
    """Put ``ids [1, n]`` on the cache in one call, without the language model's head.

    Returns:
        The cache; a new one if none was given.

    Raises:
        ValueError: for a model that keeps no cache of its keys.
    """
    # a keyword of None would be refused by models that name their cache otherwise
    kept = {} if cache is None else {"past_key_values": cache}
    out = model.base_model(input_ids=ids, use_cache=True, **kept)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} keeps no cache of its keys, its decoding cannot be evaluated")
    return cache


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Put ``ids [1, n]`` on the cache token by token.

    Returns:
        Logits ``[n, vocabulary]`` of the token after each.
    """
    rows = []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)
