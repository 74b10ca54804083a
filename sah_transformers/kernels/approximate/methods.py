"""The estimates of scores that have kernels, by the names that ``selections.Estimated`` calls them.

A method is a module with these functions:

- ``TILES``: the cuts of its score kernel into programs, best first.
- ``given_of(masker, queries, ctx)``: what its kernels need beside the side data (weights, channels, codebooks);
  ``why_not(given, dim)``: what of it they do not cover, or "".
- ``scratch(call, side, given)``: ``{name: (size, dtype)}`` of the arrays that ``look_up`` fills.
- ``look_up(launch, call, side, given, scratch)``: what depends on the query alone, once per call.
- ``score(launch, call, side, given, scratch, tile)``: scores and what each chunk of keys holds (`launch.Scoring`).
- ``append(buffers, keys, values, start, given)``: side data of new keys, in place.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS = {
    "exact": "sah_transformers.kernels.approximate.exact",
}


def method_of(estimate: str) -> Any:
    """The module of an estimate that ``METHODS`` names."""
    return import_module(METHODS[estimate])
