"""Corrections of Triton's interpreter, so that on a CPU it computes what a GPU would.

Without them a bfloat16 tl.dot multiplies the raw bit patterns (wrong by ten orders of magnitude), and a cast from
float32 to bfloat16 cuts off instead of rounding to nearest even. Made for Triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np


def correct() -> None:
    """Install the corrections; twice is once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrected", False):
        return
    builder.corrected = True
    dot, cast = builder.create_dot, interpreter._convert_float

    def is_bf16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle):
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def corrected_dot(self, a, b, d, *rest):
        a, b = (widened(x) if is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    def corrected_cast(data, src_type, dst_type, rounding):
        if src_type == tl.float32 and dst_type == tl.bfloat16:
            bits = data.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            # rounding must not carry a nan into infinity or beyond
            return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return cast(data, src_type, dst_type, rounding)

    builder.create_dot, interpreter._convert_float = corrected_dot, corrected_cast
    _patch_once(interpreter)
    _remember_types(interpreter)


def _patch_once(interpreter) -> None:
    """Spare a kernel's helper functions the exchange of Triton's language for the interpreter's that the kernel itself
    has made already: a third of the time of an attention kernel."""
    import triton.language as tl

    exchange, exchanged = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    def once(function):
        languages = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core} - exchanged
        if not languages:
            return Nothing()
        scope = exchange(function)
        # Triton 3.6 turns an array of one element into an int, which numpy 2.4 refuses: loop bounds are such arrays
        scope.set_attr(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.squeeze()))
        restore = scope.restore
        exchanged.update(languages)

        def restored() -> None:
            exchanged.difference_update(languages)
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = once


def _remember_types(interpreter) -> None:
    """Make a type once, not anew for every value that has it, and let shapes that are the same object be: a third."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    new_block, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast, numpy_type = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
    blocks: dict[tuple, dict] = {}
    numpy_types: dict[str, np.dtype] = {}

    def block(self, element_ty, shape) -> None:
        key = (str(element_ty), *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            new_block(self, element_ty, shape)
            like = tl.tensor.__new__(tl.tensor)
            new_tensor(like, None, self)
            blocks[key] = self.__dict__ | {"of_tensors": {"shape": like.shape, "numel": like.numel}}
        self.__dict__.update(blocks[key])

    def tensor(self, handle, type) -> None:
        if not type.is_block():
            return new_tensor(self, handle, type)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.__dict__.update(type.of_tensors)

    def unless_alike(self, a, b):
        alike = a.type.is_block() and b.type.is_block() and a.type.shape is b.type.shape
        return (a, b) if alike else broadcast(self, a, b)

    def remembered(type):
        key = str(type)
        if key not in numpy_types:
            numpy_types[key] = numpy_type(type)
        return numpy_types[key]

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = unless_alike, remembered


@contextlib.contextmanager
def without_overflow_checks() -> Iterator[None]:
    """Every sum and product of integers is checked for overflow, a fifth of the time. Tests of single ops keep that."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = before
