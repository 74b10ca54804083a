"""``sah eval``: what a stack keeps of a real model's answers and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sah_transformers.cli.models import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, SPARSE_HELP
from sah_transformers.cli.screen import errors_in_one_line

if TYPE_CHECKING:
    from sah_transformers.evaluate import Prompt, Stack
    from sah_transformers.evaluate.reading import Tell

INTERRUPTED = 130
"""Exit code of a command that was stopped with Ctrl-C."""

WIDTH = 130
"""Of the tables, at least."""

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Sparse = Annotated[
    list[str] | None,
    typer.Option(help=SPARSE_HELP + " Repeat it to compare several; NAME=... gives a stack its name in the table."),
]
Budgets = Annotated[
    str | None,
    typer.Option(help="Each stack once per budget, put into its heavy_size or sampling_rate: 0.01,0.05,0.2."),
]
Text = Annotated[Path | None, typer.Option(help="A file of prose. Default: a text of 7,000 tokens that ships along.")]
Json = Annotated[
    Path | None, typer.Option(help="Write the line of JSON to this file, with every prompt or piece in it.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw curves over --budgets here: .png, .pdf or .svg.")]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]

app = typer.Typer(help="Measure what a stack keeps of a real model.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@errors_in_one_line
def needle(
    model: Model,
    sparse: Sparse = None,
    tasks: Annotated[str, typer.Option(help="single: one number; multi: four cities with one each.")] = "single,multi",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "1200,2300,4600",
    depths: Annotated[str, typer.Option(help="Where the number lies, shares of the text.")] = "0.2,0.4,0.6,0.8",
    seeds: Annotated[int, typer.Option(min=1, help="Prompts per task, length and depth.")] = 2,
    setups: Annotated[str, typer.Option(help="A: the answer is sparse; B: the question and the answer are.")] = "A,B",
    budgets: Budgets = None,
    text: Text = None,
    json: Json = None,
    plot: Plot = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Ask for numbers hidden in prose; scored are the prompts that dense attention answers."""
    from sah_transformers.cli.screen import WrongUse
    from sah_transformers.evaluate import evaluate_needle, make_prompt, report
    from sah_transformers.evaluate.needle import SETUPS
    from sah_transformers.evaluate.plot import NEEDLE_PANELS
    from sah_transformers.evaluate.prompts import TASKS

    chosen_tasks, chosen_setups = _names("--tasks", tasks, TASKS), _names("--setups", setups, SETUPS)
    wanted, places = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
    stacks = _stacks(sparse, budgets)
    _check_files(json, plot, budgets)
    prose = _prose(text)
    loaded, tokenizer = _load(model, dtype, device, stacks)
    _check_length(loaded, max(wanted))
    try:
        prompts: list[Prompt] = [
            make_prompt(tokenizer, prose, task, length, depth, seed)
            for length in wanted
            for seed in range(seeds)
            for depth in places
            for task in chosen_tasks
        ]
    except ValueError as error:
        raise WrongUse(f"--lengths, --depths: {error}") from None
    outcomes, complete = _collect(
        "asking",
        len(prompts),
        1 + len(stacks) * len(chosen_setups),
        lambda tell: evaluate_needle(loaded, prompts, stacks, chosen_setups, tell),
    )
    if not outcomes:
        raise typer.Exit(INTERRUPTED)
    rows = report.needle_rows(outcomes, stacks, chosen_setups)
    answered = sum(one.dense for one in outcomes)
    first = f"dense attention answers {answered} of {len(outcomes)} prompts; scored are those"
    settings = {"tasks": chosen_tasks, "lengths": wanted, "depths": places, "seeds": seeds, "setups": chosen_setups}
    _finish(
        first,
        report.needle_table(rows),
        _about("eval needle", model, loaded, stacks, settings, complete),
        {"asked": len(outcomes), "answered": answered, "summary": rows},
        {"prompts": report.needle_details(outcomes)},
        json,
    )
    over_all = [row for row in rows if row["length"] == report.ALL or len(wanted) == 1]
    _draw(plot, over_all, NEEDLE_PANELS, f"{model}: numbers hidden in prose, {answered} prompts")
    if not complete:
        raise typer.Exit(INTERRUPTED)


