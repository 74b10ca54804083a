"""What sparse attention keeps, over the budget, several methods in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXT_PANELS = {
    "recall": "recall of the softmax mass",
    "kl": "KL(dense || sparse), nats",
    "agreement": "same likeliest token as dense",
}
NEEDLE_PANELS = {
    "share": "numbers found",
    "needle_recall": "recall on the needle's keys",
    "recall": "recall of the softmax mass",
}
"""Figure of a row -> label of its panel."""

LOGARITHMIC = ("kl",)


def draw(rows: Sequence[dict[str, Any]], panels: dict[str, str], title: str, out: Path) -> None:
    """Write the picture of summary ``rows``: a panel per figure (and task and setup), a line per stack.

    A stack without a budget is a dashed level.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(map(_group, rows)))
    wide = len(groups) == 1
    shape = (1, len(panels)) if wide else (len(panels), len(groups))
    figure, grid = pyplot.subplots(
        *shape,
        figsize=(5.5 * shape[1], 1 + 4 * shape[0]),
        squeeze=False,
        layout="constrained",
        sharey=not wide and "row",
    )
    for i, name in enumerate(panels):
        for j, group in enumerate(groups):
            axes = grid[0][i] if wide else grid[i][j]
            _panel(axes, [row for row in rows if _group(row) == group], name)
            axes.set(title=group, ylabel=panels[name] if j == 0 else "")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """One figure of the rows over their budgets."""
    for number, stack in enumerate(dict.fromkeys(row["stack"] for row in rows)):
        points = [(row["budget"], row[name]) for row in rows if row["stack"] == stack and row[name] is not None]
        again, colour = divmod(number, 10)  # ten colours, then the same with other lines
        look: dict[str, Any] = {"color": f"C{colour}", "label": stack}
        if points and points[0][0] is None:
            axes.axhline(points[0][1], linestyle=":" if again else "--", **look)
        else:
            axes.plot(*zip(*points, strict=True) if points else ([], []), "s-." if again else "o-", **look)
    axes.set_xscale("log")
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.xaxis.set_minor_formatter("")
    if name in LOGARITHMIC:
        axes.set_yscale("log")
    if name == "share":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("budget (share of the visible keys)")
    axes.grid(alpha=0.3)


def _group(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in ("task", "setup") if name in row)
