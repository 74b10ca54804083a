"""Side data per key: what maskers such as Quest or HashAttention keep about keys they have seen.

Side data belongs to the sequence, never to a masker: a `State` lives beside the cache (`sparse_attention`'s
``state``) or on the cache's own layers (in a model), follows every operation on the keys, and is caught up by length
when an operation went past it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from sah_transformers.kernels.append import append_in_place, in_place
from sah_transformers.rows import Context

if TYPE_CHECKING:
    from sah_transformers.maskers.base import Masker, MaskerConfig

Fold = Literal["amin", "amax"]

GROWTH = 1.125
"""A full buffer grows by an eighth, so that appending a key costs no copy of the others."""


BLOCK = 16
"""Keys that kernels load at once."""


class SideBuffer:
    """One tensor ``[B, heads, length, ...]`` that grows in place along its keys.

    The storage has room for a multiple of ``BLOCK`` keys. ``apart``: the same word ``[..., i]`` of neighbouring keys
    lies side by side. ``capacity``: keys that there is room for from the start.
    """

    def __init__(self, first: torch.Tensor, apart: bool = False, capacity: int = 0):
        self.apart = apart
        self.length = first.shape[2]
        self.storage = self._room(first, max(self.length, capacity))
        self.storage[:, :, : self.length] = first
        self.storage[:, :, self.length :] = 0  # compiled code looks at all of it

    @classmethod
    def over(cls, storage: torch.Tensor, apart: bool = False) -> SideBuffer:
        """The full buffer whose storage this is."""
        buffer = cls.__new__(cls)
        buffer.apart, buffer.length, buffer.storage = apart, storage.shape[2], storage
        return buffer

    def view(self) -> torch.Tensor:
        """The stored data, ``[B, heads, length, ...]``."""
        return self.storage.narrow(2, 0, self.length)

    def reserve(self, total: int) -> None:
        """Make room for ``total`` keys."""
        if total > self.storage.shape[2]:
            grown = self._room(self.storage, max(total, int(self.storage.shape[2] * GROWTH) + 16))
            grown[:, :, : self.length] = self.view()
            self.storage = grown
        self.storage = writable(self.storage)

    def _room(self, like: torch.Tensor, keys: int) -> torch.Tensor:
        """An empty storage for at least so many ``keys``."""
        shape = (*like.shape[:2], -(-keys // BLOCK) * BLOCK, *like.shape[3:])
        return like.new_empty((*shape[:2], shape[3], shape[2])).mT if self.apart else like.new_empty(shape)

    def append(self, new: torch.Tensor) -> None:
        """Add ``new [B, heads, n, ...]`` behind the stored keys."""
        total = self.length + new.shape[2]
        self.reserve(total)
        self.storage[:, :, self.length : total] = new
        self.length = total

    def crop(self, length: int) -> None:
        """Forget everything behind the first ``length`` keys."""
        self.length = min(self.length, length)

    def map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the stored data by ``operation`` of it."""
        self.storage = operation(self.storage.mT).mT if self.apart else operation(self.storage)


