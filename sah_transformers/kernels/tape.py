"""The launches of one call, kept for calls that differ from it in nothing but where their tensors lie.

The layers of a model make the same call one after the other, and the Python that leads to its launches takes longer
than the device does. So it runs for the first layer of a step; the others launch what that one has launched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

POISON = os.environ.get("SAH_POISON") == "1"
"""For tests: scratch and output are filled with NaN before use."""


class Address(int):
    """Where a tensor, or a part of one, lies: as an argument of a launch another number in another call."""


STREAM = object()
"""Stands for the current stream among the arguments of a launch."""


@dataclass(frozen=True)
class Tape:
    """A call's launches, to be launched again.

    Attributes:
        device: where; sizes: (shape, type) of each tensor that the call makes; out: which of them it gives.
        places: of every address among the arguments, the number of the tensor, of those given and those made, and the
            bytes from its beginning.
        numbers: all other arguments.
        launches: functions, and what picks the arguments of each from (stream, addresses, numbers).
    """

    device: torch.device
    sizes: list[tuple[torch.Size, torch.dtype]]
    out: int
    places: list[tuple[int, int]]
    numbers: list[Any]
    launches: list[tuple[Callable[..., None], itemgetter]]

    def play(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the call gives for other tensors, of the same shapes, strides, types and alignment."""
        made = [new(shape, dtype, self.device) for shape, dtype in self.sizes]
        bases = [tensor.data_ptr() for tensor in (*given, *made)]
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        pool = [stream, *[bases[number] + offset for number, offset in self.places], *self.numbers]
        for run, pick in self.launches:
            run(*pick(pool))
        return made[self.out]


class Recording:
    """What a call launches, and the tensors that it makes.

    Attributes:
        given: tensors that the call is handed; made: see ``new``.
        launches: functions and their arguments; whole: whether all of the call's are here.
    """

    def __init__(self, given: Sequence[torch.Tensor]):
        self.given, self.whole = list(given), True
        self.made: list[torch.Tensor] = []
        self.launches: list[tuple[Callable[..., None], list[Any]]] = []

    def note(self, entry: tuple[Any, ...], grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        """A launch of what ``built`` has given; ``args``: tensors, addresses and numbers."""
        run, function, metadata, values = entry
        args = [Address(arg.data_ptr()) if isinstance(arg, torch.Tensor) else arg for arg in args]
        self.launches.append((run, [*grid, STREAM, function, metadata, None, None, None, *args, *values]))

    def tape(self, out: torch.Tensor) -> Tape | None:
        """The tape of the call, which gave ``out``; None where it did more than launch kernels on tensors that it was
        handed, or made."""
        which = next((number for number, tensor in enumerate(self.made) if tensor is out), None)
        parts = [(tensor.data_ptr(), 1) for tensor in self.given]  # of what may be a view the beginning alone is known
        parts += [(tensor.data_ptr(), tensor.nbytes) for tensor in self.made]
        if not self.whole or which is None or len(dict(parts)) < len(parts):
            return None
        places: dict[int, tuple[int, int]] = {}
        for address in {arg for _, args in self.launches for arg in args if type(arg) is Address}:
            for number, (begin, size) in enumerate(parts):
                if 0 <= address - begin < size:
                    places[address] = number, address - begin
        first: dict[Any, int] = {STREAM: 0, **{address: at for at, address in enumerate(places, 1)}}
        numbers: list[Any] = []
        launches = []
        for run, args in self.launches:
            picked = []
            for arg in args:
                if arg is not STREAM and type(arg) is not Address:
                    picked.append(len(first) + len(numbers))
                    numbers.append(arg)
                elif arg in first:
                    picked.append(first[arg])
                else:
                    return None
            launches.append((run, itemgetter(*picked)))
        sizes = [(tensor.shape, tensor.dtype) for tensor in self.made]
        return Tape(out.device, sizes, which, list(places.values()), numbers, launches)


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


@contextmanager
def recording(given: Sequence[torch.Tensor]) -> Iterator[Recording]:
    """Notes what this thread launches meanwhile."""
    before, now = _thread.recording, Recording(given)
    _thread.recording = now
    try:
        yield now
    finally:
        _thread.recording = before


def note(entry: tuple[Any, ...] | None, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
    """For the recording, if there is one: a launch; ``entry`` None: one that cannot be repeated."""
    recording = _thread.recording
    if recording is not None and entry is None:
        recording.whole = False
    elif recording is not None and entry is not None:
        recording.note(entry, grid, args)


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for launches to write to."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if POISON:
        made.fill_(float("nan") if dtype.is_floating_point else 255)
    if _thread.recording is not None:
        _thread.recording.made.append(made)
    return made
