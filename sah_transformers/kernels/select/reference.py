"""The definition of top-k and top-p selection, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sah_transformers.budget import check_number

REACHED = 1e-6
"""A cumulative share this close below ``top_p`` counts as reached."""

LOWEST = float("-inf")

MOST_CLOSE = 64
"""Estimates per undecided row that are computed exactly one by one."""

TINY = 1e-30
"""Mass below this has lost precision in float32."""


def select_top_k(
    estimates: torch.Tensor,
    candidates: torch.Tensor | None,
    budget: torch.Tensor,
    most: int,
    margin: torch.Tensor | None = None,
    exact: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The ``budget`` best candidates of each row, lower position first among equals.

    Args:
        estimates: ``[..., K]``; NaN ranks below everything.
        candidates: bool, broadcastable to ``estimates``, or None for all.
        budget: int64 ``[..., 1]``, broadcastable; fewer candidates than that are all taken.
        most: upper bound of ``budget`` known to the host, 1 <= most.
        margin: ``[..., 1]``, twice the error of an estimate. Given, a row whose cut falls among estimates closer
            than that is reported undecided; without it every row is decided on the estimates as they are.
        exact: gives the exact estimates ``[n]`` at the positions ``[n, dims]``, as if rounded once to float32; rows
            with few estimates close to the cut are then decided by those.

    Returns:
        (selected, undecided): bool ``[..., K]``, and bool ``[...]`` or None when no row is undecided.
    """
    size = estimates.shape[-1]
    most = min(most, size)
    if candidates is not None:
        estimates = estimates.masked_fill(~candidates, LOWEST)
    peak, cut, following = _around_cut(estimates, budget, most, margin is not None)
    broken = ~peak.isfinite() & (peak != LOWEST)  # beyond float32; NaN counts as best so far
    if bool(broken.any()):
        estimates = estimates.nan_to_num(nan=LOWEST, posinf=float("inf"), neginf=LOWEST)
        _, cut, following = _around_cut(estimates, budget, most, margin is not None)
    if margin is not None:
        edge = torch.where(cut == LOWEST, cut, cut - margin)
        selected = estimates >= edge
        if candidates is not None and bool((edge == LOWEST).any()):  # fewer candidates than the budget
            selected &= candidates
        undecided = ((following >= edge) & (following > LOWEST)) | broken
        if not bool(undecided.any()):
            return selected, None
        if exact is not None:
            undecided = _decide_close(estimates, selected, undecided, cut, margin, budget, exact)
        return selected, undecided.squeeze(-1) if bool(undecided.any()) else None
    above = estimates > cut
    equal = estimates == cut
    if candidates is not None:
        equal &= candidates
    room = budget - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room)), None