class PageBuffer:
    """The smallest or largest value of each page of ``size`` consecutive real tokens, ``[B, heads, pages, ...]``.

    A page without real tokens holds the identity: inf for ``"amin"``, -inf for ``"amax"``. ``capacity``: keys whose
    pages there is room for from the start.
    """

    def __init__(self, first: torch.Tensor, size: int, fold: Fold, capacity: int = 0):
        self.size, self.fold = size, fold
        self.identity = float("inf") if fold == "amin" else float("-inf")
        self.storage = first.new_full((*first.shape[:2], -(-capacity // size), *first.shape[3:]), self.identity)
        self.pages = 0

    @classmethod
    def over(cls, storage: torch.Tensor, size: int, fold: Fold) -> PageBuffer:
        """The full buffer whose storage this is."""
        buffer = cls(storage[:, :, :0], size, fold)
        buffer.storage, buffer.pages = storage, storage.shape[2]
        return buffer

    def view(self) -> torch.Tensor:
        """The stored data, ``[B, heads, pages, ...]``; pages count from each sequence's first real token."""
        return self.storage.narrow(2, 0, self.pages)

    def reserve(self, length: int) -> None:
        """Make room for the pages of ``length`` keys."""
        self.pages = max(self.pages, -(-length // self.size))
        if self.pages > self.storage.shape[2]:
            room = max(self.pages, int(self.storage.shape[2] * GROWTH) + 4)
            grown = self.storage.new_full((*self.storage.shape[:2], room, *self.storage.shape[3:]), self.identity)
            grown[:, :, : self.storage.shape[2]] = self.storage
            self.storage = grown
        self.storage = writable(self.storage)

    def append(self, new: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Fold ``new [B, heads, n, ...]`` at ``positions [B, n]`` (-1: nowhere) into their pages.

        Folding a key again changes nothing. ``length``: keys in all, an upper bound of the positions.
        """
        self.reserve(length)
        page = torch.where(positions < 0, 0, positions // self.size)[:, None]
        page = page.view(*page.shape, *[1] * (new.dim() - 3)).expand(new.shape)
        hidden = (positions < 0)[:, None].view(positions.shape[0], 1, positions.shape[1], *[1] * (new.dim() - 3))
        self.storage.scatter_reduce_(2, page, new.masked_fill(hidden, self.identity), self.fold)

    def crop(self, length: int, real: torch.Tensor | None) -> None:
        """Forget every page that is not full of the ``real [B, length]`` keys (None: all) that stay."""
        if real is None:
            self.storage = writable(self.storage)
            self.storage[:, :, length // self.size :] = self.identity
            self.pages = min(self.pages, -(-length // self.size))
            return
        full = real.sum(-1) // self.size
        stale = torch.arange(self.storage.shape[2], device=real.device) >= full[:, None]
        stale = stale.view(stale.shape[0], 1, stale.shape[1], *[1] * (self.storage.dim() - 3))
        self.storage = writable(self.storage).masked_fill_(stale, self.identity)
        self.pages = min(self.pages, -(-length // self.size))

    def map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the stored data by ``operation`` of it."""
        self.storage = operation(self.storage)


@dataclass
class Prepared:
    """What a masker made once of each sequence (codebooks): ``data [B, ...]`` per name, where ``ready [B]``.

    ``complete``: the host knows that all are ready, and need not ask the device again.
    """

    data: dict[str, torch.Tensor]
    ready: torch.Tensor
    complete: bool = False

    def side(self) -> dict[str, torch.Tensor]:
        """As maskers see it: the data by name, and ``ready``."""
        return {**self.data, "ready": self.ready}

    def merged(self, data: dict[str, torch.Tensor], ready: torch.Tensor) -> Prepared:
        """The same with what is ready now and was not before."""
        fresh = ready & ~self.ready

        def pick(name: str) -> torch.Tensor:
            old = self.data[name]
            return torch.where(fresh.view(-1, *[1] * (old.dim() - 1)), data[name], old)

        return Prepared({name: pick(name) for name in self.data}, self.ready | ready)

    def map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the stored data by ``operation`` of it."""
        self.data = {name: operation(tensor) for name, tensor in self.data.items()}
        self.ready = operation(self.ready)


class LayerState:
    """Side data of one attention layer and one batch of sequences, for every masker that keeps any.

    Every method leaves the state usable when it raises.
    """

    capacity = 0
    """Keys that new buffers have room for from the start."""

    def __init__(self) -> None:
        self._side: dict[MaskerConfig, dict[str, SideBuffer | PageBuffer]] = {}
        self._prepared: dict[MaskerConfig, Prepared] = {}
        self._lengths: dict[MaskerConfig, int] = {}
        self._positions: SideBuffer | None = None  # int64 [B, 1, K]; None while all keys are real tokens
        self.batch: int | None = None
        """Sequences that the side data belong to; None while there are none."""
        self.length = 0
        """Keys that the state has seen."""

    @property
    def padded(self) -> bool:
        """Whether some of the keys may be no real tokens."""
        return self._positions is not None

    def side(self, masker: Masker) -> dict[str, torch.Tensor]:
        """Side data of ``masker``: one tensor ``[B, heads, K or pages, ...]`` per name that ``append`` returned, those
        of ``prepare`` ``[B, ...]`` and, if there are any, ``ready [B]``."""
        side = {name: buffer.view() for name, buffer in self._side.get(masker.config, {}).items()}
        prepared = self._prepared.get(masker.config)
        return side if prepared is None else side | prepared.side()

    def bytes_per_key(self) -> float:
        """Stored side data in bytes, per key of one sequence; what was prepared once is not counted."""
        views = [b.view() for buffers in self._side.values() for b in buffers.values()]
        return sum(v.numel() * v.element_size() / max(1, v.shape[0] * self.length) for v in views)

    def room(self, maskers: Sequence[Masker], keys: torch.Tensor, new: int) -> list[torch.Tensor] | None:
        """The storages into which kernels write ``maskers``' side data of the ``new`` last of ``keys [B, G, K, D]``,
        with room for them; None where there is more to do than that."""
        batch, _, total, _ = keys.shape
        if self._positions is not None or self.batch != batch or self.length != total - new:
            return None
        storages = []
        for masker in maskers:
            if self._lengths.get(masker.config) != self.length:
                return None
            for buffer in self._side[masker.config].values():
                if not isinstance(buffer, PageBuffer):
                    return None
                buffer.reserve(total)
                if buffer.pages != -(-total // buffer.size):
                    return None
                storages.append(buffer.storage)
        return storages

    def follow(self, maskers: Sequence[Masker], total: int) -> None:
        """The side data of ``maskers`` are written up to ``total`` keys, into what ``room`` has given."""
        self._lengths.update((masker.config, total) for masker in maskers)
        self.length = total

    @torch.no_grad()
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
        """Bring the side data of ``maskers`` up to ``keys``, of which the last ``new`` came with this call.

        Keys between what the state knows and those are caught up; a state that knows more is cut back first; one
        of another batch size starts over.

        Args:
            keys, values: ``[B, G, K, D]``, ``[B, G, K, Dv]``; heads: H.
            real: bool ``[B, K]``, keys that are real tokens as far as this call can tell, or None for all.

        Returns:
            int64 ``[B, K]``: positions among the real tokens, -1 for padding.
        """
        batch, total = keys.shape[0], keys.shape[2]
        if self.batch not in (None, batch):
            self.reset()
        self.crop(total - new)
        start, before = self.length, self._positions
        try:
            positions = self._place(batch, total, real, keys.device)
            appended, made = self._appended(maskers, keys, values, heads, positions, context)
        except Exception:
            self._positions = before
            if before is not None:
                before.crop(start)
            raise
        self._keep(made)  # nothing is stored before every masker has succeeded
        for masker, have, data in appended:
            self._store(masker, data, keys, values, have, positions, context)
            self._lengths[masker.config] = total
        self.batch, self.length = batch, total
        return positions

    def _place(self, batch: int, total: int, real: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Positions of ``total`` keys, int64 ``[B, K]``; those of new keys are stored if some may be no real token."""
        if real is None and self._positions is None:
            return all_real(batch, total, device)
        start, count = self.length, torch.zeros((), dtype=torch.int64, device=device)
        if self._positions is None:
            self._positions = SideBuffer(counting(start, device).expand(batch, 1, -1))
        fresh = torch.ones(batch, total - start, dtype=torch.bool, device=device)
        if real is not None:
            fresh = real[:, start:].expand(batch, -1)
        if start:
            count = self._positions.view()[:, 0].amax(-1, keepdim=True) + 1
        self._positions.append(positions_of(fresh, count)[:, None])
        return self._positions.view()[:, 0]

    def _appended(
        self,
        maskers: Sequence[Masker],
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: int,
        positions: torch.Tensor,
        context: Context,
    ) -> tuple[list[tuple[Masker, int, dict[str, torch.Tensor] | None]], dict[MaskerConfig, Prepared]]:
        """What there is to store: per masker (keys it has, side data of the others, or None where a kernel writes them
        in place), and what was prepared now."""
        appended: dict[MaskerConfig, tuple[Masker, int, dict[str, torch.Tensor] | None]] = {}
        made: dict[MaskerConfig, Prepared] = {}
        for masker in maskers:
            config = masker.config
            if config in appended:  # the same masker may stand in the stack twice
                continue
            have = self._lengths.get(config, 0)
            data, part = None, context
            if masker.prepares:
                known = context.but(positions=positions, padded=self.padded)
                prepared = self._prepare(masker, keys, values, known)
                if prepared is not None:
                    if prepared is not self._prepared.get(config):
                        made[config], have = prepared, 0  # what was kept so far was made without it
                    part = context.but(side=prepared.side())
            if not in_place(masker, keys, values, have, self.padded, part):
                part = part.but(positions=positions[:, have:])
                data = masker.append(keys[:, :, have:], values[:, :, have:], part)
                check_side(masker, data, keys, keys.shape[2] - have, heads, self._side.get(config))
            appended[config] = masker, have, data
        return list(appended.values()), made

    def _store(
        self,
        masker: Masker,
        data: dict[str, torch.Tensor] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        have: int,
        positions: torch.Tensor,
        context: Context,
    ) -> None:
        """Put the side data of the keys from ``have`` on into their buffers."""
        buffers, pages, total = self._side.setdefault(masker.config, {}), masker.pages(), keys.shape[2]
        if data is None:
            prepared = self._prepared.get(masker.config)
            part = context if prepared is None else context.but(side=prepared.side())
            for name, (size, fold) in pages.items():
                if name not in buffers:
                    buffers[name] = PageBuffer(keys, size, fold, self.capacity)
            if not buffers:
                shapes = masker.append(keys[:, :, :0], values[:, :, :0], part.but(positions=positions[:, :0]))
                for name, tensor in shapes.items():
                    buffers[name] = SideBuffer(tensor, name in masker.apart, max(self.capacity, total))
            for buffer in buffers.values():
                if isinstance(buffer, SideBuffer):
                    buffer.crop(have)
                buffer.reserve(total)
            known = positions if self.padded else None
            if append_in_place(masker, {n: b.storage for n, b in buffers.items()}, keys, values, have, known, part):
                for buffer in buffers.values():
                    if isinstance(buffer, SideBuffer):
                        buffer.length = total
                return
            part = part.but(positions=positions[:, have:])
            data = masker.append(keys[:, :, have:], values[:, :, have:], part)
        for name, tensor in data.items():
            if name in pages:
                if name not in buffers:
                    buffers[name] = PageBuffer(tensor, *pages[name], self.capacity)
                buffers[name].append(tensor, positions[:, have:], total)  # type: ignore[call-arg]
            elif name in buffers:
                buffer = buffers[name]
                assert isinstance(buffer, SideBuffer)
                buffer.crop(have)
                buffer.append(tensor)
            else:
                buffers[name] = SideBuffer(tensor, name in masker.apart, self.capacity)

    def _keep(self, made: dict[MaskerConfig, Prepared]) -> None:
        """Store what was prepared now."""
        self._prepared.update(made)

    def _prepare(self, masker: Masker, keys: torch.Tensor, values: torch.Tensor, context: Context) -> Prepared | None:
        """What ``masker`` makes once of each sequence: the stored object itself where nothing is new.

        It is asked about the prompt, where that was read without it; then, for sequences not ready, about all keys.
        """
        known, total = self._prepared.get(masker.config), keys.shape[2]
        assert context.positions is not None
        for size in dict.fromkeys((context.prompt or total, total)):
            if known is not None and not known.complete:
                known.complete = bool(known.ready.all())
            if known is not None and known.complete:
                return known
            side = {} if known is None else {"ready": known.ready}
            part = context.but(positions=context.positions[:, :size], side=side)
            result = masker.prepare(keys[:, :, :size], values[:, :, :size], part)
            if result is None:
                return None
            if known is None:
                known = Prepared(*result)
            elif bool((result[1] & ~known.ready).any()):
                known = known.merged(*result)
        return known

    def crop(self, length: int) -> None:
        """Forget the keys behind the first ``length``; without any left, what was prepared as well."""
        if length >= self.length:
            return
        self.length, real = length, None
        if self._positions is not None:
            self._positions.crop(length)
            real = self._positions.view()[:, 0] >= 0
        for config, buffers in self._side.items():
            kept = min(self._lengths.get(config, 0), length)
            for buffer in buffers.values():
                if isinstance(buffer, PageBuffer):
                    buffer.crop(length, real)
                    kept = min(kept, first_of_open_page(real, length, buffer.size))
            for buffer in buffers.values():
                if isinstance(buffer, SideBuffer):
                    buffer.crop(kept)
            self._lengths[config] = kept
        if length == 0:
            self._prepared.clear()

    def reorder(self, index: torch.Tensor) -> None:
        """Take the sequences ``index`` of the batch (beam search, batch selection)."""
        self._map_batch(lambda t: t[index.to(t.device)])
        if self.batch is not None:
            self.batch = int(index.sum()) if index.dtype == torch.bool else index.numel()

    def repeat(self, times: int) -> None:
        """Repeat every sequence ``times`` times, copies next to each other."""
        self._map_batch(lambda t: t.repeat_interleave(times, dim=0))
        self.batch = None if self.batch is None else self.batch * times

    def to(self, device: torch.device | str) -> None:
        """Move the side data."""
        self._map_batch(lambda t: t.to(device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def _buffers(self) -> list[SideBuffer | PageBuffer | Prepared]:
        own = [buffer for buffers in self._side.values() for buffer in buffers.values()]
        return [*own, *self._prepared.values(), *([] if self._positions is None else [self._positions])]

    def _map_batch(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for buffer in self._buffers():
            buffer.map_batch(operation)


@dataclass
class State:
    """Side data between calls of ``sparse_attention`` on one batch of sequences, one ``LayerState`` per layer.

    ``crop``, ``reorder``, ``repeat`` and ``reset`` follow what the caller does to the keys.
    """

    def __post_init__(self) -> None:
        self.layers: dict[int, LayerState] = {}

    def layer(self, layer_idx: int) -> LayerState:
        """The layer's side data, made on first use."""
        return self.layers.setdefault(layer_idx, LayerState())

    def crop(self, length: int) -> None:
        """Forget the keys behind the first ``length`` in every layer."""
        for layer in self.layers.values():
            layer.crop(length)

    def reorder(self, index: torch.Tensor) -> None:
        """Take the sequences ``index`` of the batch in every layer."""
        for layer in self.layers.values():
            layer.reorder(index)

    def repeat(self, times: int) -> None:
        """Repeat every sequence ``times`` times in every layer."""
        for layer in self.layers.values():
            layer.repeat(times)

    def reset(self) -> None:
        """Forget everything."""
        self.layers.clear()


def first_of_open_page(real: torch.Tensor | None, length: int, size: int) -> int:
    """The lowest of ``length`` keys, over all sequences, of a page of ``size`` real tokens that is not full.

    ``real``: bool ``[B, length]``, or None for all.
    """
    if real is None:
        return length // size * size
    start = real.sum(-1, keepdim=True) // size * size
    return int((real.cumsum(-1) <= start).sum(-1).min()) if real.numel() else 0


def writable(storage: torch.Tensor) -> torch.Tensor:
    """``storage``, or a copy of one made in inference mode, which nothing may write to afterwards."""
    return storage.clone() if storage.is_inference() and not torch.is_inference_mode_enabled() else storage


def positions_of(real: torch.Tensor, before: torch.Tensor | int = 0) -> torch.Tensor:
    """Number of each key among its sequence's real tokens: int64 ``[B, K]`` from bool, -1 for padding.

    ``before``: real tokens ``[B, 1]`` that come before these keys.
    """
    return (real.cumsum(-1) + (before - 1)).masked_fill(~real, -1)


def counting(length: int, device: torch.device) -> torch.Tensor:
    """0, 1, 2, ...: int64 ``[length]``; a view of numbers that all states of a device share and none writes."""
    known = _numbers.get(device)
    if known is None or len(known) < length:
        with torch.inference_mode(False):
            known = _numbers[device] = torch.arange(max(1024, int(length * GROWTH)), device=device)
    return known[:length]


_numbers: dict[torch.device, torch.Tensor] = {}


def all_real(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Positions of keys that are all real tokens, int64 ``[B, K]``: of ``counting``, made once per step of a model."""
    last = _last_real.get(device)
    if last is None or last.shape != (batch, length):
        last = _last_real[device] = counting(length, device).expand(batch, -1)
    return last


_last_real: dict[torch.device, torch.Tensor] = {}


def check_side(
    masker: Masker,
    data: object,
    keys: torch.Tensor,
    new: int,
    heads: int,
    known: dict[str, SideBuffer | PageBuffer] | None,
) -> None:
    """Raise ``ValueError`` unless ``append`` returned tensors ``[B, G or H, new, ...]`` that fit the ones before."""
    what = f"{type(masker).__name__}.append must return {{name: tensor [B, G or H, new keys, ...]}}"
    if not isinstance(data, dict):
        raise ValueError(f"{what}, got {type(data).__name__}")
    batch, groups = keys.shape[:2]
    for name in {**(known or {}), **data}:
        tensor = data.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{what}: {name!r} should be a tensor, got {type(tensor).__name__}")
        shape = tuple(tensor.shape)
        if shape[:1] + shape[2:3] != (batch, new) or shape[1] not in (groups, heads):
            want = f"[{batch}, {groups} or {heads}, {new}]"
            raise ValueError(f"{what}: {name!r} should start with {want}, got {list(shape)}")
        if known is None:
            continue
        if name not in known:
            raise ValueError(f"{what}: {name!r} was not among the names of earlier calls, {sorted(known)}")
        before = known[name].storage
        if (shape[1], *shape[3:], tensor.dtype) != (before.shape[1], *before.shape[3:], before.dtype):
            raise ValueError(
                f"{what}: {name!r} must stay what it was, {before.dtype} {list(before.shape[1:2] + before.shape[3:])} "
                f"per key, got {tensor.dtype} {list(shape[1:2] + shape[3:])}"
            )
