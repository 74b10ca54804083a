"""The static cache over which ``generate()`` of a sparse model replays its steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sah_transformers.kernels.append import append_token, runs_kernels


class OneLaunchLayer(StaticLayer):
    """A ``StaticLayer`` to which a token is appended by a launch (of big batches two), not five, on a GPU and outside
    compiled code. A GPU does not notice that it is full: who counts on the host does."""

    _layer_type = None  # Transformers would register the class for new caches

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``key_states [B, G, n, D]`` and ``value_states [B, G, n, Dv]`` in place; the whole buffers."""
        if not self._appends(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _appends(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether the kernel could append these, and has."""
        if self.keys is None or self.values is None or not self._is_token(keys, values):
            return False
        return append_token(self.keys, self.values, keys, values, self.cumulative_length)

    def _is_token(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether the kernel takes these."""
        if keys.shape[2] != 1 or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        pairs: Any = ((self.keys, keys), (self.values, values))
        fits = all(_kind(held) == _kind(new) and held.is_contiguous() for held, new in pairs)
        return fits and keys.stride(3) == values.stride(3) == 1 and runs_kernels(keys)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a token's keys and a buffer have in common."""
    return (*tensor.shape[:2], tensor.shape[3], tensor.dtype, tensor.device)


def one_launch_cache(config: Any, length: int) -> StaticCache:
    """A static cache for ``length`` keys whose plain layers append a token by a launch or two.

    Args:
        config: of the model's decoder.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    for layer in cache.layers:
        if type(layer) is StaticLayer:
            layer.__class__ = OneLaunchLayer
    return cache
