"""``sah show``: the mask of one head and what each layer keeps, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sah_transformers.cli.models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, SPARSE_HELP

MOST_PIXELS = 1024
"""Longer masks are averaged down to about this many pixels a side."""

MOST_MASK_BYTES = 2**31


def show(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str | None, typer.Argument(help="The text; or use --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    sparse: Annotated[str, typer.Option(help=SPARSE_HELP)] = "oracle_top_k",
    prefill: Annotated[str | None, typer.Option(help="'same' or 'dense': how the prompt is read.")] = None,
    layer: Annotated[int, typer.Option(help="The layer whose mask is drawn; negative from the end.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="The query head whose mask is drawn.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the text.")] = 16,
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.")] = Path("mask.png"),
    chat: Annotated[bool, typer.Option("--chat/--raw", help="With the model's chat template or not.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Draw one head's mask, and density, recall and output error by layer and step."""
    from sah_transformers.cli import models, run
    from sah_transformers.cli.presets import stack_in_words
    from sah_transformers.cli.screen import WrongUse, console, spinner
    from sah_transformers.integration import supported
    from sah_transformers.record import record

    _need_matplotlib()
    if (prompt is None) == (text is None):
        raise WrongUse("give the text as an argument or a file with --text, one of the two")
    if text is not None and not text.is_file():
        raise WrongUse(f"--text: no such file: {text}")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise WrongUse(f"--out must end in .png, .pdf or .svg, got {str(out)!r}")
    content = prompt if text is None else text.read_text(encoding="utf-8")
    config = models.parse_sparse(sparse, prefill)
    loaded, tokenizer = models.load(model, dtype, device)
    models.enable(loaded, config)
    indices = {one.layer_idx: one for one in supported(loaded).layers}
    heads = loaded.config.get_text_config().num_attention_heads
    layer = layer + max(indices) + 1 if layer < 0 else layer
    if layer not in indices:
        raise WrongUse(f"--layer must be one of the attention layers {sorted(indices)}, got {layer}")
    if not indices[layer].sparse:
        raise WrongUse(f"--layer {layer} is dense: {indices[layer].reason}")
    if head >= heads:
        raise WrongUse(f"--head must be below {heads}, the model's query heads, got {head}")
    inputs = run.encode(loaded, tokenizer, content or "", chat)
    length = inputs["input_ids"].shape[1]
    if heads * length**2 > MOST_MASK_BYTES:
        raise WrongUse(f"{length:,} tokens are too many to draw: a layer's mask would take {heads * length**2:,} bytes")
    with record(loaded, masks=[layer]) as log:
        result = run.generate("recording", loaded, tokenizer, inputs, max_new_tokens)
    title = f"{model}, layer {layer}, head {head}\n{stack_in_words(config)}"
    with spinner(f"drawing {out}"):
        draw(log, layer, head, title, out)
    screen = console()
    screen.print(f"{length:,} tokens read, {result.tokens.numel()} generated:{result.text!r}", markup=False)
    screen.print(log.table())
    screen.print(f"wrote {out}", markup=False)


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    from sah_transformers.cli.screen import Failed

    if find_spec("matplotlib") is None:
        raise Failed("sah show needs matplotlib: pip install 'sah-transformers[plot]'")


def head_mask(log: Any, layer: int, head: int) -> Any:
    """The head's mask over all recorded calls, one row per query: -1 where a key did not exist yet, else 0 or 1."""
    import torch

    calls = [entry for entry in log.entries if entry.layer == layer and entry.maskers != "dense"]
    total = max(mask.shape[-1] for mask in log.masks[layer])
    parts = []
    for entry, mask in zip(calls, log.masks[layer], strict=True):
        last = torch.arange(entry.queries)[:, None] + entry.keys - entry.queries
        part = torch.full((entry.queries, total), -1.0)
        part[:, : entry.keys] = mask.active()[0, head].float()
        parts.append(part.masked_fill(torch.arange(total) > last, -1.0))
    return torch.cat(parts)


def shrink(image: Any) -> Any:
    """Average an image down to about ``MOST_PIXELS`` a side; a pixel without any key stays -1."""
    from torch.nn.functional import avg_pool2d

    step = [max(1, -(-size // MOST_PIXELS)) for size in image.shape]
    there = avg_pool2d((image >= 0).float()[None], step, ceil_mode=True)[0]
    active = avg_pool2d(image.clamp(min=0)[None], step, ceil_mode=True)[0]
    return (active / there.clamp(min=1e-9)).masked_fill(there == 0, -1.0)


def draw(log: Any, layer: int, head: int, title: str, out: Path) -> None:
    """The picture: mask on the left; density, recall and error by layer and by decode step on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    figure = pyplot.figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.add_gridspec(3, 3, width_ratios=[2.2, 1, 1])
    axes = figure.add_subplot(grid[:, 0])
    mask = head_mask(log, layer, head)
    image = shrink(mask).numpy()
    colours = matplotlib.colormaps["Blues"].with_extremes(under="#e8e4dc")
    # a single key in a pixel that stands for many must stay visible
    shown = axes.imshow(
        image,
        cmap=colours,
        norm=PowerNorm(0.4, vmin=0, vmax=1),
        aspect="auto",
        interpolation="nearest",
        extent=(0, mask.shape[1], mask.shape[0], 0),
    )
    figure.colorbar(shown, ax=axes, label="share of the pixel's keys that are attended to", shrink=0.6)
    axes.set(title=title, xlabel="key", ylabel="query (recorded rows)")
    for row, metric, label in (
        (0, "density", "density"),
        (1, "recall", "recall"),
        (2, "output_error", "output error"),
    ):
        _by_layer(figure.add_subplot(grid[row, 1]), log, metric, label)
        _by_step(figure.add_subplot(grid[row, 2]), log, metric, label)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _by_layer(axes: Any, log: Any, metric: str, label: str) -> None:
    layers = sorted({entry.layer for entry in log.entries if entry.maskers != "dense"})
    for phase, marker in (("prefill", "o"), ("decode", "x")):
        axes.plot(layers, [log.mean(metric, phase, one) for one in layers], marker, markersize=4, label=phase)
    axes.set(xlabel="layer", ylabel=label)
    axes.legend(fontsize="small")


def _by_step(axes: Any, log: Any, metric: str, label: str) -> None:
    steps: dict[int, list[float]] = {}
    for entry in log.entries:
        if entry.phase == "decode" and entry.maskers != "dense":
            steps.setdefault(entry.keys, []).append(getattr(entry, metric))
    axes.plot(list(steps), [sum(values) / len(values) for values in steps.values()], "x-", markersize=4)
    axes.set(xlabel="keys, one step each", ylabel=label)
    axes.set_title("mean over layers", fontsize="small")
