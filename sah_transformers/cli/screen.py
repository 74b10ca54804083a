"""What the commands print: results on stdout, spinners and errors on stderr."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])

FAILED, WRONG_USE = 1, 2
"""Exit codes: the work failed; the command line or configuration is wrong."""


LOG_S = 30.0


class WrongUse(Exception):
    """The command line asks for something that does not exist or fit together."""


class Failed(Exception):
    """The work could not be done."""


def console() -> Any:
    """A console on the present stdout; plain text of a fixed width where that is no terminal."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)


def spinner(text: str) -> Any:
    """A context manager that shows ``text`` while something takes its time; ``update(text)`` changes it.

    Bound to the stderr of now, so that output which is silenced meanwhile does not silence the spinner.
    """
    from rich.console import Console

    stream = Console(file=sys.stderr, highlight=False)
    if not stream.is_terminal:
        stream.print(text, markup=False)  # a log file gets one line per step
    return stream.status(text)


@contextlib.contextmanager
def bar() -> Iterator[Callable[..., None]]:
    """A progress bar on stderr: call what it yields with (what, done, total) and, if you like, what was done last.

    A new ``what`` starts a new bar.

    A log file gets a line for each ``what``, and one every half minute.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    stream = Console(file=sys.stderr, highlight=False)
    if not stream.is_terminal:
        last, since = "", time.monotonic()

        def tell(what: str, done: int, total: int, just: str = "") -> None:
            nonlocal last, since
            if what != last or time.monotonic() - since > LOG_S:
                stream.print(f"{what}: {done} of {total}{just and f', {just}'}", markup=False)
                last, since = what, time.monotonic()

        yield tell
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[just]}", markup=False),
    )
    with Progress(*columns, console=stream, transient=True) as progress:
        task = progress.add_task("", total=1, just="")
        shown = ""

        def draw(what: str, done: int, total: int, just: str = "") -> None:
            nonlocal shown
            if what != shown:
                progress.reset(task, description=what)
                shown = what
            progress.update(task, completed=done, total=total, just=just)

        yield draw


def errors_in_one_line(command: Command) -> Command:
    """Decorator: what a user can mend ends in one line on stderr and an exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except WrongUse as error:
            message, code = str(error), WRONG_USE
        except (Failed, ValueError, OSError, ImportError) as error:
            message, code = str(error), FAILED
        typer.echo(f"error: {first_line(message)}", err=True)
        raise typer.Exit(code)

    return wrapped  # type: ignore[return-value]


def first_line(message: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "unknown error")
