"""HashAttention's weights: a safetensors file with two small MLPs per layer and head, one for queries, one for keys.

Tensors ``layers.<L>.<q|k>.<i>.weight`` ``[S, out, in]`` and ``.bias`` ``[S, out]``, i = 0, 1, 2: D to hidden to hidden
to bits; S is the number of query heads, or of KV heads if query heads share theirs. Metadata, as strings: ``format``,
``query_heads``, ``kv_heads``, ``head_dim``, ``bits`` and ``made_from`` (JSON: model, text, settings).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sah_transformers.maskers.model_files import of_layer, version_of, write_whole

FIELD = "hat_weight_file"
COMMAND = "sah train hash-attention"
FORMAT = "sah-hash-attention-1"
DEPTH = 3

Mlp = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""(weight ``[S, out, in]``, bias ``[S, out]``) of each of its layers."""


@dataclass(frozen=True)
class HashFile:
    """What a weight file says of itself.

    Attributes:
        path: where it lies.
        query_heads, kv_heads, head_dim, bits: of the model and of the codes.
        layers: per layer, the number of MLPs S.
        made_from: model, text and settings.
    """

    path: str
    query_heads: int
    kv_heads: int
    head_dim: int
    bits: int
    layers: dict[int, int]
    made_from: dict[str, Any]


def write_hash_weights(
    path: str | Path,
    layers: Mapping[int, Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]],
    query_heads: int,
    kv_heads: int,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write a weight file.

    Args:
        layers: per layer index ``{"q": three (weight [S, out, in], bias [S, out]), "k": the same}``.
        query_heads, kv_heads: H and G of the model; S is one of them.
        made_from: plain data on where the weights come from.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, sides in layers.items():
        for side in ("q", "k"):
            for number, (weight, bias) in enumerate(sides[side]):
                tensors[f"layers.{layer}.{side}.{number}.weight"] = weight.detach().cpu().contiguous().clone()
                tensors[f"layers.{layer}.{side}.{number}.bias"] = bias.detach().cpu().contiguous().clone()
    first = next(iter(layers.values()))["k"]
    sizes = {"query_heads": query_heads, "kv_heads": kv_heads}
    sizes |= {"head_dim": first[0][0].shape[-1], "bits": first[-1][0].shape[-2]}
    metadata = {"format": FORMAT, **{name: str(size) for name, size in sizes.items()}}
    metadata["made_from"] = json.dumps(dict(made_from or {}))
    write_whole(path, lambda part: save_file(tensors, part, metadata))


def read_hash_file(path: str) -> HashFile:
    """What a file holds, its tensors' names, shapes and dtypes checked but not read; once as long as it is unchanged.

    Raises:
        ValueError: naming the file and the culprit: no such file, truncated or no safetensors, another format, a
            tensor that is missing, unknown, or of a wrong shape or dtype.
    """
    return _read(*version_of(FIELD, path, COMMAND))


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> HashFile:
    where = f"{FIELD}: {path}"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = {name: one.get_dtype() for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read as safetensors: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where} must have the format {FORMAT!r} in its metadata, got {metadata.get('format')!r}")
    numbers = {name: _whole(where, metadata, name) for name in ("query_heads", "kv_heads", "head_dim", "bits")}
    if numbers["query_heads"] % numbers["kv_heads"]:
        raise ValueError(f"{where}: query_heads must be a multiple of kv_heads, got {metadata}")
    for name, dtype in dtypes.items():
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{where}: {name} must have a floating-point dtype, got {dtype}")
        if not re.fullmatch(r"layers\.\d+\.[qk]\.[012]\.(weight|bias)", name):
            raise ValueError(f"{where}: unknown tensor {name!r}")
    indices = sorted({int(name.split(".")[1]) for name in shapes})
    if not indices:
        raise ValueError(f"{where} holds no layer")
    layers = {layer: _check_layer(where, layer, shapes, numbers) for layer in indices}
    try:
        made_from = json.loads(metadata.get("made_from", "{}"))
    except ValueError as error:
        raise ValueError(f"{where}: made_from must be JSON: {error}") from None
    return HashFile(path=path, layers=layers, made_from=made_from, **numbers)


def _whole(where: str, metadata: Mapping[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {name} must be a whole number in its metadata, got {metadata.get(name)!r}")
    return int(text)


def _check_layer(where: str, layer: int, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, int]) -> int:
    """Raise ``ValueError`` unless a layer's tensors are all there and fit together; the number of its MLPs."""
    allowed = (numbers["query_heads"], numbers["kv_heads"])
    sets: int | None = None
    for side in ("q", "k"):
        width = numbers["head_dim"]
        for number in range(DEPTH):
            weight, bias = (f"layers.{layer}.{side}.{number}.{kind}" for kind in ("weight", "bias"))
            for name in (weight, bias):
                if name not in shapes:
                    raise ValueError(f"{where}: {name} is missing")
            shape = shapes[weight]
            sets = shape[0] if sets is None and shape else sets
            out = numbers["bits"] if number == DEPTH - 1 else shape[1] if len(shape) == 3 else 0
            if sets not in allowed or shape != (sets, out, width) or 0 in shape:
                heads = " or ".join(map(str, dict.fromkeys(allowed)))
                want = f"[{heads} (the same in all), {out or 'hidden'}, {width}]"
                raise ValueError(f"{where}: {weight} must have shape {want}, got {list(shape)}")
            if shapes[bias] != (sets, out):
                raise ValueError(f"{where}: {bias} must have shape {[sets, out]}, got {list(shapes[bias])}")
            width = out
    assert sets is not None
    return sets


def mlp_on(path: str, layer: int, side: str, device: torch.device) -> Mlp:
    """The MLPs for queries (``"q"``) or keys (``"k"``) of one layer on a device, read and moved there once.

    Raises:
        ValueError: as ``read_hash_file``, for a layer that is not there, for NaN or Inf in a tensor.
    """
    return _on(layer, side, device, *version_of(FIELD, path, COMMAND))


@lru_cache(maxsize=256)
def _on(layer: int, side: str, device: torch.device, path: str, changed: int, size: int) -> Mlp:
    where = f"{FIELD}: {path}"
    of_layer(where, _read(path, changed, size).layers, layer)
    pairs = []
    with safe_open(path, framework="pt", device="cpu") as file:
        for number in range(DEPTH):
            pair = []
            for kind in ("weight", "bias"):
                name = f"layers.{layer}.{side}.{number}.{kind}"
                tensor = file.get_tensor(name)
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{where}: {name} must be finite, it holds NaN or Inf")
                if kind == "weight":
                    tensor = tensor.mT.contiguous().mT  # a row of the storage per input: kernels add them up
                pair.append(tensor.to(device))
            pairs.append((pair[0], pair[1]))
    return tuple(pairs)
