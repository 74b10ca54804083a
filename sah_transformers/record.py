"""Seeing what happened: density, recall, output error and time of every attention call of a model."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sah_transformers.attention import Call, run
from sah_transformers.kernels.masked_attention import masked_attention
from sah_transformers.mask import Mask

METRICS = ("density", "keys_per_row", "recall", "output_error", "latency_ms")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Entry:
    """One attention call of one layer.

    Attributes:
        layer: layer index.
        call: number of the call within the recording, per layer.
        phase: ``"prefill"`` (reads a prompt) or ``"decode"``.
        maskers: the stack, ``"dense"`` where the call was dense.
        queries, keys: Q and K of the call.
        density: share of the visible keys that were active, over all rows.
        keys_per_row: mean number of active keys of a row.
        recall: dense softmax mass that the active keys hold, mean over rows.
        output_error: ``|out - dense| / |dense|`` over the call's whole output.
        latency_ms: wall time of the call's selection and attention, without the measuring.
        side_bytes_per_key: side data that the maskers keep, bytes per key of one sequence.
    """

    layer: int
    call: int
    phase: str
    maskers: str
    queries: int
    keys: int
    density: float
    keys_per_row: float
    recall: float
    output_error: float
    latency_ms: float
    side_bytes_per_key: float = 0.0


class Log:
    """What ``record`` collected.

    Attributes:
        entries: one ``Entry`` per layer and call, in order.
        masks: per layer that was asked for, the mask of each sparse call.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.masks: dict[int, list[Mask]] = {}

    def mean(self, metric: str, phase: str | None = None, layer: int | None = None) -> float:
        """Mean of a metric over the sparse calls of a phase and layer (None = all); nan where all were dense.

        Raises:
            ValueError: for an unknown metric or phase.
        """
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if phase not in (None, *PHASES):
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, or None, got {phase!r}")
        chosen = [
            getattr(entry, metric)
            for entry in self.entries
            if entry.maskers != "dense" and phase in (None, entry.phase) and layer in (None, entry.layer)
        ]
        return sum(chosen) / len(chosen) if chosen else float("nan")

    def rows(self) -> list[dict[str, Any]]:
        """One dict per entry."""
        return [dataclasses.asdict(entry) for entry in self.entries]

    def to_json(self, path: str | Path | None = None) -> str:
        """The entries as JSON; also written to ``path`` if given."""
        text = json.dumps(self.rows(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_pandas(self) -> Any:
        """The entries as a ``pandas.DataFrame``.

        Raises:
            ImportError: saying how to install pandas.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install 'sah-transformers[plot]'") from None
        return pandas.DataFrame(self.rows(), columns=[f.name for f in dataclasses.fields(Entry)])

    def table(self) -> Any:
        """A ``rich`` table: one line per phase and layer, means over the calls."""
        from rich.table import Table

        table = Table(title="attention calls, means per layer")
        for column in ("phase", "layer", "maskers", "calls", "density", "keys/row", "recall", "error", "ms"):
            table.add_column(column, justify="left" if column in ("phase", "maskers") else "right")
        for (phase, layer, maskers), group in self._groups().items():
            means = [sum(getattr(entry, metric) for entry in group) / len(group) for metric in METRICS]
            density, keys, recall, error, latency = means
            cells = [f"{density:.3f}", f"{keys:.0f}", f"{recall:.4f}", f"{error:.4f}", f"{latency:.2f}"]
            table.add_row(phase, str(layer), maskers, str(len(group)), *cells)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def _groups(self) -> dict[tuple[str, int, str], list[Entry]]:
        groups: dict[tuple[str, int, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.phase, entry.layer, entry.maskers), []).append(entry)
        return dict(sorted(groups.items(), key=lambda item: (item[0][0] == "decode", item[0][1])))


class Recorder:
    """Receives the calls of a model's attention modules; see ``record``."""

    def __init__(self, log: Log, masks: Collection[int], decode_max_queries: int):
        self.log, self.masks, self.decode_max_queries = log, masks, decode_max_queries
        self.calls: Counter[int] = Counter()

    def sparse(
        self, layer_idx: int, make: Callable[[], Call], side_bytes: Callable[[], float], weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a sparse call, timed, then measure it apart."""
        start = _now()
        call = make()
        out = run(call, return_weights=weights)
        latency = _now() - start
        keep = layer_idx in self.masks
        measured, mask = measure(call, keep)
        if mask is not None:
            self.log.masks.setdefault(layer_idx, []).append(mask)
        maskers = " + ".join(masker.config.type for masker in call.maskers)
        self._add(layer_idx, maskers, call.shape[2], call.shape[3], latency, measured, side_bytes())
        return out

    def dense(self, layer_idx: int, queries: int, keys: int, attend: Callable[[], Any]) -> Any:
        """Run a dense call, timed."""
        start = _now()
        out = attend()
        mean_keys = keys - (queries - 1) / 2
        self._add(layer_idx, "dense", queries, keys, _now() - start, (1.0, mean_keys, 1.0, 0.0), 0.0)
        return out

    def _add(
        self,
        layer_idx: int,
        maskers: str,
        queries: int,
        keys: int,
        seconds: float,
        measured: tuple[float, float, float, float],
        side_bytes: float,
    ) -> None:
        prompt = keys == queries or queries > self.decode_max_queries
        self.log.entries.append(
            Entry(
                layer_idx,
                self.calls[layer_idx],
                "prefill" if prompt else "decode",
                maskers,
                queries,
                keys,
                *measured,
                latency_ms=seconds * 1e3,
                side_bytes_per_key=side_bytes,
            )
        )
        self.calls[layer_idx] += 1


@torch.no_grad()
def measure(call: Call, keep_mask: bool = False) -> tuple[tuple[float, float, float, float], Mask | None]:
    """Compare a call with dense attention over the same visible keys.

    Returns:
        ((density, keys per row, recall, output error), the call's mask on the CPU if it is to be kept).
    """
    sums = torch.zeros(6, dtype=torch.float64)  # visible, active, recall, rows, |out - dense|², |dense|²
    kept = torch.zeros(call.shape, dtype=torch.bool) if keep_mask else None
    for start, stop in call.blocks():
        rows = call.rows(start, stop, call.queries[:, :, start:stop], call.keys, call.values)
        scores, mask = rows.scores(), call.select(rows, start, stop)
        everything = Mask.create_full_mask(rows.shape, device=rows.keys.device)
        sinks = call.block_sinks(start, stop)
        out, _ = masked_attention(scores, rows.values, mask, rows.visible, sinks)
        dense, weights = masked_attention(scores, rows.values, everything, rows.visible, sinks)
        active = mask.active() if rows.visible is None else mask.active() & rows.visible
        counts = rows.counts.expand(*rows.shape[:3], 1)
        seen = counts.squeeze(-1) > 0
        mass = weights.sum(-1)
        held = (weights * active).sum(-1) / mass.masked_fill(mass == 0, 1.0)
        parts = [counts.sum(), active.sum(), held[seen].sum(), seen.sum()]
        parts += [(out - dense).square().sum(), dense.square().sum()]
        sums += torch.stack([part.double().cpu() for part in parts])
        if kept is not None:
            kept[:, :, start:stop, : active.shape[-1]] = active.cpu()
    visible, active_keys, recall, count, difference, norm = sums.tolist()
    metrics = (
        active_keys / max(visible, 1.0),
        active_keys / max(count, 1.0),
        recall / max(count, 1.0),
        (difference / norm) ** 0.5 if norm else 0.0,
    )
    return metrics, None if kept is None else Mask.from_dense_unchecked(kept)


@contextmanager
def record(model: torch.nn.Module, masks: Collection[int] = ()) -> Iterator[Log]:
    """Collect what every attention call of ``model`` selects and loses, without changing its results.

    Each sparse call is compared with dense attention, so a recorded run takes several times as long.

    Args:
        model: a model with sparse attention.
        masks: layers whose masks are kept in ``log.masks`` (memory quadratic in the length).

    Yields:
        The ``Log``.

    Raises:
        ValueError: when the model has no attention layer to record, or attends densely (nothing was enabled).

    Example:
        >>> with record(model) as log:
        ...     model.generate(**inputs)
        >>> print(log)
    """
    from sah_transformers.integration.config_property import is_sparse
    from sah_transformers.integration.models import attention_modules
    from sah_transformers.integration.plan import plan_of

    modules = [module for _, module in attention_modules(model)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention layer that sah_transformers can record")
    if not any(is_sparse(module.config) for module in modules):
        raise ValueError(
            f"{type(model).__name__} attends densely, there is nothing to record: "
            "sah_transformers.enable(model, ...) first (maskers [] measures dense attention itself)"
        )
    log = Log()
    recorder = Recorder(log, masks, plan_of(modules[0]).decode_max_queries)
    with attached(modules, recorder):
        yield log


@contextmanager
def attached(modules: Sequence[Any], recorder: Any) -> Iterator[None]:
    """Let the attention ``modules`` run their calls through ``recorder``, which has ``Recorder``'s methods."""
    before = [module.__dict__.get("_sah_recorder") for module in modules]
    for module in modules:
        module.__dict__["_sah_recorder"] = recorder
    try:
        yield
    finally:
        for module, previous in zip(modules, before, strict=True):
            if previous is None:
                module.__dict__.pop("_sah_recorder", None)
            else:
                module.__dict__["_sah_recorder"] = previous


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
