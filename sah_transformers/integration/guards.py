"""What compiled code assumes of a sparse model is looked at once per ``generate()``, not once per token.

``torch.compile`` checks before each call everything it read while it traced: some 9,000 things for a model of 32
layers, 7,000 of them the model's own modules, parameters and configurations. That takes about a millisecond per token,
in which the device waits. Those do not change while ``generate()`` runs: so they are left out of the checks (by a guard
filter, an option of PyTorch's), remembered here, and compared whenever ``generate()`` asks for the compiled call. Where
one of them differs, the layers' plans get other numbers: a plan's number, unique in the process, is still checked, and
the model is compiled again. All that is no part of the model, the cache above all, is checked at every token as ever.
A model that changes itself as it runs is found at the call after the one that was traced, or at the first after the
prompt, and left to PyTorch; so is one that has layers of another model.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from transformers.generation import CompileConfig

from sah_transformers.integration.models import attention_modules
from sah_transformers.integration.plan import plan_of

KEPT = ".__dict__['_sah_plan'].number"

SELF = "L['self']"
"""How PyTorch's sources write ``self``; guards' names write it plainly."""

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)

FILTER = "guard_filter_fn"

SAME = "triton.cudagraph_trees"
"""An option of inductor's that is given the value that it has."""

MOST_CHANGES = 4
"""A model that changes more often is checked by PyTorch alone."""


def trait(kind: str, value: Any) -> Any:
    """What a kind of guard looks at in a value, or None for guards that are not left out."""
    match kind:
        case "HASATTR" | "NOT_PRESENT_IN_GENERIC_DICT" | "DICT_CONTAINS" | "DUPLICATE_INPUT":
            return value  # of a comparison
        case "TYPE_MATCH":
            return type(value)
        case "SEQUENCE_LENGTH" if isinstance(value, (list, tuple)):
            return type(value), len(value)
        case "SEQUENCE_LENGTH" | "EMPTY_NN_MODULE_HOOKS_DICT" if isinstance(value, dict):
            return type(value), tuple(value)
        case "CONSTANT_MATCH" | "EQUALS_MATCH" if type(value) in PLAIN:
            return type(value), repr(value)
        case "CLOSURE_MATCH" if type(value) is FunctionType:
            return id(value.__code__)
        case "TENSOR_MATCH" if type(value) in (torch.Tensor, torch.nn.Parameter):
            return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    return None


class ModelGuards:
    """What compiled code relies on in one model.

    Attributes:
        traits: of values, by the expression of ``self`` (the model) that gives them and the kind of guard.
        changes: how often they did not hold any more, though the plans were the same; number: of the plan that is
            checked at each call; new: whether they are to be looked at before the next call.
        filter: ``keep``, for PyTorch; backends: other backends than inductor, under no other name.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = weakref.ref(model)
        self.traits: dict[tuple[str, str], Any] = {}
        self.changes, self.new, self.number = 0, False, 0
        self.filter = lambda entries: self.keep(entries)  # one function: settings are compared, and copied
        self.backends: dict[str, Any] = {}
        self._look: Callable[[Any], tuple[Any, ...]] | None = None

    def still_hold(self) -> bool:
        """Whether the model is as it was."""
        if self._look is None:
            self._look = expressions([expression for expression, _ in self.traits])
        try:
            values = self._look(self.model())
            return all(
                trait(kind, value) == known
                for (_, kind), value, known in zip(self.traits, values, self.traits.values(), strict=True)
            )
        except Exception:  # whatever the model's own attributes and objects raise
            return False

    def keep(self, entries: Sequence[Any]) -> list[bool]:
        """Which guards of new compiled code are to be checked at each call; the others are remembered.

        Args:
            entries: ``torch._dynamo.types.GuardFilterEntry``.
        """
        release()
        model = self.model()
        numbered = [(entry.name, entry.value) for entry in entries if entry.name.endswith(KEPT)]
        if not numbered or not any(entry.name == "self" and entry.value is model for entry in entries):
            return [True] * len(entries)  # a part of the model, between breaks of the graph
        (first, self.number), found, kept = numbered[0], {}, []
        for entry in entries:
            known = None
            if entry.name.startswith("self."):
                with contextlib.suppress(Exception):  # words that are PyTorch's own, not Python's
                    expression, value = subject(entry, model)
                    known = trait(entry.guard_type, value)
            kept.append(known is None or entry.name == first)
            if known is not None:
                found[expression, entry.guard_type] = known
        self.traits = {**found, **self.traits}  # older code relies on what was known before
        self._look, self.new = None, True
        return kept

    def settings(self, config: CompileConfig) -> CompileConfig | None:
        """The settings with the filter, or None where that does not go with what they say.

        PyTorch shares compiled code between all calls of a function with the same backend; so that no other call comes
        by code that checks too little, the backend is never one that somebody else asks for.
        """
        import torch._inductor.config  # takes a second: when it is compiled, not before
        from torch._dynamo.backends.registry import lookup_backend

        options = dict(config.options or {})
        if FILTER in options or (config.mode is not None and (options or config.backend != "inductor")):
            return None
        backend: Any = config.backend
        if backend == "inductor":
            if config.mode is not None:
                options = torch._inductor.list_mode_options(config.mode, config.dynamic)
            options = {**options, SAME: torch._inductor.config.triton.cudagraph_trees}
        elif isinstance(backend, str) and not options:
            if backend not in self.backends:
                self.backends[backend] = functools.partial(lookup_backend(backend))
            backend = self.backends[backend]
        else:
            return None
        new: Any = {"mode": None, "backend": backend, "options": {**options, FILTER: self.filter}}
        return replace(config, **new)

    def claim(self) -> None:
        """Code is known by the numbers of its layers' plans: layers that another model has too are left to PyTorch."""
        model: Any = self.model()
        layers = [module for _, module in attention_modules(model)]
        if any(_owners.setdefault(module, self) is not self for module in layers):
            self.leave()

    def forget(self) -> None:
        """The model changed: what was compiled does not fit it any more, and its plans get other numbers."""
        model: Any = self.model()
        self.traits, self._look = {}, None
        layers = [module for _, module in attention_modules(model)]
        self.changes += self.number in [plan_of(module).number for module in layers]  # enabled anew otherwise
        self.claim()
        for module in layers:
            module.__dict__["_sah_plan"] = replace(plan_of(module))

    def leave(self) -> None:
        """Leave the model to PyTorch from now on."""
        self.traits, self._look = {}, None
        self.changes = MOST_CHANGES + 1


