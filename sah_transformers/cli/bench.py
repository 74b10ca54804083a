"""``sah bench``: is it right, and how fast is it beside dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sah_transformers.bench.run import Result, Setup
    from sah_transformers.bench.suites import Case

ON_GPU = ("decode", "prefill", "mask_update", "add_mask", "host")
ON_CPU = ("smoke",)

WIDTH = 150
"""Of the tables, at least: narrower ones break figures."""


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="decode, approximate, prefill, mask_update, add_mask, host, step, smoke, plot, or YAML files. "
            "Default: all with targets but step, which builds a model of 8B parameters; smoke on a CPU."
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only cases whose label contains this text.")] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Also the time of each kernel, from the profiler.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw time over 4K to 1M keys here (the suite 'plot'; alone unless SUITES are named)."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the line of JSON to this file.")] = None,
    kernel: Annotated[
        str | None, typer.Option(help="auto, triton or reference. Default: triton on a GPU, else auto.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes cuda where there is one.")] = "auto",
) -> None:
    """Check every case against the reference, then time it beside dense attention, and hold it against its targets."""
    from sah_transformers.bench import report
    from sah_transformers.cli.screen import Failed, console

    _check_options(plot, json, kernel, device)
    setup_device = _device(device)
    names = list(suites or ()) or ([] if plot else list(ON_GPU if setup_device == "cuda" else ON_CPU))
    if plot and "plot" not in names:
        names.append("plot")
    cases = _cases(names, only)
    setup = _setup(setup_device, kernel, stages)
    screen = console()
    screen.width = max(screen.width, WIDTH)
    screen.print(_what_runs(setup, suites), markup=False)
    results = _run_all(cases, setup, json)
    for name in names:
        part = [one for one in results if one.case.suite == Path(name).stem]
        if part:
            screen.print(report.table(name, part))
    for drawn, part in (
        (report.steps_table, [one for one in results if one.steps]),
        (report.prompts_table, [one for one in results if one.prompts]),
    ):
        if part:
            screen.print(drawn(part))
    for one in results:
        if one.stages_us:
            listed = ", ".join(f"{kernel} {us:g}" for kernel, us in one.stages_us.items())
            screen.print(f"{one.case.label}, us: {listed}", markup=False)
    points = [one for one in results if one.case.suite == "plot" and one.ours is not None]
    if plot and points:
        _draw(points, setup, plot)
        screen.print(f"wrote {plot}", markup=False)
    counts = report.summary(results)
    screen.print(", ".join(f"{count} {what}" for what, count in counts.items() if count), markup=False)
    typer.echo(_write(results, setup, json))
    if counts["FAILED"]:
        raise Failed(f"{counts['FAILED']} of {len(results)} cases failed")
    if plot and not points:
        raise Failed("--plot: nothing was measured that could be drawn")


def _check_options(plot: Path | None, json: Path | None, kernel: str | None, device: str) -> None:
    from importlib.util import find_spec

    from sah_transformers.attention import KERNELS, check_kernel
    from sah_transformers.cli.screen import Failed, WrongUse

    if kernel not in (None, *KERNELS):
        raise WrongUse(f"--kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise WrongUse(f"--device must be auto, cpu or cuda, got {device!r}")
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise WrongUse(f"{option}: no such folder: {path.parent}")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise WrongUse(f"--plot must end in .png, .pdf or .svg, got {str(plot)!r}")
    if plot is not None and find_spec("matplotlib") is None:
        raise Failed("--plot needs matplotlib: pip install 'sah-transformers[plot]'")
    try:
        check_kernel(kernel or "auto")
    except ValueError as error:
        raise WrongUse(str(error)) from None


def _device(device: str) -> str:
    import torch

    from sah_transformers.cli.screen import WrongUse

    if device == "cuda" and not torch.cuda.is_available():
        raise WrongUse("--device cuda: there is no CUDA device")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _cases(names: list[str], only: str | None) -> list[Case]:
    from sah_transformers.bench.suites import load_suite
    from sah_transformers.cli.screen import WrongUse

    try:
        cases = [case for name in names for case in load_suite(name)]
    except ValueError as error:
        raise WrongUse(str(error)) from None
    chosen = [case for case in cases if only is None or only.lower() in case.label.lower()]
    if not chosen:
        raise WrongUse(f"--only {only!r} leaves no case of: {', '.join(names)}")
    return chosen


def _setup(device: str, kernel: str | None, stages: bool) -> Setup:
    from sah_transformers.bench.run import Setup
    from sah_transformers.bench.timing import copy_rate
    from sah_transformers.cli.screen import spinner

    with spinner("measuring the copy rate"):
        rate = copy_rate(device == "cuda")
    return Setup(device, kernel or ("triton" if device == "cuda" else "auto"), rate, stages)


def _what_runs(setup: Setup, suites: list[str] | None) -> str:
    from sah_transformers.bench.report import machine

    about = machine(setup.device)
    versions = f"torch {about['torch']}, triton {about['triton'] or 'not installed'}"
    text = f"{about['device']}, {versions}, copy {setup.copy_rate / 1e12:.3g} TB/s, kernel {setup.kernel!r}"
    if setup.cuda:
        return text
    small = "" if suites else " of the suite 'smoke'"
    return (
        f"{text}\nNo GPU: only the cases{small} that a CPU can do run, on the PyTorch reference. Their times are no "
        "measure of the kernels; targets are for an H100."
    )


def _write(results: list[Result], setup: Setup, path: Path | None) -> str:
    """The line of JSON, also in a file."""
    from json import dumps

    from sah_transformers.bench import report

    line = dumps(report.data(results, setup))
    if path is not None:
        path.write_text(line + "\n", encoding="utf-8")
    return line


def _run_all(cases: list[Case], setup: Setup, json: Path | None) -> list[Result]:
    """Every case under one spinner; into a log file, a line for each as it is done. What is done by then is in the file
    ``json`` whenever the run ends."""
    import sys
    from dataclasses import replace
    from functools import partial

    from sah_transformers.bench.run import run_case
    from sah_transformers.cli.screen import spinner

    results = []
    live = sys.stderr.isatty()
    with spinner(f"{len(cases)} cases") as status:
        setup = replace(setup, say=status.update if live else partial(typer.echo, err=True))
        for i, case in enumerate(cases, 1):
            at = f"{case.suite} {i} of {len(cases)}: {case.label}"
            status.update(at)
            result = run_case(case, setup)
            results.append(result)
            _write(results, setup, json)
            if not live:
                typer.echo(f"{at}: {_in_short(result)}", err=True)
    return results


def _in_short(result: Result) -> str:
    if result.status != "ok":
        return f"{result.status}, {result.note}"[:400]
    ours = [] if result.ours is None else [f"{result.ours.p50:.4g} ms"]
    return ", ".join(ours + [f"{name} {value:.4g}" for name, value in result.measures.items()])


def _draw(results: list[Result], setup: Setup, out: Path) -> None:
    from sah_transformers.bench.plot import draw
    from sah_transformers.bench.report import machine
    from sah_transformers.cli.screen import spinner

    with spinner(f"drawing {out}"):
        draw(results, machine(setup.device)["device"], out)
