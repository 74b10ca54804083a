"""The text that a model is read with: a file, or the one that ships with the package, cut into blocks of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEFAULT_TEXT = Path(__file__).parent.parent / "texts" / "essays.txt"


@dataclass(frozen=True)
class Text:
    """A text's name, the SHA-256 of its bytes, and its words."""

    name: str
    sha256: str
    content: str

    def blocks(self, tokenizer: Any, block: int, tokens: int | None = None) -> torch.Tensor:
        """Token ids int64 ``[N, block]``: the first ``tokens`` of them, without what is left over at the end.

        Raises:
            ValueError: where they do not fill one block.
        """
        if block < 2:
            raise ValueError(f"block must be at least 2 tokens, got {block}")
        ids = tokenizer(self.content, return_tensors="pt", verbose=False)["input_ids"][0, :tokens]
        if len(ids) < block:
            raise ValueError(f"the text {self.name} has {len(ids):,} tokens here, fewer than one block of {block:,}")
        return ids[: len(ids) // block * block].view(-1, block).long()


def read_text(path: str | Path | None = None) -> Text:
    """A file's text; without a path, the text that ships with the package.

    Raises:
        ValueError: for a file that is missing, empty, or no UTF-8.
    """
    file = DEFAULT_TEXT if path is None else Path(path).expanduser()
    try:
        data = file.read_bytes()
        content = data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"text: {path} must be UTF-8") from None
    if not content.strip():
        raise ValueError(f"text: {path} is empty")
    name = f"sah_transformers/texts/{file.name}" if path is None else file.name
    return Text(name, hashlib.sha256(data).hexdigest(), content)