def expressions(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function of a model that gives the values of expressions of ``self``."""
    return eval("lambda self: (" + "".join(f"{name}, " for name in names) + ")")


def release() -> None:
    """Let go of what PyTorch holds on to when it makes a filter's entries: of values that it looks up for a guard that
    an attribute is missing it keeps the owner, in the names of all guards to come (up to 2.13 at least)."""
    import torch._dynamo.guards

    names: dict[str, Any] = getattr(torch._dynamo.guards, "_get_closure_vars", dict)()
    for name in [name for name in names if re.fullmatch(r"tmp\d*", name)]:
        del names[name]


def subject(entry: Any, model: Any) -> tuple[str, Any]:
    """(the expression of ``self`` that a guard is about, its value)."""
    expression = entry.name
    named = getattr(entry.orig_guard.create_fn, "keywords", {})
    match entry.guard_type:
        case "HASATTR":
            expression = f"hasattr({expression}, {named['attr']!r})"
        case "NOT_PRESENT_IN_GENERIC_DICT":
            expression = f"{named['attr']!r} in {expression}.__dict__"
        case "DICT_CONTAINS":
            expression = f"{named['key']!r} in {expression}"
        case "DUPLICATE_INPUT":
            other = named["source_b"].name
            other = other() if callable(other) else other
            expression = f"{expression} is {other.replace(SELF, 'self')}"
    (value,) = expressions([expression])(model)
    return expression, value


_of: weakref.WeakKeyDictionary[Any, ModelGuards] = weakref.WeakKeyDictionary()
_owners: weakref.WeakKeyDictionary[Any, ModelGuards] = weakref.WeakKeyDictionary()  # by attention module


def once_per_call(get: Callable[[CompileConfig], Callable[..., Any]], model: Any, config: CompileConfig) -> Any:
    """The compiled call of a model, most of whose guards are checked now and not when it is called.

    Settings that have a guard filter, or a mode that does not go with options, stay as they are, as do those of a model
    that changes from call to call.

    Args:
        get: Transformers' way to compile the model with some settings.
    """
    guards = _of.get(model)
    if guards is None:
        guards = _of[model] = ModelGuards(model)
        guards.claim()
    elif not guards.still_hold():
        guards.forget()
    settings = guards.settings(config)
    if settings is None or guards.changes > MOST_CHANGES:
        return get(config)
    compiled, guards.new = get(settings), True  # since then, a prompt may have been read

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if guards.new:
            guards.new = False
            if not guards.still_hold():  # the model changes itself
                guards.leave()
                compiled = get(config)
        return compiled(*args, **kwargs)

    return call