@app.command()
@errors_in_one_line
def text(
    model: Model,
    sparse: Sparse = None,
    segments: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a piece that are read densely.")] = 1500,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens after them, each predicted from the text's own.")] = 120,
    budgets: Budgets = None,
    text: Text = None,
    json: Json = None,
    plot: Plot = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare next-token distributions over prose with dense attention's: divergence and equal choices."""
    from sah_transformers.cli.screen import WrongUse
    from sah_transformers.evaluate import cut, evaluate_text, report
    from sah_transformers.evaluate.plot import TEXT_PANELS

    stacks = _stacks(sparse, budgets)
    _check_files(json, plot, budgets)
    prose = _prose(text)
    loaded, tokenizer = _load(model, dtype, device, stacks)
    _check_length(loaded, context + tokens)
    try:
        pieces = cut(tokenizer, prose, context + tokens, segments)
    except ValueError as error:
        raise WrongUse(f"--segments, --context, --tokens: {error}") from None
    found, complete = _collect(
        "predicting",
        len(pieces),
        1 + len(stacks),
        lambda tell: evaluate_text(loaded, pieces, context, stacks, tell),
    )
    if not found:
        raise typer.Exit(INTERRUPTED)
    rows = report.text_rows(found, stacks)
    settings = {"segments": segments, "context": context, "tokens": tokens}
    _finish(
        f"{len(found)} x {tokens} tokens, each after {context:,} or more that were read densely",
        report.text_table(rows),
        _about("eval text", model, loaded, stacks, settings, complete),
        {"summary": rows},
        {"segments": report.text_details(found)},
        json,
    )
    _draw(plot, rows, TEXT_PANELS, f"{model}: {len(found)} x {tokens} tokens of prose after {context:,}")
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _collect(what: str, items: int, steps: int, start: Callable[[Tell], Iterable[Any]]) -> tuple[list[Any], bool]:
    """(the items that were done, whether all of them were), behind a progress bar: Ctrl-C keeps what there is.

    Args:
        what: what is being done; items: how many there are, of ``steps`` each.
        start: gives the items, and tells what it has done after each step.
    """
    from sah_transformers.cli.screen import bar

    found: list[Any] = []
    done = 0
    with bar() as draw:

        def tell(just: str) -> None:
            nonlocal done
            done += 1
            draw(what, done, items * steps, just)

        try:
            for item in start(tell):
                found.append(item)
                done = len(found) * steps
        except KeyboardInterrupt:
            typer.echo(f"interrupted: {len(found)} of {items} done", err=True)
            return found, False
    return found, True


def _names(option: str, given: str, known: Iterable[str]) -> list[str]:
    from sah_transformers.cli.screen import WrongUse

    names = list(dict.fromkeys(part.strip() for part in given.split(",")))
    for name in names:
        if name not in known:
            raise WrongUse(f"{option} takes {', '.join(known)}, separated by commas, got {name!r}")
    return names


def _numbers(option: str, given: str, kind: type) -> list[Any]:
    from sah_transformers.cli.screen import WrongUse

    try:
        return list(dict.fromkeys(kind(part) for part in given.split(",")))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise WrongUse(f"{option} takes {what} separated by commas, got {given!r}") from None


def _stacks(sparse: Sequence[str] | None, budgets: str | None) -> list[Stack]:
    """The stacks that ``--sparse`` and ``--budgets`` name."""
    from sah_transformers.cli import models
    from sah_transformers.cli.presets import stack_in_words
    from sah_transformers.cli.screen import WrongUse
    from sah_transformers.evaluate import Stack, over_budgets

    if not sparse:
        raise WrongUse("nothing to evaluate: give --sparse at least once (see 'sah presets')")
    shares = [] if budgets is None else _numbers("--budgets", budgets, float)
    found: list[Stack] = []
    for value in sparse:
        name, value = _named(value)
        config = models.parse_sparse(value)
        name = name or (stack_in_words(config) if value.lstrip().startswith(("{", "[")) else Path(value).stem)
        if name in {stack.name for stack in found}:
            raise WrongUse(f"--sparse names {name!r} twice")
        try:
            found += over_budgets(Stack(name, config), sorted(shares))
        except ValueError as error:
            raise WrongUse(f"--budgets: {str(error).removeprefix('budgets ')}") from None
    if budgets is not None and all(stack.budget is None for stack in found):
        raise WrongUse("--budgets: no masker of these stacks has a heavy_size or a sampling_rate")
    return found


