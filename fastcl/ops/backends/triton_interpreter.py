"""Triton's interpreter, as the kernels need it where there is no GPU.

It multiplies by NumPy, and so by BLAS, which may round an element of a product differently in tiles of different shape:
OpenBLAS does on processors without AVX-512. The kernels rely on the opposite, which holds on a GPU: a backward repeats
the logits of its forward to the bit, whatever tiles either of them uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def matrix_product(a: Floats, b: Floats) -> Floats:
    """a [M, K] @ b [K, N]. How an element is rounded depends on its row of a, its column of b, and nothing else."""
    terms: Floats = np.ascontiguousarray(a.T)[:, :, None] * np.ascontiguousarray(b)[:, None, :]
    while len(terms) > 1:  # the second half of the terms is added to the first, place by place
        half = (len(terms) + 1) // 2
        terms[: len(terms) - half] += terms[half:]
        terms = terms[:half]
    total: Floats = terms[0]
    return total


@contextmanager
def kernels_run() -> Iterator[None]:
    """While a kernel runs: products round alike in every tile, and NumPy passes over overflows in silence, as a device
    does (masked places may hold anything)."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        left, right = _as_float32(a), _as_float32(b)
        if left is None or right is None or acc.data.dtype != np.float32:
            return original(builder, a, b, acc, *options)
        return TensorHandle(matrix_product(left, right) + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        InterpreterBuilder.create_dot = original


def _as_float32(operand: Any) -> Floats | None:
    """A matrix of float32, float16 or bfloat16 numbers in float32, which holds all of them; None of other operands."""
    data: npt.NDArray[Any] = operand.data
    name = operand.dtype.scalar.name
    if data.ndim != 2 or name not in ("fp32", "fp16", "bf16"):
        return None
    if name == "bf16":  # the interpreter has their bits as integers
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32, copy=False)
