"""What the commands print: results on stdout, spinners and errors on stderr."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])

FAILED, WRONG_USE = 1, 2
"""Exit codes: the work failed; the command line or configuration is wrong."""


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
