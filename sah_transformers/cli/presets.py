"""``sah presets``: the shipped configurations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sah_transformers.config import SparseAttentionConfig, preset_names, presets_folder

if TYPE_CHECKING:
    from sah_transformers.maskers import MaskerConfig


def presets() -> None:
    """List the shipped presets: name, stack, where the numbers come from."""
    from rich.table import Table

    from sah_transformers.cli.screen import console

    table = Table(show_lines=True)
    table.add_column("preset", no_wrap=True)
    table.add_column("stack", ratio=2)
    table.add_column("source", ratio=3)
    for name in preset_names():
        table.add_row(name, stack_in_words(SparseAttentionConfig.parse(name)), source_of(name))
    console().print(table)


def stack_in_words(config: SparseAttentionConfig) -> str:
    """``sink 128 + local 128 + oracle_top_k 0.05; prefill dense``: what differs from the defaults."""
    words = [" + ".join(map(_masker_in_words, config.maskers)) or "dense"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("maskers", "preset") or value in (field.default, (), {}):
            continue
        if field.name == "layers":
            value = {where: " + ".join(map(_masker_in_words, stack)) for where, stack in value.items()}
        elif isinstance(value, tuple) and field.name == "prefill":
            value = " + ".join(map(_masker_in_words, value))
        words.append(f"{field.name} {list(value) if isinstance(value, tuple) else value}")
    return "; ".join(words)


def _masker_in_words(config: MaskerConfig) -> str:
    words = [config.type]
    for i, field in enumerate(dataclasses.fields(config)):
        value = getattr(config, field.name)
        if value != field.default:
            words.append(str(value) if i == 0 else f"{field.name}={value}")
    return " ".join(words)


def source_of(name: str) -> str:
    """The comment at the head of a preset's file."""
    lines = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines[: next((i for i, x in enumerate(lines) if x[:1] != "#"), None)]]
    return " ".join(comment)
