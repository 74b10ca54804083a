"""The estimates of scores that have kernels, by the names that ``selections.Estimated`` calls them.

A method is a module with the same constant and functions:

- ``TILES``: the cuts of its score kernel into programs, best first; ``tiles(call, given)``, if there is one, says
  which these are where they depend on the call.
- ``why_not(given, dim)``: what of ``Masker.given`` its kernels do not cover, or "".
- ``scratch(call, side, given)``: ``{name: (size, dtype)}`` of the arrays that ``look_up`` fills.
- ``look_up(launch, call, side, given, scratch)``: what depends on the query alone, once per call.
- ``score(launch, call, side, given, scratch, tile)``: what `decode.score.score_kernel` does, with estimates from side
  data in place of ``q.k``: the same outputs, with the same meaning.
- ``levels(call, given)``: in how many levels, from 1 on, candidates are ranked where scores are few whole numbers, else
  0; ``level(launch, call, side, given, scratch, cut)``, where there are some: they go where ``cut``, a `launch.Levels`,
  says, in place of scores.
- ``line(launch, call, side, given, scratch, samples)``, if there is one: the lines of rows that select by themselves,
  from the scores of a few keys; ``level`` then writes scores and, on these lines, levels; ``LEVEL_WARPS``: for 1,024
  keys.
- ``error(call, given)``, if there is one and the method is ``LOGARITHMIC``: how far stored scores may be off relatively
  if the call is ``coarse``, 0 where it should not be. One with a minus sign is only known not to be above the number
  without it. ``settle(launch, call, side, given, scratch, edges)`` makes those of a `launch.Edges` exact, in place.
- ``append(buffers, keys, values, span, given)``: side data of the keys in a `place.Span`, in place.

``call`` is a `launch.Scoring`, ``launch`` a `decode.kernel.Launcher`. ``side`` holds the masker's tensors
``[B, heads, >= K, ...]`` by name, views of storages with any strides; storages of a multiple of 16 keys are read in
wide loads. Estimates equal the masker's ``score``, in its head order and with its sign, up to float32 rounding,
HashAttention's exactly. Figures in these modules are estimates for an H100: B=1, H=32, G=8, K=131,072, 3 TB/s, 1.755
GHz, instructions counted in the sm_90 code of the variant with masses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sah_transformers.kernels.approximate.launch import Scoring, Tile

METHODS = {
    name: f"sah_transformers.kernels.approximate.{name}"
    for name in ("exact", "hash_attention", "double_sparsity", "pq_cache", "socket")
}

LOGARITHMIC = frozenset({"socket"})
"""Whose scores are positive and skewed: a line through a bracket of the cut is laid through integer forms."""


def method_of(estimate: str) -> Any:
    """The module of an estimate that ``METHODS`` names."""
    return import_module(METHODS[estimate])


def tiles_of(method: Any, call: Scoring, given: Any) -> tuple[Tile, ...]:
    """The cuts of a method's score kernel for a call, best first."""
    return method.tiles(call, given) if hasattr(method, "tiles") else method.TILES
