"""What is measured: cases with their targets, from the YAML files in ``configs/bench``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sah_transformers.config import parse_stack, presets_folder, read_plain
from sah_transformers.maskers import MaskerConfig
from sah_transformers.spelling import unknown_name

OPERATIONS = ("attention", "layer_step", "add_mask", "host", "step", "prompt")
DTYPES = ("float32", "bfloat16", "float16")
PREVIOUS = ("empty", "half")
MANY = ("K", "S", "B", "dtype", "previous", "q_scale")
"""Fields of an entry that may hold a list: one case for each value."""

AT_MOST = {
    "dense_ratio": "x dense",
    "extra_mib": " MiB",
    "append_us": " us (append)",
    "build_ratio": "x dense prefill (build)",
    "host_us": " us (call)",
    "api_us": " us (sparse_attention)",
    "gpu_ms": " ms (GPU)",
    "wall_ms": " ms (wall)",
    "of_need": "x weights + KV",
}
AT_LEAST = {
    "dense_speedup": "x faster",
    "predecessor_speedup": "x faster than predecessor",
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        suite, name: where it comes from and what it is called.
        op: ``"attention"``: the whole call against dense SDPA; ``"layer_step"``: the same with side data of all keys
            but the last, which is appended; ``"add_mask"``: the last masker's ``add_mask``; ``"host"``: time of the
            host and memory of an eager call; ``"step"``: a decode step of a whole model; ``"prompt"``: reading a
            prompt of a whole model.
        B, H, G, Q, K, D: sizes; ``S`` in the file stands for Q = K.
        dtype: of queries, keys and values.
        maskers: the stack.
        q_scale: factor on the random queries: larger is more peaked.
        previous: what ``add_mask`` starts from: ``"empty"``, or ``"half"`` of the visible keys at random.
        target: what is to be reached, by the names in ``AT_MOST`` and ``AT_LEAST``; on a GPU.
        predecessor_ms: measured time of sparse-attention-hub's mask update at this shape.
        cpu: small enough for a CPU.
        layers, intermediate, vocab: of the model whose step is measured.
        padding: share of the keys that are padding in the shortest sequence of the batch; the longest has none.
    """

    suite: str
    name: str
    K: int
    maskers: tuple[MaskerConfig, ...]
    op: str = "attention"
    B: int = 1
    H: int = 32
    G: int = 8
    Q: int = 1
    D: int = 128
    dtype: str = "bfloat16"
    q_scale: float = 1.0
    previous: str = "empty"
    target: Mapping[str, float] = field(default_factory=dict)
    predecessor_ms: float | None = None
    cpu: bool = False
    layers: int | None = None
    intermediate: int | None = None
    vocab: int | None = None
    padding: float = 0.0

    def __post_init__(self) -> None:
        model = ("layers", "intermediate", "vocab") if self.op in ("step", "prompt") else ()
        for name in ("B", "H", "G", "Q", "K", "D", *model):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if self.H % self.G:
            raise ValueError(f"H must be a multiple of G, got H={self.H}, G={self.G}")
        if self.Q > self.K:
            raise ValueError(f"Q must be at most K, got Q={self.Q}, K={self.K}")
        for name, known in (("op", OPERATIONS), ("dtype", DTYPES), ("previous", PREVIOUS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.padding < 1 or (self.padding and (self.B == 1 or self.op != "step")):
            raise ValueError(f"padding must be in [0, 1), 0 unless op is step and B > 1, got {self.padding!r}")
        if not self.maskers:
            raise ValueError("stack must name at least one masker")
        for name in self.target:
            if name not in AT_MOST and name not in AT_LEAST:
                raise ValueError(f"target: {unknown_name(name, 'measure', [*AT_MOST, *AT_LEAST])}")

    @property
    def label(self) -> str:
        """Name and what tells the case from its neighbours."""
        parts = [self.name, f"Q=K={self.K:,}" if self.Q == self.K else f"{self.K:,} keys"]
        if self.B > 1:
            parts.append(f"B={self.B}")
        if self.padding:
            parts.append(f"up to {self.padding:.0%} padding")
        if self.q_scale != 1:
            parts.append(f"q x {self.q_scale:g}")
        if self.op == "add_mask":
            parts += [self.dtype, f"previous {self.previous}"]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return {**data, "maskers": [masker.to_dict() for masker in self.maskers], "target": dict(self.target)}


def suites_folder() -> Path:
    """Where the shipped suites lie."""
    return presets_folder() / "bench"


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in suites_folder().glob("*.yaml"))


def load_suite(name: str) -> list[Case]:
    """The cases of a shipped suite, or of a YAML file of one's own.

    Raises:
        ValueError: for an unknown name (listing the known ones), or naming the file, the case and the fault.
    """
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if name not in suite_names():
            raise ValueError(f"{unknown_name(name, 'suite', suite_names())} (or the path of a .yaml)")
        path = suites_folder() / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    data = read_plain(path)
    known = ("defaults", "stacks", "cases")
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list):
        raise ValueError(f"{path} must hold a mapping with a list of cases")
    for key in data:
        if key not in known:
            raise ValueError(f"{path}: {unknown_name(key, 'field', known)}")
    cases = []
    for i, entry in enumerate(data["cases"]):
        try:
            cases += _expand(path.stem, {**data.get("defaults", {}), **entry}, data.get("stacks", {}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: cases[{i}]: {error}") from None
    return cases


def _expand(suite: str, entry: dict[str, Any], stacks: dict[str, Any]) -> list[Case]:
    """One case for each combination of the entry's lists."""
    known = [f.name for f in fields(Case) if f.name not in ("suite", "maskers")] + ["S", "stack"]
    for name in entry:
        if name not in known:
            raise ValueError(unknown_name(name, "field", known))
    stack = entry.pop("stack", None)
    if isinstance(stack, str):
        if stack not in stacks:
            raise ValueError(unknown_name(stack, "stack", stacks))
        stack = stacks[stack]
    maskers = parse_stack(stack, "stack")
    lists = {name: entry[name] for name in MANY if isinstance(entry.get(name), list)}
    cases = []
    for values in itertools.product(*lists.values()):
        one = {**entry, **dict(zip(lists, values, strict=True))}
        if "S" in one:
            one["Q"] = one["K"] = one.pop("S")
        if isinstance(one.get("predecessor_ms"), dict):  # by dtype
            one["predecessor_ms"] = one["predecessor_ms"][one["dtype"]]
        cases.append(Case(suite=suite, maskers=maskers, **one))
    return cases
