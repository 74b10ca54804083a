"""The command line, ``sah``. Each command's file imports what it needs when it runs."""

import typer

from sah_transformers.cli.bench import bench
from sah_transformers.cli.calibrate import app as calibration
from sah_transformers.cli.check import check
from sah_transformers.cli.demo import demo
from sah_transformers.cli.eval import app as evaluation
from sah_transformers.cli.generate import generate
from sah_transformers.cli.presets import presets
from sah_transformers.cli.screen import errors_in_one_line
from sah_transformers.cli.show import show
from sah_transformers.cli.train import app as training

app = typer.Typer(
    name="sah",
    help="Sparse attention for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (generate, demo, presets, check, show, bench):
    app.command()(errors_in_one_line(command))
app.add_typer(evaluation, name="eval")
app.add_typer(calibration, name="calibrate")
app.add_typer(training, name="train")

__all__ = ["app"]
