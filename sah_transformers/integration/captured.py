"""Decode steps of ``generate()`` as one CUDA graph: captured once per call, then replayed for every token.

An uncompiled step is bound by Python, which takes several times as long to launch a layer as a GPU to run it.
``torch.compile`` avoids that, but compiles for most of a minute; capturing the uncompiled step costs about one step
more. So ``generate()`` of a sparse model on a GPU takes a static cache by default, and replays, where that can be
exact: greedy search or sampling, a model on one device or sharded over ranks, full attention in every layer, kernels
for every sparse one, no hooks that a graph would not call. Elsewhere it takes the cache that appends in place; with
``disable_compile=True``, everywhere.

A step runs once before it is captured. What it is given is copied to where the graph reads it, logits are copied out.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as modules
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import CompileConfig
from transformers.utils import logging

from sah_transformers.integration.cache_state import carrying
from sah_transformers.integration.models import attention_modules
from sah_transformers.integration.operator import could_take
from sah_transformers.integration.plan import plan_of
from sah_transformers.integration.static_layer import OneLaunchLayer, one_launch_cache

logger = logging.get_logger(__name__)

CAPTURED = ("cuda",)
"""Types of devices on which a ``generate()`` that asks for no cache replays its steps."""

MOST_OF_FREE = 0.9
"""Share of the free memory that a cache may take which holds room for all tokens from the beginning."""

MOST_FOR_LATER = 0.5
"""As ``MOST_OF_FREE``, for the tokens behind the prompt: another cache has no room for them while that is read."""

MOST_FAILURES = 3
"""A model that could not be captured so often takes the cache that appends: PyTorch may keep what a try allocated."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")

KNOWN = ("sah_transformers", "torch", "transformers")
"""Packages whose hooks do the same work at every step."""

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CudaGraphConfig(CompileConfig):
    """For ``generate(compile_config=...)`` with a static cache: decode steps are replayed as a CUDA graph, uncompiled.

    Sparse models do so by default (see the module); dense ones, and caches of your own, when asked. What cannot be
    captured runs uncompiled, and the log says why.
    """

    _compile_all_devices: Any = True  # `generate()` asks for the call everywhere; on a CPU it is not replayed


class _Thread(threading.local):
    """What belongs to one thread: the step that it runs, and streams by device, as each gets memory of cuBLAS's."""

    step: CapturedSteps | None = None

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


_thread = _Thread()

_swapping = threading.Lock()

_failures: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by model


def step_underway() -> CapturedSteps | None:
    """The step that this thread runs to capture it, or None."""
    return _thread.step


