"""Triton's interpreter, without what it does again and again: tests of small kernels take half the time.

It also mends what older versions cannot do.
"""

from functools import cache
from typing import Any

import numpy as np


@cache
def quicken() -> None:
    """For the rest of the process. An interpreter that is built otherwise is left as it is."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_attr") or not hasattr(interpreter, "_patch_builtin"):
        return
    remember_builtins(interpreter)
    remember_dtypes(interpreter)
    check_overflow_at_once(interpreter)
    convert_single_elements(interpreter)
    negate_conditions(interpreter)


def remember_builtins(interpreter: Any) -> None:
    """It replaces the functions of Triton's language before each launch, and before each call of a function within a
    kernel, and finds them by looking through all members of the modules. Their names do not change."""
    import triton.language as tl

    @cache
    def builtins(package: Any) -> tuple[str, ...]:
        """As the interpreter finds them; those that are replaced at the moment are none, so it has to be at rest."""
        return tuple(name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None)))

    packages = [tl, tl.core, tl.tensor, tl.math]
    if hasattr(tl.core, "tensor_descriptor_base"):  # since Triton 3.3
        packages.append(tl.core.tensor_descriptor_base)
    for package in packages:
        builtins(package)

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        names = builtins(package)
        if names and not tl.core.is_builtin(getattr(package, names[0])):
            return  # all are replaced already, by the kernel that calls this function
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)

    interpreter._patch_builtin = patch_builtin


def remember_dtypes(interpreter: Any) -> None:
    """It makes a table of all dtypes for each array."""
    import triton.language as tl

    make = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        name = dtype.element_ty.name if isinstance(dtype, tl.block_type) else dtype.name
        if name not in known:
            known[name] = make(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype


def check_overflow_at_once(interpreter: Any) -> None:
    """It checks each sum and product of integers by some ten operations of the language."""
    import triton.language as tl

    semantic = getattr(getattr(tl, "semantic", None), "TritonSemantic", None)
    if semantic is None:  # before Triton 3.4
        return
    check = semantic.binary_op_sanitize_overflow_impl
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def checked(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        if not isinstance(lhs.handle, interpreter.TensorHandle) or operation.__name__ not in operations:
            return check(self, lhs, rhs, operation)
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return None
        assert dtype == rhs.type.scalar, f"expected matching operand types, got {dtype} and {rhs.type.scalar}"
        exact = operations[operation.__name__](*(operand.handle.data.astype(np.int64) for operand in (lhs, rhs)))
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        within = exact.size == 0 or (least <= exact.min() and exact.max() <= most)
        assert within, f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}"
        return None

    semantic.binary_op_sanitize_overflow_impl = checked


def convert_single_elements(interpreter: Any) -> None:
    """Before Triton 3.9 it converts arrays of one element to integers as NumPy no longer does."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)  # which remembers what there was
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def negate_conditions(interpreter: Any) -> None:
    """Before Triton 3.3 it cannot."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "get_int1_ty"):
        return
    of_integers = builder.get_all_ones_value

    def all_ones(self: Any, dtype: Any) -> Any:
        return interpreter.TensorHandle(np.full(1, True), tl.int1) if dtype == tl.int1 else of_integers(self, dtype)

    builder.get_int1_ty = lambda self: tl.int1
    builder.get_all_ones_value = all_ones
