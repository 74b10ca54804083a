"""Files that a masker reads: made for one model once, checked against the layer that asks for them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sah_transformers.rows import Context

T = TypeVar("T")


def check_path(name: str, value: object, how: str) -> None:
    """Raise ``ValueError`` unless ``value`` can be a file's path; ``how`` says where such a file comes from."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be the path of a file ({how}), got {value!r}")


def version_of(name: str, path: str, command: str) -> tuple[str, int, int]:
    """(absolute path, time of change, bytes) of a file: what a loaded copy is cached by.

    Raises:
        ValueError: where there is no such file, with the ``command`` that writes one.
    """
    file = os.path.join(os.getcwd(), os.path.expanduser(path))
    try:
        found = os.stat(file)
    except OSError as error:
        how = f"`{command} MODEL --out {path}` writes one"
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}; {how}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name}: {path} is not a file")
    return file, found.st_mtime_ns, found.st_size


def of_layer(where: str, layers: dict[int, T], layer_idx: int) -> T:
    """The entry of a layer.

    Raises:
        ValueError: naming the layers that there are.
    """
    if layer_idx not in layers:
        known = ", ".join(map(str, sorted(layers)))
        raise ValueError(f"{where}: layer {layer_idx} is missing (it has {known}); was it made for another model?")
    return layers[layer_idx]


def check_heads(where: str, layer_idx: int, held: int, heads: int | None) -> None:
    """Raise ``ValueError`` unless a file's layer ``held`` as many query heads as the model has (None = not known)."""
    if heads is not None and held != heads:
        raise ValueError(
            f"{where}: layer {layer_idx} has {held} query heads, the model has {heads}; was it made for another model?"
        )


def local_heads(where: str, held: int, ctx: Context, heads: int) -> slice:
    """Which of the ``held`` query heads of a file are the ``heads`` from ``ctx.head_offset`` on.

    Raises:
        ValueError: where the file is not for a model whose shards have as many.
    """
    start = ctx.head_offset
    if held % heads or start % heads or start + heads > held:
        here = f"{heads} query heads" if not start else f"{heads} query heads from {start} on"
        raise ValueError(
            f"{where}: layer {ctx.layer_idx} has {held} query heads, the model has {here}; was it made for another?"
        )
    return slice(start, start + heads)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then put it there: no reader ever sees half of one."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
