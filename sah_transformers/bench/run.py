"""One case, from its tensors to a result: checked, then timed, then held against its targets."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sah_transformers import sparse_attention
from sah_transformers.attention import make_call, run
from sah_transformers.bench.check import Checked, CheckFailed, check_attention, check_mask
from sah_transformers.bench.dense import dense_functions
from sah_transformers.bench.inputs import Step, Tensors, call_of, maskers_of, previous_mask, tensors
from sah_transformers.bench.suites import AT_MOST, Case
from sah_transformers.bench.timing import SECONDS, Function, Times, compare, first_call, host_us, stage_us
from sah_transformers.maskers import MaskerRegistry
from sah_transformers.selections import First, Last
from sah_transformers.state import LayerState

CPU_SECONDS = 0.3
"""Of sampling a case on a CPU, where figures are no measure of anything but that it runs."""

MOST_PREFILL = 2**15
"""Keys up to which building side data is compared with a dense prefill."""


@dataclass(frozen=True)
class Setup:
    """What all cases of a run share: device, kernel, the copy rate measured in this run, whether to profile, and what
    takes a line on the way."""

    device: str
    kernel: str
    copy_rate: float
    stages: bool = False
    say: Callable[[str], object] = str

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device != "cpu"


@dataclass
class Result:
    """What became of a case.

    Attributes:
        status: ``"ok"``, ``"FAILED"`` (wrong, or an error), ``"not covered"`` (the kernel refuses it) or ``"skipped"``.
        note: why, in words.
        measures: values by the names of ``suites.AT_MOST`` and ``AT_LEAST``, as far as they apply.
        bytes: that the operation has to move at least.
        steps: a decode step of a whole model, by the way it is done; prompts: reading a prompt, likewise.
    """

    case: Case
    status: str = "ok"
    note: str = ""
    checked: Checked | None = None
    ours: Times | None = None
    dense: dict[str, Times] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    host: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes: int | None = None
    share_of_copy: float | None = None
    stages_us: dict[str, float] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)

    @property
    def best_dense(self) -> str | None:
        """The fastest dense backend."""
        return min(self.dense, key=lambda name: self.dense[name].p50, default=None)

    def met(self, target: str) -> bool | None:
        """Whether a target is met; None where it was not measured."""
        value, limit = self.measures.get(target), self.case.target[target]
        if value is None:
            return None
        return value <= limit if target in AT_MOST else value >= limit

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = {"label": self.case.label, **self.case.to_dict(), "status": self.status}
        if self.note:
            data["note"] = self.note
        if self.checked is not None:
            data["check"] = vars(self.checked)
        if self.ours is not None:
            data["ours"] = self.ours.to_dict()
        if self.dense:
            data["dense"] = {name: times.to_dict() for name, times in self.dense.items()}
            data["best_dense"] = self.best_dense
        data["measures"] = {name: float(f"{value:.4g}") for name, value in self.measures.items()}
        data["met"] = {name: self.met(name) for name in self.case.target}
        for name in ("host", "bytes", "share_of_copy", "stages_us"):
            if getattr(self, name):
                data[name] = getattr(self, name)
        for name in ("steps", "prompts"):
            if getattr(self, name):
                data[name] = {way: one.to_dict() for way, one in getattr(self, name).items()}
        return data


def run_case(case: Case, setup: Setup) -> Result:
    """Check and measure a case. Nothing that goes wrong in it stops the run."""
    if not setup.cuda and not case.cpu:
        return Result(case, "skipped", "needs a GPU")
    result = Result(case)
    try:
        with torch.no_grad():
            operations = {
                "attention": _attention, "layer_step": _layer_step, "add_mask": _add_mask, "host": _host, "step": _step,
                "prompt": _prompt,
            }  # fmt: skip
            operations[case.op](result, setup)
    except CheckFailed as error:
        result.status, result.note = "FAILED", str(error)
    except Exception as error:  # out of memory, a kernel that does not compile: the other cases go on
        refused = isinstance(error, ValueError) and "cannot take this call" in str(error)
        result.status = "not covered" if refused else "FAILED"
        result.note = str(error).split("cannot take this call: ")[-1] if refused else f"{type(error).__name__}: {error}"
    gc.collect()
    if setup.cuda:
        torch.cuda.empty_cache()
    return result


def _attention(result: Result, setup: Setup) -> None:
    case = result.case
    inputs = tensors(case, setup.device)
    call = call_of(case, inputs, setup.kernel)

    def ours() -> torch.Tensor:
        return run(call)[0]

    out, extra = first_call(ours, setup.cuda)
    if extra is not None:
        result.measures["extra_mib"] = extra
    result.checked = check_attention(case, inputs, call, out)
    dense = dense_functions(inputs)
    _time(result, setup, ours, dense, _attention_bytes(case, inputs, result.checked.kept), out)


def _layer_step(result: Result, setup: Setup) -> None:
    case = result.case
    inputs = tensors(case, setup.device)
    queries, keys, values = inputs
    step = Step(case, inputs, setup.kernel)

    def ours() -> torch.Tensor:
        return run(step.call())[0]

    out, extra = first_call(ours, setup.cuda)
    if extra is not None:
        result.measures["extra_mib"] = extra
    result.checked = check_attention(case, inputs, step.call(), out)
    grouped = any(getattr(masker.config, "gqa", "head") == "group" for masker in step.maskers)
    row = case.D * (keys.element_size() + values.element_size())
    moved = step.side_bytes() + int(case.B * (case.G if grouped else case.H) * result.checked.kept * row)
    _time(result, setup, ours, dense_functions(inputs), moved + 2 * queries.nbytes, out)
    seconds = 0.3 if setup.cuda else CPU_SECONDS
    append = compare({"append": step.call}, setup.cuda, seconds)["append"]
    result.measures["append_us"] = append.p50 * 1e3
    if case.K <= MOST_PREFILL:
        _build(result, setup, step)


def _build(result: Result, setup: Setup, step: Step) -> None:
    """Side data of all keys at once, against the dense attention of a prompt of that many."""
    case, (_, keys, values) = result.case, step.inputs

    def build() -> Any:
        queries = step.inputs[0][:, :, :1]
        return make_call(queries, keys, values, step.maskers, layer_state=LayerState(), kernel=setup.kernel)

    prompt = torch.randn(case.B, case.H, case.K, case.D, dtype=keys.dtype, device=keys.device)
    dense = dense_functions((prompt, keys, values))
    times = compare({"build": build, **dense}, setup.cuda, 0.5 if setup.cuda else CPU_SECONDS)
    result.measures["build_ms"] = times.pop("build").p50
    result.measures["build_ratio"] = result.measures["build_ms"] / min(each.p50 for each in times.values())


def _add_mask(result: Result, setup: Setup) -> None:
    case = result.case
    inputs = tensors(case, setup.device)
    queries, keys, values = inputs
    previous = previous_mask(case, setup.device)
    masker = MaskerRegistry.create_masker(case.maskers[-1])

    def ours() -> Any:
        return masker.add_mask(keys, queries, values, is_causal=True, previous_mask=previous, kernel=setup.kernel)

    result.checked = check_mask(case, inputs, previous, ours())
    mask_bytes = case.B * case.H * case.Q * case.K
    moved = queries.nbytes + keys.nbytes + mask_bytes * (1 if previous is None else 2)
    _time(result, setup, ours, {}, moved)


def _time(
    result: Result, setup: Setup, ours: Function, dense: dict[str, Any], moved: int, out: torch.Tensor | None = None
) -> None:
    times = compare({"ours": ours, **dense}, setup.cuda, SECONDS if setup.cuda else CPU_SECONDS, out)
    result.ours = times.pop("ours")
    result.dense = times
    ms = result.ours.p50
    if result.best_dense is not None:
        result.measures["dense_ratio"] = ms / times[result.best_dense].p50
        result.measures["dense_speedup"] = times[result.best_dense].p50 / ms
    if result.case.predecessor_ms is not None and setup.cuda:  # measured on an H100
        result.measures["predecessor_speedup"] = result.case.predecessor_ms / ms
    result.bytes = moved
    result.share_of_copy = float(f"{moved / ms * 1e3 / setup.copy_rate:.3g}")
    if setup.stages:
        result.stages_us = stage_us(ours, setup.cuda)


def _host(result: Result, setup: Setup) -> None:
    case = result.case
    inputs = tensors(case, setup.device)
    call = call_of(case, inputs, setup.kernel)
    maskers = list(case.maskers)
    out, extra = first_call(lambda: run(call)[0], setup.cuda)
    if extra is not None:
        result.measures["extra_mib"] = extra
    result.checked = check_attention(case, inputs, call, out)
    result.host["call"] = host_us(lambda: run(call), setup.cuda)
    result.host["sparse_attention"] = host_us(
        lambda: sparse_attention(*inputs, maskers, kernel=setup.kernel, return_mask=False), setup.cuda
    )
    result.measures["host_us"] = result.host["call"]["p50_us"]
    result.measures["api_us"] = result.host["sparse_attention"]["p50_us"]


def _step(result: Result, setup: Setup) -> None:
    """``ours`` is the faster of the sparse ways; what it is held against, the faster of the dense ones."""
    from sah_transformers.bench.step import WAYS, check_step, steps_of

    result.checked = check_step(result.case, setup.device, setup.kernel)
    result.steps = steps_of(result.case, setup.device, setup.kernel, setup.say)
    done = {way: result.steps[way.name] for way in WAYS if not result.steps[way.name].error}
    ours = min((step for way, step in done.items() if way.sparse), key=lambda step: step.wall_ms, default=None)
    if ours is None:
        raise RuntimeError("; ".join(f"{name}: {step.error}" for name, step in result.steps.items() if step.error))
    result.ours = _wall(ours.wall_ms)
    for way, step in done.items():
        if not way.sparse:
            result.dense[way.name] = _wall(step.wall_ms)
    if setup.cuda:
        result.measures |= {"gpu_ms": ours.gpu_ms, "wall_ms": ours.wall_ms, "of_need": ours.of_need or 0.0}
    if result.best_dense is not None:
        result.measures["dense_ratio"] = ours.wall_ms / result.dense[result.best_dense].p50


def _prompt(result: Result, setup: Setup) -> None:
    """``ours`` is the sparse model that reads the prompt at once."""
    from sah_transformers.bench.prompt import prompts_of

    result.prompts = prompts_of(result.case, setup.device, setup.kernel)
    (_, ours), *others = result.prompts.items()
    if ours.error:
        raise RuntimeError(ours.error)
    if any(not other.error and other.token != ours.token for _, other in others):
        result.note = "the ways differ in the first token (a near-tie of random weights, or an error)"
    result.ours = _wall(ours.seconds * 1e3)
    for name, other in others:
        if name.startswith("sdpa") and not other.error:
            result.dense[name] = _wall(other.seconds * 1e3)
    if result.best_dense is not None:
        result.measures["dense_ratio"] = result.ours.p50 / result.dense[result.best_dense].p50
    if ours.of_need is not None:
        result.measures["of_need"] = ours.of_need


def _wall(ms: float) -> Times:
    return Times(ms, ms, ms, "wall")


def _attention_bytes(case: Case, inputs: Tensors, kept: float) -> int:
    """What an exact call has to move: each input that is needed once, the output, scores of few rows there and back."""
    queries, keys, values = inputs
    selections = [masker.describe() for masker in maskers_of(case)]
    windows = all(isinstance(one, First | Last) for one in selections)
    if case.Q > 1:
        return 2 * queries.nbytes + keys.nbytes + values.nbytes
    grouped = windows or any(getattr(one, "group", False) for one in selections)
    row = case.D * values.element_size()
    read = min(values.nbytes, int(case.B * (case.G if grouped else case.H) * kept * row))
    if windows:
        return 2 * queries.nbytes + 2 * read
    return 2 * queries.nbytes + keys.nbytes + read + 2 * 4 * case.B * case.H * case.K
