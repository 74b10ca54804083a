"""Double Sparsity's channel files: per layer and query head, the channels from the most to the least important.

The authors' JSON, ``{"model.layers.<L>.self_attn.qk_proj": [H lists of D]}``, with any prefix before ``layers``. A file
written here also holds ``"made_from"``: model, text and settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sah_transformers.maskers.model_files import of_layer, version_of, write_whole

FIELD = "sorted_channel_file"
COMMAND = "sah calibrate double-sparsity"


def write_channels(
    path: str | Path,
    layers: Mapping[int, torch.Tensor | Sequence[Sequence[int]]],
    made_from: Mapping[str, Any] | None = None,
    selection: str = "qk_proj",
) -> None:
    """Write a channel file that the authors' code reads too.

    Args:
        layers: per layer index, the channels of each query head in order ``[H, D]``.
        made_from: plain data on where they come from.
        selection: what the order was made from, ``"qk_proj"``, ``"q_proj"`` or ``"k_proj"``.
    """
    data: dict[str, Any] = {} if made_from is None else {"made_from": dict(made_from)}
    for layer, heads in sorted(layers.items()):
        rows = heads.tolist() if isinstance(heads, torch.Tensor) else [list(row) for row in heads]
        data[f"model.layers.{layer}.self_attn.{selection}"] = rows
    write_whole(path, lambda part: part.write_text(json.dumps(data), encoding="utf-8"))


def read_channels(path: str, selection: str) -> dict[int, np.ndarray]:
    """The channels of every layer of a file, ``{layer: int64 [H, D]}``; read once as long as it does not change.

    Raises:
        ValueError: naming the file and the culprit: no such file, no JSON, no layer with ``selection``, a head whose
            list is no permutation of its channels, heads of different lengths.
    """
    return _read(selection, *version_of(FIELD, path, COMMAND))


@lru_cache(maxsize=8)
def _read(selection: str, path: str, changed: int, size: int) -> dict[int, np.ndarray]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FIELD}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{FIELD}: {path} must hold a mapping of layers to lists, got {type(data).__name__}")
    layers: dict[int, np.ndarray] = {}
    for name, heads in data.items():
        found = re.search(rf"(?:^|\.)layers\.(\d+)\.self_attn\.{selection}$", name)
        if not found:
            continue
        layer = int(found.group(1))
        if layer in layers:
            raise ValueError(f"{FIELD}: {path} has layer {layer} twice ({name})")
        layers[layer] = _checked(f"{FIELD}: {path}: {name}", heads)
    if not layers:
        raise ValueError(f"{FIELD}: {path} has no entry that ends in 'layers.<number>.self_attn.{selection}'")
    return layers


def _checked(where: str, heads: Any) -> np.ndarray:
    if not isinstance(heads, list) or not heads or not all(isinstance(row, list) and row for row in heads):
        raise ValueError(f"{where} must be a list of one list of channels per query head")
    dim = len(heads[0])
    for number, row in enumerate(heads):
        wrong = [channel for channel in row if type(channel) is not int]
        if wrong:
            raise ValueError(f"{where}: head {number} must list whole numbers, got {wrong[0]!r}")
        if len(row) != dim:
            raise ValueError(f"{where}: head {number} has {len(row)} channels, head 0 has {dim}")
        if sorted(row) != list(range(dim)):
            raise ValueError(f"{where}: head {number} must be a permutation of the channels 0 to {dim - 1}")
    return np.array(heads, dtype=np.int64)


def channels_on(path: str, selection: str, layer: int, device: torch.device) -> torch.Tensor:
    """The channels of one layer on a device, int64 ``[H, D]``, moved there once.

    Raises:
        ValueError: as ``read_channels``, and for a layer that the file does not have.
    """
    return _on(layer, device, selection, *version_of(FIELD, path, COMMAND))


@lru_cache(maxsize=1024)
def _on(layer: int, device: torch.device, selection: str, path: str, changed: int, size: int) -> torch.Tensor:
    channels = of_layer(f"{FIELD}: {path}", _read(selection, path, changed, size), layer)
    return torch.tensor(channels, device=device)
