"""Messages for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(name: object, kind: str, known: Iterable[str]) -> str:
    """``unknown field 'sinksize', did you mean 'sink_size'? Known: ...``."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}"
