"""Side data on the cache: a cache layer learns to carry a ``LayerState`` through everything done to its keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sah_transformers.state import LayerState
from sah_transformers.static_state import StaticState


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
        layer.sah_state = StaticState(layer.max_cache_len) if is_static(layer) else LayerState()
        layer.__class__ = carrying(layer.__class__)
    return layer.sah_state


def handed_out(layer: Any, plan: int) -> StaticState | None:
    """The side data that a cache layer has ready for compiled code of a plan, or None."""
    state = getattr(layer, "sah_state", None)
    return state if isinstance(state, StaticState) and state.keeper == plan else None


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
    if held is keys or held.shape != keys.shape or held.data_ptr() == keys.data_ptr():
        return layer  # other shapes: models that cache something smaller than the keys (MLA)
    for other in layers:
        candidate = getattr(other, "keys", None)
        if isinstance(candidate, torch.Tensor) and candidate.data_ptr() == keys.data_ptr():
            return other
    return layer if held.dtype != keys.dtype else None


def is_static(layer: Any) -> bool:
    """Whether a cache layer is a preallocated buffer with a tail that is not filled yet."""
    return getattr(layer, "max_cache_len", None) is not None and not getattr(layer, "is_sliding", False)


def remember(cache: Any, layer_idx: Any, new: int) -> None:
    """Before a layer's update by ``new`` keys: hold on to what a rolling layer is about to drop."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not layers or not isinstance(layer_idx, int) or layer_idx >= len(layers) or torch.compiler.is_compiling():
        return
    layer = layers[layer_idx]
    if not getattr(layer, "is_sliding", False) or not layer.is_initialized:
        return
    if getattr(layer, "max_cache_len", None) is None:  # makes new tensors: the old ones need no copy
        layer.sah_before = (layer.keys, layer.values, layer.cumulative_length)
    elif layer.get_seq_length() + new > layer.max_cache_len:  # rolls in place
        lost = new if new == 1 else layer.max_cache_len
        parts = (layer.keys[:, :, :lost].clone(), layer.values[:, :, :lost].clone())
        layer.sah_before = (*parts, layer.cumulative_length_int)


def _roll_back(layer: Any) -> None:
    """Give a rolling layer back what ``remember`` kept."""
    keys, values, length = layer.sah_before
    if getattr(layer, "max_cache_len", None) is None:
        layer.keys, layer.values, layer.cumulative_length = keys, values, length
        return
    kept = layer.max_cache_len - keys.shape[2]
    layer.keys.copy_(torch.cat([keys, layer.keys[:, :, :kept]], dim=2))
    layer.values.copy_(torch.cat([values, layer.values[:, :, :kept]], dim=2))
    layer.cumulative_length_int = length


def undo(cache: Any, layer_idx: int, new: int) -> None:
    """After a failure in layer ``layer_idx``: take the call's ``new`` keys back out of the layers that have them."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not layers or layer_idx >= len(layers):
        return
    layers = [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    lengths = [int(layer.get_seq_length()) for layer in layers]
    furthest = max(lengths, default=0)
    for layer in (layer for layer, length in zip(layers, lengths, strict=True) if length == furthest):
        rolls, static = getattr(layer, "is_sliding", False), getattr(layer, "max_cache_len", None) is not None
        if rolls and furthest == new and static:
            layer.reset()
        elif rolls and furthest == new:  # not `reset`: before Transformers 5.18 it kept the length
            layer.keys = layer.values = None
            layer.is_initialized, layer.cumulative_length = False, 0
        elif rolls and getattr(layer, "sah_before", (None, None, -1))[2] == furthest - new:
            _roll_back(layer)
        elif static:
            layer.cumulative_length.sub_(new)
            if rolls:
                layer.cumulative_length_int -= new
        elif hasattr(layer, "crop"):
            layer.crop(-new)
