"""Side data of new keys, written in place by kernels: the same bits as ``Masker.append`` gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers.cache_utils import CacheLayerMixin

from sah_transformers.kernels.approximate.methods import METHODS, method_of
from sah_transformers.kernels.approximate.place import Direct, Span
from sah_transformers.kernels.built import built
from sah_transformers.kernels.decode import DTYPES
from sah_transformers.kernels.decode.stack import power_of_2
from sah_transformers.kernels.device import no_kernels, on_device
from sah_transformers.kernels.faults import cannot_be_built
from sah_transformers.selections import Estimated, Pages

if TYPE_CHECKING:
    from sah_transformers.maskers.base import Masker
    from sah_transformers.rows import Context

logger = logging.getLogger(__name__)

T = TypeVar("T")

_unbuildable: set[tuple[type, torch.device]] = set()
"""Whose kernels cannot be built where: classes of maskers and of cache layers, with a device."""

FEW_KEYS = 16
"""New keys of padded sequences that one program folds into their pages one after the other."""

MOST_AT_ONCE = 4096
"""Numbers of a token's keys that one program copies, at most."""


def in_place(
    masker: Masker,
    keys: torch.Tensor,
    values: torch.Tensor,
    have: int,
    padded: bool,
    context: Context,
) -> bool:
    """Whether ``append_in_place`` writes ``masker``'s side data of the keys from ``have`` on.

    Args:
        keys: ``[B, G, K, D]``; values: ``[B, G, K, Dv]``.
        padded: some keys are no real tokens; context: ``side`` holds what was prepared.
    """
    if not _may_launch(masker, keys, context) or keys.stride(3) != 1 or have == keys.shape[2]:
        return False
    selection = masker.described
    if isinstance(selection, Pages):
        return keys.shape[3] <= 256 and (not padded or keys.shape[2] - have <= FEW_KEYS)
    if not isinstance(selection, Estimated) or selection.estimate not in METHODS:
        return False
    if keys.dtype not in DTYPES or values.stride(3) != 1 or max(keys.shape[3], values.shape[3]) > 256:
        return False
    given = masker.given(context, keys.shape[3], keys.device)
    return not method_of(selection.estimate).why_not(given, keys.shape[3])


def from_device(
    masker: Masker, keys: torch.Tensor, values: torch.Tensor, buffers: dict[str, Any], context: Context
) -> bool:
    """Whether ``append_from_device`` writes ``masker``'s side data of a key of ``keys [B, G, K, D]``."""
    return bool(buffers) and in_place(masker, keys, values, keys.shape[2] - 1, True, context)


def _may_launch(masker: Masker, keys: torch.Tensor, context: Context) -> bool:
    """Whether ``context`` wants kernels, they run where ``keys`` are, and none of ``masker``'s failed to be built."""
    if context.kernel == "reference" or not runs_kernels(keys):
        return False
    return (type(masker), keys.device) not in _unbuildable


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels run where ``tensor`` is; in the interpreter, whose bfloat16 is wrong, only some."""
    return not no_kernels(tensor) and (tensor.is_cuda or tensor.dtype != torch.bfloat16)


def append_in_place(
    masker: Masker,
    buffers: dict[str, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    have: int,
    positions: torch.Tensor | None,
    context: Context,
) -> bool:
    """Write the side data of the keys from ``have`` on; False where ``"auto"`` finds that no kernel can be built here.

    Args:
        buffers: storages ``[B, heads, >= K or pages, ...]``; positions: int64 ``[B, K]``, None where all are real.
    """

    def run() -> bool:
        _write(masker, buffers, keys, values, (have, keys.shape[2]), positions, context)
        return True

    return attempt(masker, keys, context, run) or False


def attempt(masker: Masker, keys: torch.Tensor, context: Context, run: Callable[[], T]) -> T | None:
    """What ``run``, which launches kernels for ``masker``, returns; None where ``context`` wants none, or ``"auto"``
    finds that they cannot be built here: the log says so once."""
    if not _may_launch(masker, keys, context):
        return None
    what = f"side data of {type(masker).__name__} are written"
    return _built(type(masker), keys, what, run, fallback=context.kernel == "auto")


def _built(kind: type, keys: torch.Tensor, what: str, run: Callable[[], T], fallback: bool = True) -> T | None:
    """What ``run`` returns on the device of ``keys``; None, with a line in the log, where ``kind``'s kernels cannot be
    built there and PyTorch may be the ``fallback``."""
    try:
        with on_device(keys):
            return run()
    except Exception as error:
        if not fallback or not cannot_be_built(error):
            raise
        logger.warning("%s by PyTorch: %s", what, error)
        _unbuildable.add((kind, keys.device))
        return None


@torch.no_grad()
def append_from_device(
    masker: Masker,
    buffers: dict[str, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    span: torch.Tensor,
    positions: torch.Tensor,
    context: Context,
) -> None:
    """As ``append_in_place`` where the host does not know which keys are new: those of ``span``, int64 ``[2]``."""
    with on_device(keys):
        _write(masker, buffers, keys, values, span, positions, context)


def _write(
    masker: Masker,
    buffers: dict[str, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    span: Span,
    positions: torch.Tensor | None,
    context: Context,
) -> None:
    """Launch, on the current device, what writes ``masker``'s side data of the keys in ``span``."""
    selection = masker.described
    if isinstance(selection, Pages):
        have = span if isinstance(span, torch.Tensor) else span[0]
        fold(buffers["low"], buffers["high"], keys, have, positions, selection.size)
    elif isinstance(selection, Estimated):
        given = masker.given(context, keys.shape[3], keys.device)
        method_of(selection.estimate).append(buffers, keys, values, span, given)


