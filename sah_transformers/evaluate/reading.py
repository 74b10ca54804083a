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
def decode(model: Any, ids: torch.Tensor, cache: Any, most: int = 1) -> torch.Tensor:
    """Put ``ids [1, n]`` on the cache: the first token alone, then at most ``most`` in a call.

    Every row selects what it selects token by token: codebooks are made in the first call, of the same keys, and all
    else hangs on the row and on single keys. (Codebooks for which the cache holds too few keys yet are made later.)

    Returns:
        Logits ``[n, vocabulary]`` of the token after each.
    """
    parts = [ids[:, :1], *ids[:, 1:].split(max(1, most), dim=1)]
    rows = [model(input_ids=part, past_key_values=cache, use_cache=True).logits[0] for part in parts if part.numel()]
    return torch.cat(rows)
