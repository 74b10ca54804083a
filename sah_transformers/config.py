"""`SparseAttentionConfig`: which maskers run where, as plain data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from sah_transformers.budget import check_number
from sah_transformers.maskers import Masker, MaskerConfig, MaskerRegistry
from sah_transformers.spelling import unknown_name

Stack = tuple[MaskerConfig, ...]

KERNELS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class SparseAttentionConfig:
    """What ``sparse_attention=`` holds. Every field takes plain data (JSON, YAML); stacks become masker configs.

    Attributes:
        maskers: the stack, in order; ``[]`` is dense attention.
        prefill: ``"same"``: every call selects with the stack. ``"dense"``: a call is dense when the cache was empty
            before it or when it brings more than ``decode_max_queries`` queries. Or a stack for those calls.
        decode_max_queries: see ``prefill``.
        kernel: ``"auto"``, ``"reference"`` or ``"triton"``.
        dense_layers: indices of layers that stay dense, negative from the end.
        min_keys: a row that sees fewer keys than this is dense.
        layers: other stacks for some layers: ``{"3": [...], "8:12": [...], "-1": [...]}``; keys are indices or
            ranges as in a Python slice; where several name a layer, the one that names the fewest layers wins.
        sliding_layers: ``"dense"``: layers that the model itself windows stay as they are; or ``"sparse"``.
        preset: name of the shipped preset this came from, or None.

    Raises:
        ValueError: naming the culprit's path, the rule and the value, for example
            ``maskers[2].heavy_size must be ...``.
    """

    maskers: Stack = ()
    prefill: str | Stack = "same"
    decode_max_queries: int = 64
    kernel: str = "auto"
    dense_layers: tuple[int, ...] = ()
    min_keys: int = 0
    layers: Mapping[str, Stack] = dataclasses.field(default_factory=dict)
    sliding_layers: str = "dense"
    preset: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "maskers", parse_stack(self.maskers, "maskers"))
        if not isinstance(self.prefill, str):
            put(self, "prefill", parse_stack(self.prefill, "prefill"))
        elif self.prefill not in ("same", "dense"):
            raise ValueError(f"prefill must be 'same', 'dense' or a list of maskers, got {self.prefill!r}")
        _check_count("decode_max_queries", self.decode_max_queries)
        _check_count("min_keys", self.min_keys)
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {self.kernel!r}")
        if self.sliding_layers not in ("dense", "sparse"):
            raise ValueError(f"sliding_layers must be 'dense' or 'sparse', got {self.sliding_layers!r}")
        put(self, "dense_layers", _parse_indices(self.dense_layers))
        put(self, "layers", _parse_layers(self.layers))
        if self.preset is not None and not isinstance(self.preset, str):
            raise ValueError(f"preset must be a name or None, got {self.preset!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``from_dict`` gives an equal config back."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["maskers"] = _stack_data(self.maskers)
        data["dense_layers"] = list(self.dense_layers)
        data["layers"] = {where: _stack_data(stack) for where, stack in self.layers.items()}
        if not isinstance(self.prefill, str):
            data["prefill"] = _stack_data(self.prefill)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseAttentionConfig:
        """Build a config from plain data; ``preset`` without ``maskers`` is that preset with the other fields changed.

        Raises:
            ValueError: for unknown fields (naming the nearest right one), unknown types, wrong values.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"sparse_attention must be a mapping of fields, got {data!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        if "type" in data and "maskers" not in data:
            raise ValueError(f"sparse_attention must be a mapping of fields or a list of maskers{_lone(data)}")
        for name in data:
            if name not in known:
                raise ValueError(unknown_name(name, "field of sparse_attention", known))
        preset = data.get("preset")
        if isinstance(preset, str) and "maskers" not in data:  # a preset with some fields of the user's own
            own = {name: value for name, value in data.items() if name != "preset"}
            named = cls.parse(preset).to_dict()
            data = {**named, **own, "preset": None if {"dense_layers", "layers"} & set(own) else preset}
        return cls(**data)

    @classmethod
    def parse(cls, value: Any) -> SparseAttentionConfig:
        """Build a config from anything that ``sparse_attention=`` takes.

        Args:
            value: a config, a dict of fields, a list of maskers, the name of a shipped preset, or the path of a
                YAML or JSON file.

        Raises:
            ValueError: for anything else, an unknown preset (listing those there are), a broken file.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return _load_named(str(value))
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return cls(maskers=tuple(value))
        raise ValueError(
            "sparse_attention must be a dict, a list of maskers, a preset's name, a path or a "
            f"SparseAttentionConfig, got {value!r}{_lone(value)}"
        )

    def stack_of(self, layer_idx: int, num_layers: int) -> Stack:
        """The stack of one layer: its override or ``maskers``; empty for a dense layer."""
        if layer_idx in {index % num_layers for index in self.dense_layers if -num_layers <= index < num_layers}:
            return ()
        places = [where for where in self.layers if layer_idx in layers_at(where, num_layers)]
        if not places:
            return self.maskers
        return self.layers[min(places, key=lambda where: len(layers_at(where, num_layers)))]

    def check_layers(self, num_layers: int) -> list[str]:
        """Raise ``ValueError`` for a layer index that a model with ``num_layers`` does not have.

        A preset's indices are written for any model: theirs are returned as messages instead.
        """
        problems = [
            f"dense_layers: layer {index} does not exist (the model has {num_layers} layers)"
            for index in self.dense_layers
            if not -num_layers <= index < num_layers
        ]
        problems += [
            f"layers[{where!r}]: no such layer (the model has {num_layers} layers)"
            for where in self.layers
            if not layers_at(where, num_layers) or _beyond(where, num_layers)
        ]
        if problems and self.preset is None:
            raise ValueError(problems[0])
        for a, b in combinations(self.layers, 2):
            one, other = layers_at(a, num_layers), layers_at(b, num_layers)
            if len(one) == len(other) and set(one) & set(other) and self.layers[a] != self.layers[b]:
                raise ValueError(f"layers: {a!r} and {b!r} name the same layer and neither is the narrower range")
        return problems


def layers_at(where: str, num_layers: int) -> range:
    """Layer indices that an index (``"3"``, ``"-1"``) or a slice (``"8:12"``) names; empty where there are none."""
    if ":" not in where:
        index = int(where)
        index = index + num_layers if index < 0 else index
        return range(index, index + 1) if 0 <= index < num_layers else range(0)
    start, stop = (int(part) if part else None for part in where.split(":"))
    return range(*slice(start, stop).indices(num_layers))


def _beyond(where: str, num_layers: int) -> bool:
    """Whether a slice names an end that a model with ``num_layers`` does not have."""
    return any(part and not -num_layers <= int(part) <= num_layers for part in where.split(":") if ":" in where)


def parse_stack(stack: Any, path: str) -> Stack:
    """Masker configs of a list of configs, dicts or maskers; errors start with the culprit's path."""
    if isinstance(stack, str | bytes | Mapping | MaskerConfig | Masker) or not isinstance(stack, Sequence):
        raise ValueError(f"{path} must be a list of maskers, got {stack!r}{_lone(stack)}")
    configs = []
    for i, item in enumerate(stack):
        try:
            configs.append(MaskerRegistry.config_from(item))
        except ValueError as error:
            raise ValueError(f"{path}[{i}]{_joint(str(error))}{error}") from None
    return tuple(configs)


