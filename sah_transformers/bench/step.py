"""A whole decode step of ``generate()``: a Llama of random weights over a cache of random keys, sparse beside dense.

Nothing is prefilled: the keys are written to the cache. The first tokens of a call of ``generate()``, in which steps
are captured, do not count: wall time is taken between later ones, the device's as the difference between two calls.
"""

from __future__ import annotations

import functools
import gc
import re
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria
from transformers.generation import CompileConfig

import sah_transformers
from sah_transformers.bench.check import Checked, CheckFailed
from sah_transformers.bench.suites import Case
from sah_transformers.integration import AppendingCache, CudaGraphConfig
from sah_transformers.integration.static_layer import one_launch_cache

SHORT, STEPS, REPEATS = 4, {"cpu": 2, "cuda": 24}, 3
"""New tokens that do not count, how many more do, and how often these are timed."""

PROFILED = 8
"""At most so many more, where each kernel is told apart: that takes seconds per token."""

MOST_ERROR = 5e-2
"""Relative error of the logits over all keys: rounding in every layer of a model of random weights."""

PARTS = {
    "matrix products": r"gemm|gemv|cublas|nvjet|splitk|triton_tem|aten::(addmm|mm|bmm|linear)$",
    "attention": r"fmha|flash|sdpa|dot_product|(bands|merge|combine|gather\w*|stream)_kernel",
    "cache": r"CatArray|append_token|aten::cat|index_copy|index_put|Memcpy DtoD|copy_kernel|aten::copy_",
    "selection": r"(sample\w*|\w*score\w*|histogram\w*|threshold\w*|count|bounds|select\w*|follow|fold\w*|"
    r"line|\w*level\w*|edge|settle|hash|label|code|table|pieces|bucket)_kernel|topk|sort",
}
"""What a kernel (on a CPU: an operator) belongs to, by its name. All else is "rest"."""


GROWING, REPLAYED, COMPILED = "growing cache", "replayed", "static + compile"
"""Modes: uncompiled over a cache that grows; uncompiled over a static cache, replayed as a CUDA graph, which is the
default of sparse models; compiled by Transformers over a static cache, and replayed."""


@dataclass(frozen=True)
class Way:
    """One way to decode: sparse or dense, and how."""

    sparse: bool
    mode: str

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{'sah' if self.sparse else 'sdpa'}, {self.mode}"


WAYS = [Way(True, mode) for mode in (GROWING, REPLAYED, COMPILED)] + [Way(False, mode) for mode in (GROWING, COMPILED)]


@dataclass
class Step:
    """What a step takes.

    Attributes:
        wall_ms: per token of ``generate()``.
        gpu_ms: of which the device works (on a CPU: the operators, which the profiler slows down); parts_ms: by
            ``PARTS``, and "rest".
        host_ms: of which the device waits for the host.
        peak_gib: largest memory while decoding; of_need: over weights, keys and values.
        tokens: what was generated, to compare.
        error: why there is nothing.
    """

    wall_ms: float = 0.0
    gpu_ms: float = 0.0
    host_ms: float = 0.0
    parts_ms: dict[str, float] = field(default_factory=dict)
    peak_gib: float | None = None
    of_need: float | None = None
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        if self.error:
            return {"error": self.error}
        data = {name: float(f"{value:.4g}") for name, value in vars(self).items() if isinstance(value, float)}
        return {**data, "parts_ms": {name: float(f"{ms:.4g}") for name, ms in self.parts_ms.items()}}


