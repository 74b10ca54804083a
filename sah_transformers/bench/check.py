"""Is the operation right? Each is checked before it is timed, against the reference or the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sah_transformers.attention import Call, run
from sah_transformers.bench.inputs import Tensors, call_of, maskers_of, tensors, visible
from sah_transformers.bench.suites import Case
from sah_transformers.budget import resolve_budget
from sah_transformers.kernels import decode
from sah_transformers.mask import Mask
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.rows import SCORE_EPS
from sah_transformers.selections import Best, First, Last

WHOLE = 2**28
"""Scores up to which all rows are compared; beyond, ``ROWS`` of them at ``PLACES`` places."""
ROWS, PLACES = 64, 4

MOST_ERROR = 1e-2
"""Relative error of the whole output on the data that is timed, which are peaked: the selection is looked at apart."""

ROUNDING = {"bfloat16": 6e-3, "float16": 1e-3, "float32": 3e-5}
"""Relative error of a row whose keys are the reference's."""

FLAT = 0.1
"""Scale of the queries that make weights nearly equal: one wrong key among thousands shows in its row."""

NEAR_TIES = 0.01
"""Share of rows in which two scores may be closer than their rounding, so that the cut may fall otherwise."""

MOST_OFF = 2
"""Keys by which a row of a top-p may differ: its sums are rounded."""


class CheckFailed(Exception):
    """The operation does not compute what it should."""


@dataclass(frozen=True)
class Checked:
    """What a passed check found.

    Attributes:
        error: largest relative error.
        rows: rows that were compared.
        apart: rows that differ by about one key, at a near-tie.
        kept: mean number of keys of a row.
    """

    error: float
    rows: int
    apart: int
    kept: float


def check_attention(case: Case, inputs: Tensors, call: Call, out: torch.Tensor) -> Checked:
    """Compare ``out`` of ``call`` on ``inputs`` with the reference, then its selection where weights are nearly equal.

    Raises:
        CheckFailed: saying what differs.
    """
    if not torch.equal(out, run(call)[0]):
        raise CheckFailed("two runs differ")
    counted = _counted(call)
    error, kept = 0.0, 0.0
    for start, stop in places(case):
        whole = replace(call, kernel="reference")  # of a step with the side data that it has
        part = whole if case.op == "layer_step" else call_of(case, inputs, "reference", start, stop)
        truth, counts = reference(part)
        error = max(error, _relative(out[:, start:stop], truth, dims=None).item())
        kept = counts.float().mean().item()
        if counted is not None:
            off = int((counted[:, start:stop] - counts).abs().max())
            if off > MOST_OFF:
                raise CheckFailed(f"a row has {off} keys more or fewer than in the reference")
    if not error <= MOST_ERROR:
        raise CheckFailed(f"relative error {error:.1e}, more than {MOST_ERROR:.0e}")
    if counted is not None:
        _check_budgets(call, counted)
    rows, apart = check_rows(case, call.kernel, inputs[0].device.type)
    return Checked(error, rows, apart, kept)


