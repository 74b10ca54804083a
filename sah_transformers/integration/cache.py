"""A Transformers cache that appends new keys in place instead of copying all keys at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sah_transformers.kernels.append import append_token
from sah_transformers.kernels.device import no_kernels, on_a_gpu

SPARE = 8
"""A buffer holds room for an eighth more keys than it was made for."""

LEAST_SPARE = 16


class Room:
    """A buffer ``[B, G, capacity, D]`` whose first rows are a layer's keys (or values).

    Attributes:
        buffer: the tensor; rows behind ``written`` are uninitialised.
        written: rows that were ever written, hence may be seen through a view.
        view: the last view given out.
        lock: held while rows are taken and written; copies of a layer may append in threads of their own.
    """

    def __init__(self, buffer: torch.Tensor, written: int):
        self.buffer, self.written = buffer, written
        self.target = buffer.data  # rows that no view shows are no change to tensors that autograd has saved
        self.kind = (buffer.shape[0], buffer.shape[1], buffer.shape[3], buffer.dtype, buffer.device)
        self.token = torch.Size((*buffer.shape[:2], 1, buffer.shape[3]))
        self.dense = buffer.is_contiguous()
        self.view: torch.Tensor | None = None
        self.lock = Lock()

    def __getstate__(self) -> tuple[torch.Tensor, int]:
        return self.buffer, self.written

    def __setstate__(self, state: tuple[torch.Tensor, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @classmethod
    def of(cls, held: torch.Tensor, new: int, most: int | None) -> Room:
        """Room for ``held [B, G, K, D]``, ``new`` further rows and some to spare; ``most`` rows if more cannot come."""
        length = held.shape[2]
        total = length + new
        capacity = total + max(total // SPARE, LEAST_SPARE)
        if most is not None and total <= most:
            capacity = min(capacity, most)
        buffer = held.new_empty((*held.shape[:2], capacity, held.shape[3]))
        buffer[:, :, :length] = held
        return cls(buffer, length)

    def holds(self, held: torch.Tensor) -> bool:
        """Whether ``held`` is a view of the first rows."""
        if held is self.view:
            return True
        same = held.data_ptr() == self.buffer.data_ptr() and held.stride() == self.buffer.stride()
        return same and kind_of(held) == self.kind

    def takes_token(self, new: torch.Tensor) -> bool:
        """Whether a launch can write ``new [B, G, 1, D]``."""
        fits = new.shape == self.token and new.dtype == self.buffer.dtype and new.device == self.buffer.device
        return fits and self.dense

    def takes(self, length: int, new: int) -> bool:
        """Whether ``new`` rows can be written behind the first ``length`` without anybody noticing.

        Rows that were written before (and cropped) are free again once only the cache itself views the buffer.
        """
        if length + new > self.buffer.shape[2]:
            return False
        if self.buffer.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if length >= self.written:
            return True
        self.view = None
        return viewers(self.buffer) == 3  # the buffer, the target, what the layer holds

    def append(self, length: int, new: torch.Tensor) -> torch.Tensor:
        """Write ``new`` behind the first ``length`` rows; the view of all of them."""
        added = new.shape[2]
        self.target.narrow(2, length, added).copy_(new)
        return self.first(length + added)

    def first(self, length: int) -> torch.Tensor:
        """The view of the first ``length`` rows, now that they are written."""
        self.written = max(self.written, length)
        view = self.buffer.narrow(2, 0, length)
        self.view = view
        return view


def kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What rows must have in common to lie in one buffer ``[B, G, K, D]``."""
    batch, groups, _, dim = tensor.shape
    return batch, groups, dim, tensor.dtype, tensor.device


def viewers(tensor: torch.Tensor) -> int:
    """Tensors that share ``tensor``'s storage, itself included; many where PyTorch does not tell."""
    return 1 + _uses(tensor) - _ALONE if _ALONE else 2**30


def _uses(tensor: torch.Tensor) -> int:
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else count(tensor.untyped_storage()._cdata)


_ALONE = _uses(torch.empty(1))


def transformed() -> bool:
    """Whether tensors may carry what writing into a buffer would lose: vmap's, jvp's and the like."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def takes_launches(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether launches may write a layer's new ``key`` and ``value``."""
    plain = type(key) is type(value) is torch.Tensor and not torch.is_grad_enabled()
    return plain and on_a_gpu(key) and not no_kernels(key)


def appended(
    held: torch.Tensor, new: torch.Tensor, room: Room | None, most: int | None
) -> tuple[torch.Tensor, Room | None]:
    """``held [B, G, K, D]`` with ``new [B, G, n, D]`` behind it, and the room that it is a view of.

    What needs gradients or does not fit together is concatenated (or refused) as PyTorch does it.
    """
    differentiable = torch.is_grad_enabled() and (new.requires_grad or held.requires_grad)
    if differentiable or new.dim() != 4:
        return torch.cat([held, new], dim=-2), None
    if held.dim() == 1:  # nothing yet
        held = new.new_empty((*new.shape[:2], 0, new.shape[3]), dtype=held.dtype, device=held.device)
    if room is None or not room.holds(held):
        room = None
    if kind_of(new) != (kind_of(held) if room is None else room.kind):
        return torch.cat([held, new], dim=-2), None
    length = held.shape[2]
    if room is not None:
        with room.lock:
            if room.takes(length, new.shape[2]):
                return room.append(length, new), room
    room = Room.of(held, new.shape[2], most)
    return room.append(length, new), room


