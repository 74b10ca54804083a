"""``sah train hash-attention``: hashes that find a model's best keys, trained on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sah_transformers.cli.models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP
from sah_transformers.cli.prepared import TEXT_HELP
from sah_transformers.cli.screen import errors_in_one_line

if TYPE_CHECKING:
    from sah_transformers.prepare.hash_training import Recall

GROUPS = 6
"""Rows of the table, at most, before the one of all layers."""


app = typer.Typer(help="Train what a masker needs for a model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _methods() -> None:
    """Train what a masker needs for a model."""
    # a callback, so that the one method stays part of the command line


@app.command("hash-attention")
@errors_in_one_line
def hash_attention(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[Path | None, typer.Option(help=TEXT_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="The file. Default: MODEL.hash.safetensors here.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most this many tokens of the text.")] = 65_536,
    block: Annotated[int, typer.Option(min=2, help="Tokens that the model reads at once.")] = 2048,
    bits: Annotated[int, typer.Option(min=1, help="Bits of a hash.")] = 32,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the MLPs' hidden layers.")] = 128,
    steps: Annotated[int, typer.Option(min=0, help="Steps of Adam in each layer.")] = 300,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    rows: Annotated[int, typer.Option(min=1, help="Queries per step.")] = 256,
    top: Annotated[int, typer.Option(min=1, help="How many keys of a row count as the best.")] = 32,
    sink: Annotated[int, typer.Option(min=0, help="The first keys, left to another masker.")] = 128,
    local: Annotated[int, typer.Option(min=0, help="The last keys of a row, left to another masker.")] = 128,
    alpha: Annotated[float, typer.Option(help="Weight of a best key in the loss.")] = 20.0,
    threshold: Annotated[float, typer.Option(help="Subtracted from the soft score.")] = 0.0,
    per_kv_head: Annotated[
        bool, typer.Option("--per-kv-head", help="One hash per KV head, not per query head: fewer bytes per key.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and the order of the rows.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Start again, whatever the checkpoint holds.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Train the weights that the masker hash_attention reads. Interrupted, the same command goes on where it was."""
    from sah_transformers.cli import prepared
    from sah_transformers.cli.eval import INTERRUPTED
    from sah_transformers.cli.screen import WrongUse, bar, console
    from sah_transformers.prepare import HashSettings, train_hash_attention
    from sah_transformers.prepare.hash_checkpoint import folder_of

    numbers = {"bits": bits, "hidden": hidden, "steps": steps, "lr": lr, "rows": rows, "top": top, "sink": sink}
    numbers |= {"local": local, "alpha": alpha, "threshold": threshold, "seed": seed}
    try:
        settings = HashSettings(shared=per_kv_head, **numbers)  # type: ignore[arg-type]
        settings.trained_rows(block)
    except ValueError as error:
        raise WrongUse(f"--{error}") from None
    path = prepared.place(out, model, "hash.safetensors")
    loaded, blocks, origin = prepared.load(model, text, tokens, block, dtype, device)
    screen = console()
    if folder_of(path).exists():
        screen.print(f"{'discarding' if restart else 'going on from'} {folder_of(path)}", markup=False)
    try:
        with bar() as tell:
            measured = train_hash_attention(loaded, blocks, path, origin, settings, tell, restart)
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted: the same command goes on from {folder_of(path)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    screen.print(table(measured, top))
    screen.print(f"wrote {path}", markup=False)
    bits_too = "" if bits == 32 else f', "hat_bits": {bits}'
    screen.print(
        f'use: {{"type": "hash_attention", "heavy_size": 0.1{bits_too}, "hat_weight_file": "{path}"}}', markup=False
    )


def table(measured: dict[int, tuple[Recall, Recall]], top: int) -> Any:
    """Loss and recall of held-out rows before and after, for groups of layers and for all."""
    from rich.table import Table

    from sah_transformers.cli.check import ranges
    from sah_transformers.prepare.hash_training import NEAR

    out = Table(
        title=f"Recall of a row's {top} best keys on held-out rows: among the {top}, and among the {NEAR:.0%}, that "
        "the hashes rank first.\nPlanes: the signs of random projections. Untrained: the MLPs before the first step."
    )
    among = (f"{top}", f"{NEAR:.0%}")
    columns = [
        "loss, untrained",
        "loss, trained",
        *(f"{what}, {k}" for k in among for what in ("planes", "untrained", "trained")),
    ]
    for column in ("layers", *columns):
        out.add_column(column, justify="left" if column == "layers" else "right")
    layers = sorted(measured)
    each = -(-len(layers) // GROUPS)
    for start in range(0, len(layers), each):
        out.add_row(ranges(layers[start : start + each]), *_cells(measured, layers[start : start + each]))
    out.add_section()
    out.add_row("all", *_cells(measured, layers))
    return out


def _cells(measured: dict[int, tuple[Recall, Recall]], layers: list[int]) -> list[str]:
    def mean(at: int, name: str) -> str:
        return f"{sum(getattr(measured[layer][at], name) for layer in layers) / len(layers):.3f}"

    names = ((0, "loss"), (1, "loss"), (0, "planes_same"), (0, "same"), (1, "same"))
    return [mean(*one) for one in (*names, (0, "planes_near"), (0, "near"), (1, "near"))]