def places(case: Case) -> list[tuple[int, int]]:
    """The rows that are compared, as ranges."""
    if case.B * case.H * case.Q * case.K <= WHOLE:
        return [(0, case.Q)]
    last = case.Q - ROWS
    return [(last * i // (PLACES - 1), last * i // (PLACES - 1) + ROWS) for i in range(PLACES)]


def reference(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(out ``[B, q, H, D]``, keys of each row ``[B, q, H]``) of a call to the reference."""
    masks: list[Mask] = []
    truth, _ = run(call, masks=masks)
    return truth, torch.cat([mask.active().sum(-1) for mask in masks], dim=2).transpose(1, 2)


def _relative(out: torch.Tensor, truth: torch.Tensor, dims: int | None) -> torch.Tensor:
    difference = torch.linalg.vector_norm(out.double() - truth.double(), dim=dims)
    return difference / torch.linalg.vector_norm(truth.double(), dim=dims)


def check_rows(case: Case, kernel: str, device: str) -> tuple[int, int]:
    """(rows compared, rows apart) on flat data.

    One other key moves a row of n keys by about ``sqrt(2 / n)`` of its length. Windows select exactly; a top-k may
    differ by a key in few rows, at near-ties; a sum of weights (top-p, top-k per KV head) is rounded in every row.

    Raises:
        CheckFailed: saying what differs.
    """
    inputs = tensors(case, device, FLAT, seed=2)
    out = run(call_of(case, inputs, kernel))[0]
    selections = [masker.describe() for masker in maskers_of(case)]
    exact = all(isinstance(one, First | Last) for one in selections)
    summed = not exact and not any(isinstance(one, Best) and not one.group for one in selections)
    rows = apart = 0
    for start, stop in places(case):
        truth, counts = reference(call_of(case, inputs, "reference", start, stop))
        error = _relative(out[:, start:stop], truth, dims=-1)
        rounding = ROUNDING[case.dtype]
        limit = rounding + (0.0 if exact else (8 / counts.double()).sqrt())
        if not bool((error <= limit).all()):
            worst = (error - limit).nan_to_num(nan=float("inf")).argmax()
            got, n = error.flatten()[worst].item(), counts.flatten()[worst].item()
            raise CheckFailed(f"the selection differs: a row of {n} keys is off by {got:.1e} where weights are equal")
        rows += error.numel()
        apart += int((error > rounding).sum())
    if not summed and apart > max(2, NEAR_TIES * rows):
        raise CheckFailed(f"the selection differs in {apart} of {rows} rows")
    return rows, apart


def _counted(call: Call) -> torch.Tensor | None:
    """How many keys each row of a long prefill attends to, as the kernels themselves count, ``[B, Q, H]``."""
    batch, heads, rows, _ = call.shape
    if call.kernel != "triton" or rows <= decode.MOST_QUERIES:
        return None
    from sah_transformers.kernels.prefill import prefill

    counts = torch.full((batch, heads, rows), -1, dtype=torch.int32, device=call.queries.device)
    prefill(call, counts)
    return counts.transpose(1, 2)


def _check_budgets(call: Call, counted: torch.Tensor) -> None:
    """Every row has exactly its budget, where that does not depend on the scores."""
    bands, best = 0, None
    for selection in call.described:
        if isinstance(selection, Best) and best is None:
            best = selection
        elif isinstance(selection, First | Last) and isinstance(selection.size, int) and best is None:
            bands += selection.size
        else:
            return
    _, _, rows, keys = call.shape
    n = torch.arange(keys - rows + 1, keys + 1, device=counted.device)
    expected = n.clamp(max=bands)
    if best is not None:
        expected = expected + torch.minimum(n - expected, resolve_budget(best.budget, n))
    wrong = int((counted != expected[:, None]).sum())
    if wrong:
        raise CheckFailed(f"{wrong} of {counted.numel()} rows have another number of keys than their budget")


def check_mask(case: Case, inputs: Tensors, previous: Mask | None, mask: Mask) -> Checked:
    """Hold ``mask`` against the definition of top-k, in float64.

    Each row has what it had before and exactly its budget of new visible keys, and none that is left out scores more
    than one that is taken, but for the rounding of a float32 dot product.

    Raises:
        CheckFailed: saying what differs.
    """
    selection = MaskerRegistry.create_masker(case.maskers[-1]).describe()
    if not isinstance(selection, Best) or selection.group:
        raise CheckFailed("only top-k per query head can be checked")
    q, k, _ = inputs
    seen = visible(case, q.device.type)
    n = seen.sum(-1)
    active = mask.active()
    kept, apart, worst = 0, 0, 0.0
    for b in range(case.B):
        had = seen.new_zeros(case.H, case.Q, case.K) if previous is None else previous.active()[b]
        keys = k[b].double().repeat_interleave(case.H // case.G, 0)
        scores = q[b].double() @ keys.transpose(1, 2) * case.D**-0.5  # [H, Q, K]
        if bool((had & ~active[b]).any()) or bool((active[b] & ~seen & ~had).any()):
            raise CheckFailed("keys were lost, or hidden keys selected")
        candidates, taken = seen & ~had, active[b] & ~had
        wanted = torch.minimum(resolve_budget(selection.budget, n), candidates.sum(-1))
        if not torch.equal(taken.sum(-1), wanted):
            raise CheckFailed(f"{int((taken.sum(-1) != wanted).sum())} rows have not exactly their budget of new keys")
        lowest = scores.masked_fill(~taken, float("inf")).amin(-1)
        highest = scores.masked_fill(~(candidates & ~taken), float("-inf")).amax(-1)
        gap = (highest - lowest) / scores.abs().amax(-1)
        worst = max(worst, gap.clamp(min=0).max().item())
        apart += int((gap > 0).sum())
        kept += int(active[b].sum())
    if not worst <= SCORE_EPS:
        raise CheckFailed(f"a key was left out that scores {worst:.1e} of the scale more than one that was taken")
    rows = case.B * case.H * case.Q
    return Checked(worst, rows, apart, kept / rows)