def _lone(value: Any) -> str:
    """A hint for one masker where a list of them is expected."""
    if isinstance(value, Masker | MaskerConfig):
        return "; put it into a list: [...]"
    if isinstance(value, Mapping) and "type" in value:
        return f"; one masker is written as a list too: [{json.dumps(dict(value), default=str)}]"
    return ""


def _joint(message: str) -> str:
    """Between a path and a message: a dot where the message starts with a field's name, else a colon."""
    return "." if re.match(r"[a-z]\w* (must|is missing)", message) else ": "


def _check_count(name: str, value: object) -> None:
    check_number(name, value, "an int >= 0")
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")


def _parse_indices(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, str | bytes) or not isinstance(indices, Sequence):
        raise ValueError(f"dense_layers must be a list of layer indices, got {indices!r}")
    for i, index in enumerate(indices):
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"dense_layers[{i}] must be an int (a layer index), got {index!r}")
    return tuple(indices)


def _parse_layers(layers: Any) -> dict[str, Stack]:
    if not isinstance(layers, Mapping):
        raise ValueError(f"layers must be a mapping of layer indices to lists of maskers, got {layers!r}")
    parsed = {}
    for where, stack in layers.items():
        key = str(where)
        try:
            if isinstance(where, bool):
                raise ValueError
            layers_at(key, 1)
        except ValueError:
            raise ValueError(f"layers: a key must be a layer index or a range such as '4:8', got {where!r}") from None
        parsed[key] = parse_stack(stack, f"layers[{key!r}]")
    return parsed


def _stack_data(stack: Stack) -> list[dict[str, Any]]:
    return [config.to_dict() for config in stack]


def presets_folder() -> Path:
    """Where the shipped presets lie: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def _load_named(name: str) -> SparseAttentionConfig:
    names = preset_names()
    if name in names:
        data = read_plain(presets_folder() / f"{name}.yaml")
        return SparseAttentionConfig.from_dict({**data, "preset": name})
    if not name.lower().endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"sparse_attention: {unknown_name(name, 'preset', names)} (or the path of a .yaml or .json)")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"sparse_attention: no such file: {name}")
    data = read_plain(path)
    try:
        return SparseAttentionConfig.parse(list(data) if isinstance(data, list) else data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_plain(path: Path) -> Any:
    """Plain data of a YAML or JSON file; tags that would construct objects are refused.

    Raises:
        ValueError: naming the file, the place and the fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from None
    if isinstance(data, str) or data is None:
        raise ValueError(f"{path} must hold a mapping of fields or a list of maskers, got {data!r}")
    return data