def append_token(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    length: torch.Tensor | int,
) -> bool:
    """Write a token behind the first ``length`` of a cache's buffers; a length that is a tensor counts it.

    A token behind a full buffer is not written. False, with nothing done, where the kernel cannot be built.

    Args:
        keys: ``[B, G, capacity, D]``, values: ``[B, G, capacity, Dv]``, contiguous; length: a number, or int64, one
            element.
        new_keys: ``[B, G, 1, D]``, new_values: ``[B, G, 1, Dv]``, the last dimension contiguous.
    """
    batch, groups, capacity, dim = keys.shape
    kind = (batch, groups, dim, values.shape[3], keys.dtype, keys.device, type(length))
    numbers = (batch * groups, capacity, groups, *new_keys.stride()[:2], *new_values.stride()[:2])
    known = _token_launches.get(kind)
    if known is None:
        return _first_token(kind, (new_keys, new_values, keys, values, length, *numbers))
    programs, (run, function, metadata, constants) = known
    with on_device(keys):
        run(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(keys.device.index), function, metadata, None, None, None,
            new_keys.data_ptr(), new_values.data_ptr(), keys.data_ptr(), values.data_ptr(),
            length if isinstance(length, int) else length.data_ptr(), *numbers, *constants,
        )  # fmt: skip
        if programs > 1 and isinstance(length, torch.Tensor):
            length.add_(1)
    return True


def _first_token(kind: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    """``append_token`` where its kernel, whose arguments are ``given``, may have to be built."""
    _, _, keys, values, length, rows, *_ = given
    if (CacheLayerMixin, keys.device) in _unbuildable:
        return False
    dim, wide = keys.shape[3], values.shape[3]
    tile = max(1, min(power_of_2(rows), MOST_AT_ONCE // power_of_2(max(dim, wide))))
    programs, point = -(-rows // tile), isinstance(length, torch.Tensor)
    constants = {
        "D": dim, "DV": wide, "BD": power_of_2(dim), "BV": power_of_2(wide), "BR": tile, "POINT": point,
        "ALONE": programs == 1,
    }  # fmt: skip

    def run() -> bool:
        from sah_transformers.kernels.append_token import append_token_kernel

        entry = built(append_token_kernel, (programs, 1, 1), given, constants, warps=4)
        if entry is not None:
            _token_launches[kind] = programs, entry
        if programs > 1 and point:
            length.add_(1)
        return True

    return _built(CacheLayerMixin, keys, "tokens are appended to caches", run) or False


_token_launches: dict[tuple[Any, ...], tuple[int, tuple[Any, ...]]] = {}
"""Programs and what ``built`` gives, for tokens of one kind."""


def follow(length: torch.Tensor, span: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, new: int) -> None:
    """Take up the keys of a cache that is filled up to ``length``, of which the last ``new`` came with this call.

    Args:
        length: int64, one element; span: of `StaticState`; positions: int64 ``[B, capacity]``.
        real: bool ``[B, K]``, which keys are real tokens.
    """
    from sah_transformers.kernels.approximate.follow import follow_kernel

    batch = real.shape[0]
    with on_device(positions):
        Direct()(
            follow_kernel, (1, 1, 1), length, span, positions, real, new, batch, positions.stride(0), *real.stride(),
            BB=power_of_2(batch), warps=1,
        )  # fmt: skip


def fold(
    low: torch.Tensor,
    high: torch.Tensor,
    keys: torch.Tensor,
    have: int | torch.Tensor,
    positions: torch.Tensor | None,
    page: int,
) -> None:
    """Fold the keys from ``have`` on, or of a span on the device, into their pages' bounds, ``[B, G, pages, D]``."""
    from sah_transformers.kernels.approximate.fold import fold_keys_kernel, fold_pages_kernel

    launch = Direct()
    batch, groups, total, dim = keys.shape
    strides = keys.stride()[:3]
    unit = 8 if not any(s % 8 for s in (*strides, dim)) else 1
    steps = [s // unit for s in strides]
    common: dict[str, Any] = {"G": groups, "D": dim, "BD": power_of_2(dim), "UNIT": unit, "PAGE": page}
    warps = max(1, min(4, power_of_2(page) * power_of_2(dim) // 2048))
    if positions is None:
        assert isinstance(have, int)
        pages = -(-total // page) - have // page
        launch(
            fold_pages_kernel, (pages, batch * groups, 1), keys, low, high, have, total, low.shape[2], *steps,
            **common, WIDE=power_of_2(page), warps=warps,
        )  # fmt: skip
        return
    launch(
        fold_keys_kernel, (batch * groups, 1, 1), keys, low, high, positions, have, total, low.shape[2], *steps,
        positions.stride(0), **common, POINT=isinstance(have, torch.Tensor),
    )  # fmt: skip