class AppendingLayer(DynamicLayer):
    """A ``DynamicLayer`` whose keys and values are views of buffers with room behind them.

    ``keys`` and ``values`` may be assigned and cropped like those of a ``DynamicLayer``: a tensor that is no view of
    the layer's buffer is copied into a new one at the next update. A tensor that the layer gave out never changes.

    Attributes:
        most: keys that the layer is expected to hold at most, or None; buffers are made no larger.
    """

    _layer_type = None  # Transformers would register the class for new caches
    key_room: Room | None = None
    value_room: Room | None = None
    most: int | None = None

    def __init__(self, most: int | None = None):
        super().__init__()
        self.most = most

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``key_states [B, G, n, D]`` and ``value_states [B, G, n, Dv]``; all keys and values so far."""
        if torch.compiler.is_compiling() or transformed():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Any = (self.keys, self.values)
        if takes_launches(key_states, value_states) and self._append_token(key_states, value_states):
            return self.keys, self.values  # type: ignore[return-value]
        keys, key_room = appended(held[0], key_states, self.key_room, self.most)
        values, value_room = appended(held[1], value_states, self.value_room, self.most)
        self.keys, self.values, self.key_room, self.value_room = keys, values, key_room, value_room
        return keys, values

    def _append_token(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Append a token's ``key [B, G, 1, D]`` and ``value [B, G, 1, Dv]`` by a launch; False where PyTorch has to."""
        keys, values = self.key_room, self.value_room
        held_keys: Any = self.keys
        held_values: Any = self.values
        if keys is None or values is None or not (keys.takes_token(key) and values.takes_token(value)):
            return False
        if not (keys.holds(held_keys) and values.holds(held_values) and key.stride(3) == value.stride(3) == 1):
            return False
        length = held_keys.shape[2]
        if held_values.shape[2] != length or keys.buffer.shape[2] != values.buffer.shape[2]:
            return False
        with keys.lock, values.lock:
            if not (keys.takes(length, 1) and values.takes(length, 1)):
                return False
            if not append_token(keys.target, values.target, key, value, length):
                return False
            self.keys, self.values = keys.first(length + 1), values.first(length + 1)
        return True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the sequences ``beam_idx`` of the batch."""
        self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` of the batch."""
        self._map_batch(lambda t: t[indices, ...])

    def _map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace keys and values by ``operation`` of them, their room with them."""
        if self.get_seq_length() == 0:
            return
        keys: Any = self.keys
        values: Any = self.values
        self.keys, self.key_room = _mapped(keys, self.key_room, operation)
        self.values, self.value_room = _mapped(values, self.value_room, operation)

    def reset(self) -> None:
        """Forget all keys, as Transformers' own layer of this version does."""
        super().reset()
        self.key_room = self.value_room = None

    def offload(self) -> None:
        """Move keys and values to the CPU; the room behind them is given up."""
        super().offload()
        self.key_room = self.value_room = None


def _mapped(
    held: torch.Tensor, room: Room | None, operation: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, Room | None]:
    if room is None or not room.holds(held):
        return operation(held), None
    length = held.shape[2]
    buffer = operation(room.buffer)
    if buffer.untyped_storage()._cdata == room.buffer.untyped_storage()._cdata:  # a slice of the batch
        return operation(held), None
    room = Room(buffer, length)
    return room.buffer.narrow(2, 0, length), room


class AppendingCache(DynamicCache):
    """A ``DynamicCache`` that does not copy its keys at every step; ``generate()`` of a sparse model makes one.

    Full-attention layers are ``AppendingLayer``s; sliding-window, linear-attention and hybrid layers are
    Transformers' own. Every method means what it means in ``DynamicCache``. A buffer takes at most an eighth more
    than the keys in it, and less where ``max_length`` leaves no use for that.

    Args:
        config: the model's config, which says what kind each layer is; None = full attention everywhere.
        max_length: keys that each layer is expected to hold at most; more are taken as well.
        args, kwargs: as for ``DynamicCache``.
    """

    def __init__(self, *args: Any, max_length: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        append_in_place(self, max_length)


def append_in_place(cache: Any, max_length: int | None = None) -> None:
    """Turn a ``DynamicCache``, filled or not, into an ``AppendingCache``."""
    cache.__class__ = AppendingCache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(AppendingLayer, max_length)
    kinds = [type(layer) for layer in cache.layers]
    for layer, kind in zip(cache.layers, kinds, strict=True):
        if kind is DynamicLayer:
            layer.__class__ = AppendingLayer
            layer.most = max_length