def stream_on(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which this thread captures."""
    if device.type == "cuda" and device not in _thread.streams:
        _thread.streams[device] = torch.cuda.Stream(device)
    return _thread.streams.get(device)


class CapturedSteps:
    """A model's call in ``generate()``: steps of one token are replayed, all else runs as ever.

    Attributes:
        inputs: what the graph reads, by name; replay: runs it; outputs: what it writes.
        refused: why the last step that was run cannot be captured, or ""; reason: why none is to be from now on.
        room: tokens that the cache surely takes before its length has to be asked for.
    """

    def __init__(self, model: Any):
        self.model = model
        self.inputs: dict[str, Any] | None = None
        self.replay: Callable[[], None] | None = None
        self.outputs: Any = None
        self.refused = ""
        self.reason = "" if model.device.type in CAPTURED else "no such device"
        self.room = 0
        self.stream = stream_on(model.device)

    def __call__(self, **inputs: Any) -> Any:
        """What ``model(**inputs)`` gives.

        Raises:
            IndexError: a static cache is full.
        """
        if not is_step(inputs):
            self.room = 0
            return self.model(**inputs)
        self._count(inputs["past_key_values"])
        if self.reason:
            return self.model(**inputs)
        if self.inputs is None:
            return self._first(inputs)
        if not self._take(inputs):
            return self.model(**inputs)
        if self.replay is None:
            try:
                self.replay, self.outputs = capture(self._run, self.stream)
            except Exception as error:  # what a model does may need the host, or another stream
                _failures[self.model] = _failures.get(self.model, 0) + 1
                self._leave(f"it cannot be captured: {(str(error).strip() or repr(error)).splitlines()[0]}")
                return self.model(**inputs)
        self.replay()
        return tree_map(copied, self.outputs, is_leaf=is_cache)

    def _count(self, cache: StaticCache) -> None:
        """A token comes. A graph would not notice that there is no room for it; the device is seldom asked."""
        layer: Any = cache.layers[0]
        if self.room <= 0:
            self.room = layer.max_cache_len - int(layer.get_seq_length())
        if self.room <= 0:
            raise IndexError(f"the static cache is full: it has room for {layer.max_cache_len} tokens")
        self.room -= 1

    def left(self, reason: str) -> None:
        """A layer says that its call is no part of a graph, for now: it may lack keys for its codebooks."""
        self.refused = reason

    def _leave(self, reason: str) -> None:
        self.reason, self.inputs, self.replay, self.outputs = reason, None, None, None
        logger.warning_once(f"decode steps are not replayed as a CUDA graph: {reason}")

    def _first(self, inputs: dict[str, Any]) -> Any:
        """The step before the one that is captured, on the stream where that will be: it prepares what that needs."""
        self.inputs = tree_map(copied, inputs, is_leaf=is_cache)
        outputs = aside(self._run, self.stream)
        values = tree_leaves((inputs, outputs), is_leaf=is_cache)
        if not all(_plain(value) or value is inputs["past_key_values"] for value in values):
            self._leave("the model takes or gives more than tensors and numbers")
        elif self.refused:
            logger.warning_once(f"some decode steps are not replayed as a CUDA graph: {self.refused}")
            self.inputs = None  # the next one is a first one again
        return outputs

    def _run(self) -> Any:
        assert self.inputs is not None
        outer, _thread.step, self.refused = _thread.step, self, ""
        try:
            return self.model(**self.inputs)
        finally:
            _thread.step = outer

    def _take(self, inputs: dict[str, Any]) -> bool:
        """Copy a step's inputs to where the graph reads them; whether they are of its kind."""
        (new, kind), (held, held_kind) = (tree_flatten(one, is_leaf=is_cache) for one in (inputs, self.inputs))
        if kind != held_kind or not all(map(_alike, new, held)):
            return False
        for value, own in zip(new, held, strict=True):
            if isinstance(value, torch.Tensor):
                own.copy_(value)
        return True


def is_step(inputs: dict[str, Any]) -> bool:
    """Whether a call reads one token behind those of a static cache that counts on the device alone."""
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return False
    plain = isinstance(cache, StaticCache) and not cache.offloading and all(map(counts_on_device, cache.layers))
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled(ids.device.type)


def counts_on_device(layer: Any) -> bool:
    """Whether a cache layer is a plain static one, with side data or without: no rolling window, no Python number."""
    return type(layer) in (StaticLayer, carrying(StaticLayer), OneLaunchLayer, carrying(OneLaunchLayer))


def is_cache(value: Any) -> bool:
    """Whether a value is a cache: one object, whatever exporting a model taught PyTorch to see in it."""
    return isinstance(value, Cache)


def copied(value: Any) -> Any:
    """A tensor's copy; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _plain(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, *PLAIN))


def _alike(value: Any, held: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
        return (value.shape, value.dtype, value.device) == (held.shape, held.dtype, held.device)
    return value is held or (isinstance(value, PLAIN) and value == held)


def aside(run: Callable[[], Any], stream: torch.cuda.Stream | None) -> Any:
    """``run()`` on another stream, after what the current one did and before what it will do."""
    if stream is None:
        return run()
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = run()
    current.wait_stream(stream)
    return result


def capture(run: Callable[[], Any], stream: torch.cuda.Stream | None) -> tuple[Callable[[], None], Any]:
    """(what replays ``run()`` on the current stream, the tensors that it writes); nothing is run yet.

    Older PyTorch refuses random numbers to all threads while it captures, and to everybody after a capture that failed,
    whose memory it goes on taking for one being captured: it is shown a copy of the generator, and told of the end.
    """
    assert stream is not None
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[stream.device.index]
    collecting = gc.isenabled()
    gc.disable()  # what it would free might have to wait for the device

    def run_captured() -> Any:
        with _swapping:
            own = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                graph.capture_begin(pool, capture_error_mode="thread_local")
            finally:
                generator.graphsafe_set_state(own)
        try:
            return run()
        finally:
            graph.capture_end()

    try:
        return graph.replay, aside(run_captured, stream)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        raise
    finally:
        if collecting:
            gc.enable()


def default_cache(model: Any, settings: Any, batch: int, prompt: int, length: int) -> StaticCache | None:
    """The static cache with which a ``generate()`` that asks for none replays its steps, or None.

    Args:
        settings: the call's ``GenerationConfig``.
        batch: sequences; prompt: keys of each to begin with; length: keys of each at most.
    """
    asked = settings.disable_compile or settings.compile_config is not None or settings.return_dict_in_generate
    if asked or settings.is_assistant or not _suits(model):
        return None
    cache = one_launch_cache(model.config.get_text_config(decoder=True), length)
    if not all(map(counts_on_device, cache.layers)):
        return None
    return cache if _fits(model, batch, prompt, length) else None


def _suits(model: Any) -> bool:
    """Whether a model's steps are the same work for every token, on one device (of each rank), by kernels."""
    whole = len(set((getattr(model, "hf_device_map", None) or {0: 0}).values())) == 1
    ours = model.device.type in CAPTURED and whole and getattr(model, "hf_quantizer", None) is None
    replaced = {"forward", "prepare_inputs_for_generation"} & vars(model).keys()  # prompt tuning adds tokens there
    if not ours or model.training or not model._can_compile_fullgraph or replaced:
        return False
    if _failures.get(model, 0) >= MOST_FAILURES or torch.is_autocast_enabled(model.device.type) or _is_hooked(model):
        return False
    return not model.config.is_encoder_decoder and all(
        module.__dict__.get("_sah_recorder") is None and could_take(plan_of(module), module, model)
        for _, module in attention_modules(model)
    )


def _is_hooked(model: Any) -> bool:
    """Whether somebody's hooks are to be called at every step: a graph does not call them."""
    everywhere = [modules._global_forward_hooks, modules._global_forward_pre_hooks]
    held = everywhere + [vars(module)[name] for module in model.modules() for name in HOOKS]
    hooks = [getattr(hook, "func", hook) for known in held for hook in known.values()]
    return any(str(hook.__module__).partition(".")[0] not in KNOWN for hook in hooks)


def _fits(model: Any, batch: int, prompt: int, length: int) -> bool:
    """Whether there is memory for all the keys that may come; ranks that share a model all say the same."""
    if model.device.type != "cuda":
        return True
    config = model.config.get_text_config(decoder=True)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    need = 2 * config.num_hidden_layers * batch * groups * length * dim * model.dtype.itemsize
    free, total = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    meshes = [one.device_mesh for one in model.parameters() if hasattr(one, "device_mesh")]
    if meshes:
        shares = (one.to_local() if hasattr(one, "to_local") else one for one in model.parameters())
        need, free = need // meshes[0].size(), total - sum(share.nbytes for share in shares)
    later = need * max(length - prompt, 0) // max(length, 1)
    return need <= MOST_OF_FREE * free and later <= MOST_FOR_LATER * free
