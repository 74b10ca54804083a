"""Side data of a cache of fixed size: tensors that stay where they are, so that compiled code may hold on to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from sah_transformers.kernels.append import append_from_device, follow
from sah_transformers.rows import Context
from sah_transformers.state import LayerState, PageBuffer, Prepared, SideBuffer, all_real, counting

if TYPE_CHECKING:
    from sah_transformers.maskers.base import Masker, MaskerConfig

S = TypeVar("S", bound="StaticState")

ALIGNMENT = 256
"""Bytes: where each tensor of a layout begins is a multiple of this."""


class StaticState(LayerState):
    """A ``LayerState`` all of which lies in tensors, the number of keys that it has seen included.

    Compiled code is handed ``memory`` and writes into it when the host does not see it, so every update begins with
    what it says. The side data are those of the maskers of the last update alone.

    Attributes:
        capacity: keys that the cache has room for.
        keeper: number of the ``LayerPlan`` whose maskers' side data ``memory`` holds, 0 for none.
        memory: bytes, all that compiled code needs side by side (one tensor, as each costs a check before every step):
            ``span``, int64 ``[2]`` (keys that are known: before the last call, and now), ``positions``, int64
            ``[B, 1, capacity]``, then each masker's; the same object as long as the batch stays as it is.
        layout: of ``memory``, see ``laid_out``.
        captured: whether the kernels take calls of one row, and their appends, so that nothing waits for the device.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.keeper = 0
        self.captured = False
        self.memory: torch.Tensor | None = None
        self.layout = ""
        self._handed: list[MaskerConfig] = []
        self._span = torch.zeros(2, dtype=torch.int64)
        self._idle: dict[MaskerConfig, Prepared] = {}
        self._padded = True
        self._read_to = 0  # by maskers that were not asked to select

    @classmethod
    def of(cls: type[S], maskers: Sequence[Masker], layout: str, memory: torch.Tensor) -> S:
        """The state that ``memory`` is; ``maskers`` as it was handed out for."""
        tensors = laid_out(memory, layout)
        span, positions = tensors.pop("span"), tensors.pop("positions")
        state = cls(positions.shape[2])
        state._span, state._positions, state.batch = span, SideBuffer.over(positions), positions.shape[0]
        for name, tensor in tensors.items():
            number, _, name = name.partition(".")
            masker = maskers[int(number)]
            if name == "ready":
                state._prepared[masker.config] = Prepared({}, tensor)
            elif name in masker.prepared:
                state._prepared[masker.config].data[name] = tensor
            else:
                pages, side = masker.pages(), state._side.setdefault(masker.config, {})
                if name in pages:
                    side[name] = PageBuffer.over(tensor, *pages[name])
                else:
                    side[name] = SideBuffer.over(tensor, name in masker.apart)
        return state

    def hand_out(self, maskers: Sequence[Masker], keeper: int, captured: bool) -> None:
        """Have ``memory`` ready for compiled code of the plan ``keeper``, whose ``maskers`` were just updated."""
        self.captured, self.keeper = captured, keeper
        self._handed = [masker.config for masker in maskers]
        if not self._settled():
            with torch.inference_mode(False):  # calls outside of it may write there as well
                self.memory, self.layout = side_by_side(self._named())
                self._settle()
            torch._dynamo.mark_static_address(self.memory)

    def _named(self) -> dict[str, torch.Tensor]:
        """What compiled code needs."""
        assert self._positions is not None
        named = {"span": self._span, "positions": self._positions.storage}
        for number, config in enumerate(self._handed):
            prepared = self._prepared.get(config)
            if prepared is not None:
                named |= {f"{number}.ready": prepared.ready}
                named |= {f"{number}.{name}": tensor for name, tensor in prepared.data.items()}
            side = self._side.get(config, {})
            named |= {f"{number}.{name}": buffer.storage for name, buffer in side.items()}
        return named

    def _settle(self) -> None:
        """Have everything lie in ``memory``."""
        assert self.memory is not None
        assert self._positions is not None
        named = laid_out(self.memory, self.layout)
        self._span, self._positions.storage = named["span"], named["positions"]
        for number, config in enumerate(self._handed):
            prepared = self._prepared.get(config)
            if prepared is not None:
                prepared.ready = named[f"{number}.ready"]
                prepared.data = {name: named[f"{number}.{name}"] for name in prepared.data}
            for name, buffer in self._side[config].items():
                buffer.storage = named[f"{number}.{name}"]

    def _settled(self) -> bool:
        """Whether ``memory`` is what compiled code needs, no more and no less, each where its layout says."""
        if self.memory is None:
            return False
        storage = self.memory.untyped_storage().data_ptr()
        places = {name: (storage, place.begin) for name, place in places_of(self.layout).items()}
        return places == {
            name: (tensor.untyped_storage().data_ptr(), tensor.storage_offset() * tensor.itemsize)
            for name, tensor in self._named().items()
        }

    def __getstate__(self) -> dict[str, Any]:
        if self._settled():
            return self.__dict__
        return {**self.__dict__, "memory": None, "keeper": 0}

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.__dict__.update(data)
        if self.memory is not None:  # a pickle has a copy of its own of every tensor
            self._settle()

    def room(self, maskers: Sequence[Masker], keys: torch.Tensor, new: int) -> None:
        """None: every update begins with what ``memory`` says."""

    def read_on(self, before: int, total: int, unasked: Sequence[Masker]) -> None:
        """Before an update to ``total`` keys by a call from whose keys the ``unasked`` maskers do not select.

        That is a prompt. If the call before was a part of it, what was made once of the sequence is made anew.
        """
        if before == self._read_to:
            again = {masker.config for masker in unasked} & self._prepared.keys()
            self._idle |= {config: self._prepared.pop(config) for config in again}
        self._read_to = total if unasked else -1

    @property
    def padded(self) -> bool:
        """Whether some of the keys may be no real tokens: not while a whole prompt is all there is."""
        return self._padded

    def update(
        self,
        maskers: Sequence[Masker],
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: int,
        new: int,
        real: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """As ``LayerState.update``; the side data of other maskers are forgotten."""
        if self.batch != keys.shape[0] or self._span.device != keys.device:
            read_to = self._read_to
            self.__init__(self.capacity)  # type: ignore[misc]
            self._span, self._read_to = self._span.to(keys.device), read_to
        if self._positions is None:
            self._positions = SideBuffer(counting(0, keys.device).expand(keys.shape[0], 1, -1), False, self.capacity)
            self._positions.storage.fill_(-1)
        kept = {masker.config for masker in maskers}
        for config in [config for config in self._side if config not in kept]:
            del self._side[config]
            self._prepared.pop(config, None)
        try:
            positions = super().update(maskers, keys, values, heads, new, real, context)
        except Exception:
            self._positions.storage[:, :, self.length :] = -1
            raise
        self._span.fill_(self.length)
        return positions

    def _read(self) -> None:
        """Take over how many keys the tensors know of."""
        self.length = known = int(self._span[1])
        self._lengths = dict.fromkeys(self._side, known)
        for buffer in self._buffers():
            if isinstance(buffer, SideBuffer):
                buffer.length = known
            elif isinstance(buffer, PageBuffer):
                buffer.pages = -(-known // buffer.size)
        if known == 0:
            self._idle |= self._prepared
            self._prepared.clear()

    def _place(self, batch: int, total: int, real: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        assert self._positions is not None
        self._padded = real is not None or self.length > 0
        if self._padded:
            return super()._place(batch, total, real, device)
        positions = all_real(batch, total, device)
        self._positions.append(positions[:, None])
        return positions

    def _keep(self, made: dict[MaskerConfig, Prepared]) -> None:
        for config, new in made.items():
            known = self._prepared.get(config) or self._idle.pop(config, None)
            if known is not None:
                for name, tensor in new.data.items():
                    known.data[name].copy_(tensor)
                known.ready.copy_(new.ready)
                known.complete = new.complete
            self._prepared[config] = new if known is None else known

    def crop(self, length: int) -> None:
        """Forget the keys behind the first ``length``; without any left, what was prepared as well."""
        self._read()
        if length >= self.length:
            return
        if self._positions is not None:
            self._positions.storage[:, :, length : self.length] = -1
        if length == 0:
            self.captured = False
            self._idle |= self._prepared
        super().crop(length)
        self._span.fill_(length)

    def reset(self) -> None:
        """Forget all keys; the tensors stay where they are."""
        self.crop(0)

    def complete(self) -> bool:
        """Whether all that is made once of a sequence was made; asks the device where the host does not know."""
        for prepared in self._prepared.values():
            prepared.complete = prepared.complete or bool(prepared.ready.all())
        return all(prepared.complete for prepared in self._prepared.values())

    def to(self, device: torch.device | str) -> None:
        """Move the side data."""
        super().to(device)
        self._span = self._span.to(device)

    def _map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_batch(operation)
        self._idle.clear()
        self.memory, self.keeper = None, 0


class CapturedState(StaticState):
    """A ``StaticState`` whose keys the host does not count: kernels do, and nothing waits for them.

    Its side data span the cache's whole buffer. All that is made once of a sequence has been made.

    Attributes:
        filled: int64, one element: keys in the cache.
    """

    filled: torch.Tensor

    @classmethod
    def over(cls, maskers: Sequence[Masker], layout: str, memory: torch.Tensor, filled: torch.Tensor) -> CapturedState:
        """As ``of``."""
        state = cls.of(maskers, layout, memory)
        state.filled = filled
        return state

    def update(
        self,
        maskers: Sequence[Masker],
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: int,
        new: int,
        real: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """As ``LayerState.update``; ``keys`` and ``values`` are whole buffers, and so are the positions."""
        assert real is not None
        assert self._positions is not None
        self.length = keys.shape[2]
        positions = self._positions.storage[:, 0, : self.length]
        follow(self.filled, self._span, positions, real, new)
        for masker in maskers:
            side = self._side[masker.config]
            for buffer in side.values():
                if isinstance(buffer, SideBuffer):
                    buffer.length = self.length
            prepared = self._prepared.get(masker.config)
            part = context if prepared is None else context.but(side=prepared.side())
            storages = {name: buffer.storage for name, buffer in side.items()}
            append_from_device(masker, storages, keys, values, self._span, positions, part)
        return positions


def side_by_side(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, str]:
    """Copies of ``tensors`` in one tensor of bytes, and its layout: where each lies, its dtype, shape and strides."""
    layout, end = [], 0
    for name, tensor in tensors.items():
        if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            tensor = tensor.contiguous()
        shape, strides = (",".join(map(str, numbers)) for numbers in (tensor.shape, tensor.stride()))
        layout.append(f"{name}:{end}:{str(tensor.dtype).removeprefix('torch.')}:{shape}:{strides}")
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, device=tensors["span"].device)
    for copy, tensor in zip(laid_out(memory, " ".join(layout)).values(), tensors.values(), strict=True):
        copy.copy_(tensor)
    return memory, " ".join(layout)


class Place(NamedTuple):
    """Where a tensor of a layout begins, in bytes, and what it is."""

    begin: int
    dtype: torch.dtype
    shape: list[int]
    strides: list[int]


@lru_cache(maxsize=1024)
def places_of(layout: str) -> dict[str, Place]:
    """A layout's tensors, by name."""
    places = {}
    for one in layout.split():
        name, begin, dtype, *numbers = one.rsplit(":", 4)
        shape, strides = ([int(number) for number in part.split(",") if number] for part in numbers)
        places[name] = Place(int(begin), getattr(torch, dtype), shape, strides)
    return places


def laid_out(memory: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    """The tensors in ``memory``, by name."""
    tensors = {}
    for name, (begin, dtype, shape, strides) in places_of(layout).items():
        part = memory[begin : begin + math.prod(shape) * dtype.itemsize]
        tensors[name] = part.view(dtype).as_strided(shape, strides)
    return tensors
