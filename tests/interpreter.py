"""Triton's interpreter at a fraction of its price: what it works out again for every operation is kept. No result
changes.

Of a test's time it spent a fifth on replacing functions of ``triton.language`` at each call of a kernel's function,
which are the same every time, and a fifth on checks for overflow whose outcome it looks at in debug mode alone; of what
was left, two fifths on the types of two operands, which mostly are equal, and on constants.
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
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = Patched(interpreter._patch_lang)
    interpreter._get_np_dtype = NumpyTypes(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core._unwrap_if_constexpr = tl._unwrap_if_constexpr = _unwrap(core._unwrap_if_constexpr)
    TritonSemantic.binary_op_type_checking_impl = _checked(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    TritonSemantic.cast = _cast(TritonSemantic.cast)
    interpreter.TensorHandle.__init__ = _handle
    interpreter.InterpreterBuilder.binary_op = _binary_op(interpreter.InterpreterBuilder.binary_op)
    tl.tensor.__init__ = _tensor
    blocks = Blocks(tl.block_type.__init__)
    tl.block_type.__new__ = lambda cls, element_ty, shape: blocks.make(cls, element_ty, shape)
    tl.block_type.__init__ = lambda self, element_ty, shape: None


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


CHECKED = core.builtin(lambda _semantic=None: None).__code__


def _patch_attr(owner, name, member, builder, scope):
    """A function of ``triton.language`` that works with NumPy; that it is called in a kernel is not checked again."""
    function, semantic = member.__wrapped__ if member.__code__ is CHECKED else member, interpreter.interpreter_semantic

    def replaced(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, replaced)


def _checked(original):
    """``binary_op_type_checking_impl``, which brings two operands to one type and shape."""
    constants = {}

    def constant(self, value, tensor):
        """``value`` in an operation with ``tensor``; None where not known or where that changes for it."""
        if type(value) not in (int, float) or type(tensor) is not tl.tensor or tensor.dtype.name not in DTYPES:
            return None
        if value == 0 and type(value) is float:  # 0.0 equals -0.0
            return None
        dtype = tensor.dtype
        key = value, type(value), dtype.name
        if key not in constants:
            ours, theirs = original(self, self.scalar_constant(0, dtype), value)
            constants[key] = theirs if ours.dtype.name == dtype.name else None
            theirs.splats = {}
        return constants[key]

    def checked(self, lhs, rhs, lhs_ptr=False, rhs_ptr=False, arithmetic=True, division=False):
        if type(lhs) is tl.tensor and type(rhs) is tl.tensor:
            ours, theirs = lhs.dtype, rhs.dtype
            same = ours.name == theirs.name and ours.name in DTYPES
            if not division and (same or (lhs_ptr and ours.is_ptr() and theirs.is_int())):
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic and not division:
            if (known := constant(self, rhs, lhs)) is not None:
                return self.broadcast_impl_value(lhs, known)
            if (known := constant(self, lhs, rhs)) is not None:
                return self.broadcast_impl_value(known, rhs)
        return original(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, division)

    return checked


def _broadcast(original):
    def splat(self, block, scalar):
        """A constant in the shape of a block."""
        shape = tuple(block.type.shape.values)
        if shape not in scalar.splats:
            found = scalar.splats[shape] = original(self, block, scalar)[1]
            found.handle.data.flags.writeable = False
        return scalar.splats[shape]

    def spread(self, block, shape):
        """``block`` in a larger shape; NumPy raises where it does not fit."""
        kind = tl.block_type(block.dtype, shape)
        return block if kind is block.type else tl.tensor(self.builder.create_broadcast(block.handle, shape), kind)

    def broadcast(self, lhs, rhs):
        ours, theirs = lhs.type.is_block(), rhs.type.is_block()
        if ours and theirs:
            if lhs.type is rhs.type or lhs.type.shape.values == rhs.type.shape.values:
                return lhs, rhs
            one, other = lhs.type.shape.values, rhs.type.shape.values
            if len(one) == len(other):
                shape = tuple([max(pair) for pair in zip(one, other, strict=True)])
                return spread(self, lhs, shape), spread(self, rhs, shape)
        elif ours:
            if hasattr(rhs, "splats"):
                return lhs, splat(self, lhs, rhs)
        elif theirs:
            if hasattr(lhs, "splats"):
                return splat(self, rhs, lhs), rhs
        else:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def _cast(original):
    def cast(self, given, kind, rounding=None):
        name = given.dtype.name
        return given if name == kind.scalar.name and name in DTYPES else original(self, given, kind, rounding)

    return cast


def _handle(self, data, dtype, attr=None):
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


@functools.cache
def _sizes(shape):
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])


def _binary_op(original):
    def binary_op(self, lhs, rhs, operation):
        kind = lhs.dtype.scalar
        if kind.name not in DTYPES or kind.name == "int1":
            return original(self, lhs, rhs, operation)
        found = operation(lhs.data, rhs.data)
        if found.itemsize > lhs.data.itemsize:
            found = found.astype(interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(found, kind)

    return binary_op


def _tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    try:
        self.numel, self.shape = type.sizes
    except AttributeError:
        sizes = _sizes(tuple(type.shape) if type.is_block() else ())
        self.numel, self.shape = sizes
        type.sizes = sizes


class Blocks:
    """Types of blocks: one for each kind of element and shape."""

    def __init__(self, original):
        self.original, self.known = original, {}

    def make(self, cls, element, shape):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        found = self.known.get((element.name, sizes))
        if found is None:
            found = object.__new__(cls)
            self.original(found, element, list(sizes))
            if element.name in DTYPES:
                self.known[element.name, sizes] = found
        return found
