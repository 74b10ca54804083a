"""Side data on the cache: a cache layer learns to carry a ``LayerState`` through everything done to its keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sah_transformers.state import LayerState


def _follow(method: str, base: type, then: Any) -> Any:
    original = getattr(base, method)

    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return result

    followed.__name__ = method
    followed.__doc__ = original.__doc__
    return followed


def _crop(layer: Any, *_: Any, **__: Any) -> None:
    layer.sah_state.crop(int(layer.get_seq_length()))


def _reorder(layer: Any, beam_idx: torch.Tensor) -> None:
    layer.sah_state.reorder(beam_idx)


def _repeat(layer: Any, repeats: int) -> None:
    layer.sah_state.repeat(repeats)


def _select(layer: Any, indices: torch.Tensor) -> None:
    layer.sah_state.reorder(indices)


def _reset(layer: Any) -> None:
    layer.sah_state.reset()


def _offload(layer: Any) -> None:
    layer.sah_state.to("cpu")


def _prefetch(layer: Any) -> None:
    layer.sah_state.to(layer.keys.device)


FOLLOWED = {
    "crop": _crop,
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
    "reset": _reset,
    "offload": _offload,
    "prefetch": _prefetch,
}


@cache
def carrying(base: Any) -> Any:
    """The subclass of a cache layer's class that takes its ``sah_state`` along."""
    body: dict[str, Any] = {name: _follow(name, base, then) for name, then in FOLLOWED.items() if hasattr(base, name)}
    body["_layer_type"] = None  # Transformers would register the class for new caches
    body["__doc__"] = base.__doc__
    body["__reduce_ex__"] = lambda self, protocol: (_restore, (base,), self.__dict__)
    return type(f"Sah{base.__name__}", (base,), body)


def _restore(base: Any) -> Any:
    kind = carrying(base)
    return kind.__new__(kind)


def state_of(layer: Any) -> LayerState:
    """The side data that a cache layer carries, made on first use."""
    if "sah_state" not in layer.__dict__:
        layer.sah_state = LayerState()
        layer.__class__ = carrying(layer.__class__)
    return layer.sah_state


def cache_layer(cache: Any, layer_idx: int | None, keys: torch.Tensor) -> Any | None:
    """The layer of ``cache`` that the keys of this call live in, or None.

    Modules that serve several cache layers do not know which; their layer is the one that holds the keys' storage.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if not layers or layer_idx is None or layer_idx >= len(layers):
        return None
    layer = layers[layer_idx]
    held = getattr(layer, "keys", None)
    if not isinstance(held, torch.Tensor):
        return None
    if held.shape != keys.shape or held.data_ptr() == keys.data_ptr():
        return layer  # other shapes: models that cache something smaller than the keys (MLA)
    for other in layers:
        candidate = getattr(other, "keys", None)
        if isinstance(candidate, torch.Tensor) and candidate.data_ptr() == keys.data_ptr():
            return other
    return layer if held.dtype != keys.dtype else None


def is_static(layer: Any) -> bool:
    """Whether a cache layer is a preallocated buffer with a tail that is not filled yet."""
    return getattr(layer, "max_cache_len", None) is not None and not getattr(layer, "is_sliding", False)


def undo(cache: Any, keys: int, new: int) -> None:
    """After a failure inside a forward call: take the call's keys back out of the layers that have them already.

    Rolling layers cannot give keys back and keep them.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in getattr(cache, "layers", []) if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    static = [layer for layer in layers if is_static(layer)]
    furthest = max((int(layer.cumulative_length) for layer in static), default=0)
    for layer in static:
        if int(layer.cumulative_length) == furthest:
            layer.cumulative_length.sub_(new)
    for layer in layers:
        rolls = getattr(layer, "is_sliding", False)
        if not is_static(layer) and not rolls and hasattr(layer, "crop") and layer.get_seq_length() == keys:
            layer.crop(-new)
