"""Time over the number of keys, ours against dense attention, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sah_transformers.bench.run import Result
from sah_transformers.bench.timing import Times


def draw(results: Sequence[Result], device: str, out: Path) -> None:
    """Write the picture of measured ``results``, one for each number of keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    case = results[0].case
    sides: list[tuple[str, str, list[Times | None]]] = [
        (case.name, "o-", [one.ours for one in results]),
        ("dense (the best SDPA backend)", "s--", [one.dense[one.best_dense or ""] for one in results]),
    ]
    keys = [one.case.K for one in results]
    for name, style, times in sides:
        (line,) = axes.plot(keys, [t.p50 for t in times if t], style, label=name)
        low, high = ([getattr(t, q) for t in times if t] for q in ("p20", "p80"))
        axes.fill_between(keys, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(keys, [f"{k // 1024}K" if k < 2**20 else f"{k // 2**20}M" for k in keys])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.set(
        title=f"one decode call, {device}\nB={case.B}, H={case.H}, G={case.G}, D={case.D}, {case.dtype}",
        xlabel="keys in the cache",
        ylabel="ms (p50; band p20 to p80)",
    )
    axes.legend()
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
