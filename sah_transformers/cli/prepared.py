"""What the commands that prepare a file for a masker have in common: the model and the text that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sah_transformers.cli.screen import Failed, WrongUse

TEXT_HELP = "A file of plain text (UTF-8). Default: a short one that ships with the package."


def place(out: Path | None, model: str, ending: str) -> Path:
    """Where the file goes: ``out``, or the model's name here.

    Raises:
        WrongUse: where that cannot be written.
    """
    name = "smollm2" if model == "smollm2" else Path(model.rstrip("/")).name.removesuffix(".gguf")
    path = Path(f"{name}.{ending}") if out is None else out.expanduser()
    if path.is_dir():
        raise WrongUse(f"--out: {path} is a folder")
    if not path.absolute().parent.is_dir():
        raise WrongUse(f"--out: no such folder: {path.parent}")
    return path


def load(
    model: str, text: Path | None, tokens: int | None, block: int, dtype: str, device: str
) -> tuple[Any, Any, dict[str, Any]]:
    """(model, blocks of token ids, the record of both).

    Raises:
        WrongUse: for a text that cannot be read or is too short; for a model that does not exist.
        Failed: for a model that cannot be loaded or sparse.
    """
    from sah_transformers.cli import models
    from sah_transformers.integration import supported
    from sah_transformers.prepare import origin_of, read_text

    try:
        content = read_text(text)
    except ValueError as error:
        raise WrongUse(f"--text: {str(error).removeprefix('text: ')}") from None
    loaded, tokenizer = models.load(model, dtype, device)
    support = supported(loaded)
    if not support:
        raise Failed(f"{type(loaded).__name__} cannot use sparse attention: {support.reason}")
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and block > longest:
        raise WrongUse(f"--block must be at most {longest:,}, the model's positions, got {block:,}")
    try:
        blocks = content.blocks(tokenizer, block, tokens)
    except ValueError as error:
        raise WrongUse(f"{error}: give a smaller --block or another --text") from None
    return loaded, blocks, origin_of(model, loaded, content, blocks)