def _around_cut(
    estimates: torch.Tensor, budget: torch.Tensor, most: int, after: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row, ``[..., 1]``: the best estimate (NaN first), the ``budget``-th; ``after`` it, the next (or -inf)."""
    size = estimates.shape[-1]
    if budget.numel() == 1 and estimates.device.type == "cpu" and estimates.dtype == torch.float32:
        place = size - min(int(budget), most)
        ordered = torch.from_numpy(np.partition(estimates.detach().numpy(), place, axis=-1))  # 5 x as fast as topk
        best, cut = ordered[..., place:].amax(-1, keepdim=True), ordered[..., place : place + 1]
        following = ordered[..., :place].amax(-1, keepdim=True) if after and place else torch.full_like(cut, LOWEST)
        return best, cut, following
    best = torch.topk(estimates, min(most + after, size), dim=-1).values
    index = budget.clamp(max=most).expand(*best.shape[:-1], 1)
    following = best.gather(-1, index.clamp(max=best.shape[-1] - 1)).masked_fill(index >= best.shape[-1], LOWEST)
    return best[..., :1], best.gather(-1, index - 1), following


def _decide_close(
    estimates: torch.Tensor,
    selected: torch.Tensor,
    undecided: torch.Tensor,
    cut: torch.Tensor,
    margin: torch.Tensor,
    budget: torch.Tensor,
    exact: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Decide undecided rows by the exact estimates of the keys close to their cut, in ``selected``.

    Returns:
        The rows that are still undecided, bool ``[..., 1]``.
    """
    high = cut + margin
    sure = estimates > high
    close = (estimates >= cut - margin) & ~sure & undecided
    few = undecided & high.isfinite() & (close.sum(-1, keepdim=True) <= MOST_CLOSE)
    index = (close & few).nonzero()
    rows = index[:, :-1].unbind(-1)
    row = torch.arange(few.numel(), device=few.device).view(few.shape[:-1])[rows]
    ranked = exact(index).sort(descending=True, stable=True).indices
    ranked = ranked[row[ranked].sort(stable=True).indices]  # by row, best first, lower position first
    index, row = index[ranked], row[ranked]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    room = (budget - sure.sum(-1, keepdim=True)).expand_as(few).flatten()[row]
    selected[few.expand_as(selected) & ~sure] = False
    selected[index[place < room].unbind(-1)] = True
    return undecided & ~few


def top_p_thresholds(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weight down to which each row must keep its weights to hold a share of at least ``top_p``.

    Sorted in descending order, the threshold is the weight at the first position whose cumulative share of the
    row's total is at least ``top_p`` (within 1e-6); everything ``>= threshold`` is kept, so ties are in. 0 keeps the
    best weight, 1.0 every weight.

    Args:
        weights: ``[..., n]``, non-negative, of any floating dtype.
        top_p: a float in [0, 1].

    Returns:
        ``[..., 1]`` in the dtype of ``weights``; inf where n is 0.

    Raises:
        ValueError: for a ``top_p`` that is no float in [0, 1].

    Example:
        >>> top_p_thresholds(torch.tensor([0.1, 0.3, 0.2, 0.4, 0.1]), 0.8)
        tensor([0.2000])
    """
    check_top_p(top_p)
    if weights.shape[-1] == 0:
        return weights.new_full((*weights.shape[:-1], 1), float("inf"))
    held = torch.zeros((), dtype=torch.float64, device=weights.device)
    return _thresholds(weights, top_p, held)[0]


def check_top_p(top_p: object) -> None:
    """Raise ``ValueError`` unless ``top_p`` is a float in [0, 1]."""
    check_number("top_p", top_p, "in range [0, 1] (a float)")
    if not isinstance(top_p, float) or not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p must be in range [0, 1] (a float), got {top_p!r}")


def select_top_p(
    weights: torch.Tensor,
    candidates: torch.Tensor | None,
    top_p: float,
    held: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The fewest best candidates that hold a share ``top_p`` of each row's mass.

    Args:
        weights: ``[..., K]`` non-negative mass of each key; only candidates' count.
        candidates: bool, broadcastable to ``weights``, or None for all.
        top_p: a float in [0, 1].
        held: ``[..., 1]`` mass that is already held and counts first, or None for none (then shares are of the
            candidates' mass alone). A row that holds ``top_p`` > 0 already takes nothing.
        margin: ``[..., 1]`` relative error of a weight, as in ``select_top_k``.

    Returns:
        (selected, undecided), as ``select_top_k``. Weights are compared after one rounding to float32.
    """
    if top_p == 1.0:
        every = torch.ones_like(weights, dtype=torch.bool)
        return (every if candidates is None else every & candidates), None
    if candidates is not None:
        weights = weights.masked_fill(~candidates, 0.0)
    if weights.shape[-1] == 0:
        return torch.zeros_like(weights, dtype=torch.bool), None
    weights = weights.nan_to_num(nan=0.0)
    before = torch.zeros((), device=weights.device) if held is None else held
    threshold, slack, nothing = _thresholds(weights, top_p, before.double())
    rounded = weights.float()
    low = threshold.float().masked_fill(nothing, float("inf"))
    if margin is not None:
        close = (rounded >= low * (1 - 2 * margin)) & (rounded <= low * (1 + 2 * margin))
        undecided = (close.sum(-1, keepdim=True) > 1) | (slack <= 4 * margin)
    selected = rounded >= low
    if candidates is not None:
        selected &= candidates
    if margin is not None and bool(undecided.any()):
        return selected, undecided.expand(*weights.shape[:-1], 1).squeeze(-1)
    return selected, None


def _descending(weights: torch.Tensor) -> torch.Tensor:
    """``weights [..., K]`` sorted, NaN first."""
    if weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.float64) and not weights.requires_grad:
        return torch.from_numpy(np.sort(weights.numpy(), axis=-1)).flip(-1)  # 20 x as fast as sort
    return weights.sort(dim=-1, descending=True).values


def _thresholds(
    weights: torch.Tensor, top_p: float, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row, ``[..., 1]``: the threshold, how close its decision was (a share of the mass), and whether the row
    holds enough already. A row whose mass is all zero has the threshold 0: every weight ties."""
    ordered = _descending(weights)
    mass = ordered.cumsum(-1, dtype=torch.float64)
    total = mass[..., -1:] + held
    nothing = torch.zeros_like(total, dtype=torch.bool)
    if top_p == 1.0:
        return ordered[..., -1:], torch.ones_like(total), nothing
    target = top_p - REACHED
    share = (mass + held) / total
    position = (share < target).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)
    threshold = ordered.gather(-1, position)
    slack = (share - target).abs().amin(-1, keepdim=True)
    if top_p > 0:
        start = held / total
        nothing = (start >= target) & (held > 0)
        slack = torch.minimum(slack, torch.where(held > 0, (start - target).abs(), 1.0))
    slack = slack.masked_fill(total - held < TINY, 0.0)
    return threshold, slack, nothing
