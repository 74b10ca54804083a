"""The static cache over which ``generate()`` of a sparse model replays its steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sah_transformers.kernels.append import append_token, runs_kernels


class OneLaunchLayer(StaticLayer):
    """A ``StaticLayer`` to which a token is appended by a launch (of big batches two), not five, on a GPU and outside
    compiled code. That it is full only `CapturedSteps` notices, which counts on the host."""

    _layer_type = None  # Transformers would register the class for new caches

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``key_states [B, G, n, D]`` and ``value_states [B, G, n, Dv]`` in place; the whole buffers."""
        keys, values = self.keys, self.values
        if keys is None or values is None or not self._is_token(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not append_token(keys, values, key_states, value_states, self.cumulative_length):
            return super().update(key_states, value_states, *args, **kwargs)
        return keys, values

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
