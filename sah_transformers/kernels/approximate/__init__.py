"""Attention of few queries over what side data select: pages by their bounds, keys by estimated scores.

Contract: ``attend(call)`` equals ``attention.run(call)[0]`` for every call that ``why_not`` has nothing against, up to
the rounding of scores: exactly the budgeted number of pages or keys, of equal ones the lower, the same bits in every
run. Shapes, dtypes and limits are those of `kernels.decode`; the stack is first and last keys, then one
`selections.Pages` or `selections.Estimated`. Keys are read only where they are selected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sah_transformers.kernels.approximate.methods import method_of
from sah_transformers.kernels.approximate.stack import SideStack, read_side_stack
from sah_transformers.kernels.decode import inputs_of, unfit
from sah_transformers.kernels.device import on_device
from sah_transformers.selections import Estimated, Pages

if TYPE_CHECKING:
    from sah_transformers.attention import Call

MOST_PAGES = 2**15

__all__ = ["attend", "by_side_data", "why_not"]


def by_side_data(call: Call) -> bool:
    """Whether the call's last masker selects by side data, as these kernels do."""
    return bool(call.described) and isinstance(call.described[-1], Pages | Estimated)


def why_not(call: Call) -> str:
    """Why these kernels cannot take ``call``, or "" when they can."""
    reason = unfit(call)
    if reason:
        return reason
    stack = stack_of(call)
    if isinstance(stack, str):
        return stack
    if isinstance(stack.selection, Pages):
        return _why_not_pages(call.side[-1]["low"])
    return method_of(stack.selection.estimate).why_not(given_to(call), call.keys.shape[3])


def _why_not_pages(low: torch.Tensor) -> str:
    """Why pages with the bounds ``low [B, G, pages, D]`` cannot be selected, or ""."""
    _, groups, pages, dim = low.shape
    if pages > MOST_PAGES:
        return f"there are more than {MOST_PAGES} pages"
    *outer, place, word = low.stride()
    return "" if word == 1 and place == dim and outer[0] == groups * outer[1] else "the page bounds are not contiguous"


def stack_of(call: Call) -> SideStack | str:
    """The call's stack in these kernels' words, or why there is none."""
    return call.described.read(read_side_stack)


def given_to(call: Call) -> Any:
    """What the kernels of the call's last masker need beside its side data."""
    context = call.context.but(side=call.side[-1])
    return call.maskers[-1].given(context, call.keys.shape[3], call.keys.device)


def attend(call: Call) -> torch.Tensor:
    """Attention of a call that ``why_not`` has nothing against, ``[B, Q, H, Dv]``."""
    from sah_transformers.kernels.approximate.pipeline import attend_rows

    stack, context, masker = stack_of(call), call.context, call.maskers[-1]
    assert not isinstance(stack, str)
    inputs = inputs_of(call, stack.stack)
    if context.padded and inputs.mask is None:  # rows that see the padding too: pages do not count it
        inputs = replace(inputs, mask=torch.ones(1, 1, call.shape[3], dtype=torch.bool, device=call.keys.device))
    side, given = call.side[-1], None
    if isinstance(stack.selection, Estimated):
        once = (*masker.prepared, "ready")
        side, given = {name: t for name, t in side.items() if name not in once}, given_to(call)
    with on_device(call.queries):
        return attend_rows(inputs, stack.selection, side, given, context.positions)