def _named(value: str) -> tuple[str, str]:
    """(name, rest) of ``NAME=REST``; the name is empty where none is given."""
    name, equals, rest = value.partition("=")
    plain = equals and not value.lstrip().startswith(("{", "[")) and not Path(value).is_file()
    return (name.strip(), rest) if plain else ("", value)


def _check_files(json: Path | None, plot: Path | None, budgets: str | None) -> None:
    from importlib.util import find_spec

    from sah_transformers.cli.screen import Failed, WrongUse

    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise WrongUse(f"{option}: no such folder: {path.parent}")
    if plot is None:
        return
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise WrongUse(f"--plot must end in .png, .pdf or .svg, got {str(plot)!r}")
    if budgets is None:
        raise WrongUse("--plot draws curves over budgets: give --budgets, for example 0.01,0.05,0.2")
    if find_spec("matplotlib") is None:
        raise Failed("--plot needs matplotlib: pip install 'sah-transformers[plot]'")


def _prose(path: Path | None) -> str:
    from sah_transformers.cli.screen import WrongUse
    from sah_transformers.evaluate.prompts import HAYSTACK

    if path is not None and not path.is_file():
        raise WrongUse(f"--text: no such file: {path}")
    try:
        return (HAYSTACK if path is None else path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WrongUse(f"--text: {path} is no text in UTF-8: {error}") from None


def _load(model: str, dtype: str, device: str, stacks: Sequence[Stack]) -> tuple[Any, Any]:
    """The model, dense, and its tokenizer; every stack has taken a few tokens of it."""
    import torch

    from sah_transformers.cli import models
    from sah_transformers.cli.screen import Failed, WrongUse
    from sah_transformers.evaluate.reading import decode, read
    from sah_transformers.integration import disable

    loaded, tokenizer = models.load(model, dtype, device)
    if getattr(loaded.config, "is_encoder_decoder", False):
        raise Failed(
            f"{type(loaded).__name__} has an encoder; only models that read and answer in one text are evaluated"
        )
    few = torch.arange(1, 9, device=loaded.device)[None]
    for stack in stacks:
        models.enable(loaded, stack.config)
        try:
            decode(loaded, few[:, :1], read(loaded, few))
        except ValueError as error:
            raise WrongUse(f"--sparse {stack.label}: {error}") from None
    return disable(loaded), tokenizer


def _check_length(model: Any, length: int) -> None:
    from sah_transformers.cli.screen import WrongUse

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise WrongUse(f"{length:,} tokens are more than the model's {longest:,} positions")


def _about(
    command: str, model: str, loaded: Any, stacks: Sequence[Stack], settings: dict[str, Any], complete: bool
) -> dict[str, Any]:
    from sah_transformers.bench.report import machine

    return {
        "command": command,
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **machine(loaded.device.type),
        "settings": settings,
        "complete": complete,
        "stacks": {stack.label: stack.config.to_dict() for stack in stacks},
    }


def _finish(
    first: str, table: Any, about: dict[str, Any], results: dict[str, Any], details: dict[str, Any], path: Path | None
) -> None:
    """Print the results and their line of JSON; the file also gets the details."""
    import json

    from sah_transformers.cli.screen import console

    screen = console()
    screen.width = max(screen.width, WIDTH)
    screen.print(first, markup=False)
    screen.print(table)
    data = {**about, **results}
    if path is not None:
        path.write_text(json.dumps({**data, **details}, allow_nan=False) + "\n", encoding="utf-8")
    typer.echo(json.dumps(data, allow_nan=False))


def _draw(out: Path | None, rows: list[dict[str, Any]], panels: dict[str, str], title: str) -> None:
    from sah_transformers.evaluate.plot import draw

    if out is not None:
        draw(rows, panels, title, out)
        typer.echo(f"wrote {out}", err=True)
