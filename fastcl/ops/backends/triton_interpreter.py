"""Makes products in Triton's interpreter independent of the tile's shape, as they are on a GPU.

The interpreter multiplies with NumPy, and so with BLAS, which may round an element of a product differently in tiles of
different shape (OpenBLAS does on processors without AVX-512). The kernels rely on products that do not depend on the
tile: a backward reproduces its forward's logits bitwise, with any tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def matrix_product(a: Floats, b: Floats) -> Floats:
    """a [M, K] @ b [K, N]. The rounding of an element depends only on its row of a and its column of b."""
    terms: Floats = np.ascontiguousarray(a.T)[:, :, None] * np.ascontiguousarray(b)[:, None, :]
    while len(terms) > 1:  # adds the second half of the terms to the first half, elementwise
        half = (len(terms) + 1) // 2
        terms[: len(terms) - half] += terms[half:]
        terms = terms[:half]
    total: Floats = terms[0]
    return total


@contextmanager
def kernels_run() -> Iterator[None]:
    """Replaces the interpreter's product while a kernel runs, and silences NumPy's warnings: masked places may hold any
    number, and a device does not warn either."""
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
    """A matrix of float32, float16 or bfloat16 as float32, which is exact; None for other operands."""
    data: npt.NDArray[Any] = operand.data
    name = operand.dtype.scalar.name
    if data.ndim != 2 or name not in ("fp32", "fp16", "bf16"):
        return None
    if name == "bf16":  # the interpreter stores the bits as integers
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32, copy=False)
