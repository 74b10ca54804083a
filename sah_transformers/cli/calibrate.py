"""``sah calibrate double-sparsity``: which channels of each head matter most, measured on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sah_transformers.cli.models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP
from sah_transformers.cli.prepared import TEXT_HELP
from sah_transformers.cli.screen import errors_in_one_line

app = typer.Typer(help="Measure what a masker needs to know of a model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _methods() -> None:
    """Measure what a masker needs to know of a model."""
    # a callback, so that the one method stays part of the command line


@app.command("double-sparsity")
@errors_in_one_line
def double_sparsity(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[Path | None, typer.Option(help=TEXT_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="The file. Default: MODEL.channels.json here.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most this many tokens of the text.")] = 131_072,
    block: Annotated[int, typer.Option(min=2, help="Tokens that the model reads at once.")] = 512,
    selection: Annotated[
        str, typer.Option(help="qk_proj, q_proj or k_proj: by mean |q k|, |q| or |k| of each channel.")
    ] = "qk_proj",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Write the channel file that the masker double_sparsity reads: per layer and head, the most important first."""
    from sah_transformers.cli import prepared
    from sah_transformers.cli.screen import WrongUse, bar, console
    from sah_transformers.maskers.channel_file import write_channels
    from sah_transformers.prepare import calibrate_double_sparsity
    from sah_transformers.prepare.channels import SELECTIONS

    if selection not in SELECTIONS:
        raise WrongUse(f"--selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    path = prepared.place(out, model, "channels.json")
    loaded, blocks, origin = prepared.load(model, text, tokens, block, dtype, device)
    with bar() as tell:
        channels = calibrate_double_sparsity(
            loaded, blocks, selection, lambda done, total: tell("reading blocks of the text", done, total)
        )
    write_channels(path, channels, {**origin, "selection": selection}, selection)
    heads, dim = next(iter(channels.values())).shape
    screen = console()
    screen.print(
        f"{len(channels)} layers, {heads} query heads, {dim} channels, from {blocks.numel():,} tokens of "
        f"{origin['text']}",
        markup=False,
    )
    screen.print(f"wrote {path}", markup=False)
    screen.print(
        f'use: {{"type": "double_sparsity", "heavy_size": 0.1, "sorted_channel_file": "{path}"}}', markup=False
    )