@functools.lru_cache(1)
def model_of(
    layers: int, hidden: int, intermediate: int, vocab: int, H: int, G: int, D: int, dtype: str, device: str
) -> Any:
    """A Llama of random weights."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    return model.eval()


def random_model(case: Case, device: str) -> Any:
    """The model of a case."""
    sizes = (case.layers, case.H * case.D, case.intermediate, case.vocab)
    return model_of(*sizes, case.H, case.G, case.D, case.dtype, device)  # type: ignore[arg-type]


def steps_of(case: Case, device: str, kernel: str, say: Callable[[str], object] = str) -> dict[str, Step]:
    """Every way's step, by name. Dense steps do not depend on the stack: those of a run are shared by its cases.

    Args:
        say: takes a line as each way is done.
    """
    if device != "cpu":
        model_of.cache_clear()  # room for the other processes'
        gc.collect()
        torch.cuda.empty_cache()
    names = ("K", "B", "H", "G", "D", "padding", "dtype", "layers", "intermediate", "vocab")
    sizes = {name: getattr(case, name) for name in names}
    steps = {}
    for way in WAYS:
        dense = functools.partial(_dense_step, device, way, **sizes)
        steps[way.name] = alone(device, step_of, case, device, kernel, way) if way.sparse else dense()
        say(f"{case.label}: {way.name}: {in_short(steps[way.name], device)}")
    return steps


def in_short(step: Step, device: str) -> str:
    """A step in a line."""
    work = "its operators under the profiler:" if device == "cpu" else "of which the device works"
    return step.error or f"{step.wall_ms:.4g} ms per token, {work} {step.gpu_ms:.4g}"


@functools.lru_cache(32)
def _dense_step(device: str, way: Way, **sizes: Any) -> Step:
    case = Case(suite="", name="", op="step", maskers=_ANY, **sizes)
    return alone(device, step_of, case, device, "auto", way)


def alone(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, on a GPU in a process of its own.

    What PyTorch's profiler leaves behind in a process makes later launches slower, and nothing that another way holds
    on to is counted in a way's memory.
    """
    if device == "cpu":
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def step_of(case: Case, device: str, kernel: str, way: Way) -> Step:
    """One way's step."""
    model = random_model(case, device)
    if not way.sparse:
        return _step(case, model, way)
    sah_transformers.enable(model, {"maskers": [one.to_dict() for one in case.maskers], "kernel": kernel})
    try:
        return _step(case, model, way)
    finally:
        sah_transformers.disable(model)


_ANY = (sah_transformers.CausalMaskerConfig(),)


def _step(case: Case, model: Any, way: Way) -> Step:
    try:
        return measured(case, model, way)
    except Exception as error:  # out of memory, code that does not compile: the other ways go on
        return Step(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        for name in ("_compiled_call", "_last_compile_config"):
            model.__dict__.pop(name, None)
        if way.mode == COMPILED:
            torch.compiler.reset()
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(case: Case, model: Any, way: Way, heads: slice = slice(None)) -> Step:
    """A step of ``model`` one way; ``heads``: the KV heads that the model has of the case's, on a rank of several."""
    kind = model.device.type
    more = STEPS[kind]
    cache = filled(case, model, way, case.K + SHORT + more, heads)

    def decode(tokens: int, **options: Any) -> torch.Tensor:
        found = generate(case, model, cache, way, tokens, **options)[:, case.K + 1 :]
        rewind(cache, case.K)
        return found

    first = decode(SHORT + more)  # compiles, catches side data up
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = Step(tokens=first.flatten().tolist())
    clocks = [Clock() for _ in range(REPEATS)]
    for clock in clocks:
        decode(SHORT + more, stopping_criteria=[clock])
    step.wall_ms = statistics.median(clock.between(SHORT - 1, SHORT + more - 1) / more * 1e3 for clock in clocks)
    if kind == "cuda":
        step.peak_gib, step.of_need = peak(case, model, case.K + SHORT + more)
    more = min(more, PROFILED)
    long, short = parts(decode, SHORT + more, kind), parts(decode, SHORT, kind)
    step.parts_ms = {name: max(0.0, long[name] - short[name]) / more for name in (*PARTS, "rest")}
    step.gpu_ms = sum(step.parts_ms.values())
    step.host_ms = max(0.0, step.wall_ms - step.gpu_ms)
    return step


def peak(case: Case, model: Any, keys: int) -> tuple[float, float]:
    """(GiB, share of the weights and so many ``keys`` with their values) of the device's largest memory."""
    held = 2 * keys * case.B * case.G * case.D * model.dtype.itemsize * model.config.num_hidden_layers
    most = torch.cuda.max_memory_allocated()
    return most / 2**30, most / (sum(parameter.nbytes for parameter in model.parameters()) + held)


def filled(case: Case, model: Any, way: Way, most: int, heads: slice = slice(None)) -> Any:
    """A cache of ``K`` random keys and values in every layer; the same for every way and rank."""
    config = model.config
    if way.mode == REPLAYED:
        cache: Any = one_launch_cache(config, most)
    elif way.mode == COMPILED:
        cache = StaticCache(config=config, max_cache_len=most)
    elif way.sparse:
        cache = AppendingCache(config=config, max_length=most)
    else:
        cache = DynamicCache(config=config)
    generator = torch.Generator(model.device).manual_seed(1)
    shape = (case.B, case.G, case.K, case.D)
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        cache.update(keys[:, heads], values[:, heads], layer)
    return cache


def rewind(cache: Any, length: int) -> None:
    """Take what was generated back off the cache."""
    for layer in cache.layers:
        state = getattr(layer, "sah_state", None)
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(length)
            if state is not None:
                state.crop(length)
        else:
            layer.crop(length - layer.get_seq_length())


def generate(case: Case, model: Any, cache: Any, way: Way, tokens: int, **options: Any) -> Any:
    """What ``generate()`` returns of so many new tokens behind the cached keys; ``options`` are further ones."""
    ids = torch.full((case.B, case.K + 1), 3, device=model.device)
    real = attention_mask(case, model.device)
    if way.mode == REPLAYED:
        options["compile_config"] = CudaGraphConfig()
    elif way.mode == COMPILED and model.device.type == "cpu":
        compiling: Any = {"backend": "aot_eager", "mode": None}
        options["compile_config"] = CompileConfig(**compiling)
        options["compile_config"]._compile_all_devices = True
    given = {"attention_mask": real, "past_key_values": cache, "max_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, **given, **options)


def attention_mask(case: Case, device: Any) -> torch.Tensor:
    """Which of the cached keys and the token behind them are real: int64 ``[B, K + 1]``, padding on the left."""
    first = torch.linspace(0, case.padding * case.K, case.B, device=device).long()
    return (torch.arange(case.K + 1, device=device) >= first[:, None]).long()


class Clock(StoppingCriteria):
    """Notes when each token of a generation was chosen; stops nothing. The loop waits for each token by itself."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """No sequence is to stop: bool ``[B]``."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def between(self, first: int, last: int) -> float:
        """Seconds between two tokens."""
        return self.times[last] - self.times[first]


def parts(decode: Any, tokens: int, kind: str) -> dict[str, float]:
    """ms that each part takes in a whole generation."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    with warnings.catch_warnings(action="ignore"), profile(activities=[activity]) as profiled:
        decode(tokens).tolist()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.events() or ():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == (kind == "cuda"):
            times[part_of(event.name)] += (event.device_time if on_device else event.self_cpu_time_total) / 1e3
    return times


@functools.cache
def part_of(name: str) -> str:
    """The part that a kernel's name says it belongs to."""
    order = ("attention", *PARTS)  # flash attention's names speak of products, too
    return next((part for part in order if re.search(PARTS[part], name, re.IGNORECASE)), "rest")


@torch.no_grad()
def check_step(case: Case, device: str, kernel: str) -> Checked:
    """One step's logits, sparse with every key selected, against dense ones.

    Raises:
        CheckFailed: saying how far they are apart.
    """
    model = random_model(case, device)
    cache = filled(case, model, Way(True, GROWING), case.K + 1)
    token = torch.full((case.B, 1), 3, device=model.device)
    given = {"attention_mask": attention_mask(case, device)} if case.padding else {}
    dense = model(token, past_key_values=cache, **given).logits.float()
    rewind(cache, case.K)
    sah_transformers.enable(model, {"maskers": [{"type": "oracle_top_k", "heavy_size": 1.0}], "kernel": kernel})
    try:
        sparse = model(token, past_key_values=cache, **given).logits.float()
    finally:
        sah_transformers.disable(model)
    error = (torch.linalg.vector_norm(sparse - dense) / torch.linalg.vector_norm(dense)).item()
    if not error <= MOST_ERROR:
        raise CheckFailed(f"over all keys the logits are {error:.1e} off the dense ones, more than {MOST_ERROR:.0e}")
    return Checked(error, rows=case.B, apart=0, kept=float(case.K + 1))
