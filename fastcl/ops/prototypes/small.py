"""Cross-entropies of few stored scores on a CPU, and the gradients of their mean, without an operator and records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import address, describe_rows
from ..small import constant


def cross_entropies(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    potentials: Tensor,
    pairs: Tensor,
    scales: Tensor,
    differentiated: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The values [N] of `records.Crops`, and with `differentiated` the gradient of their mean for each student.

    students, teachers: [N, K] each, float32 or float64, all of one dtype. potentials: [teachers, K] of that dtype.
    pairs, scales: as in `Crops`, float64.
    """
    n, k = students[0].shape
    dtype, crops = students[0].dtype, len(students) + len(teachers)
    values, kept = torch.empty(n, dtype=dtype, device="cpu"), torch.empty((crops, 2, n), dtype=dtype, device="cpu")
    described = tuple(map(describe_rows, students)), tuple(map(describe_rows, teachers))
    numbers = (
        n, k, potentials.data_ptr(), 1, pairs.data_ptr(), scales.data_ptr(), dtype == torch.float64,
        min(native.threads(n * k * crops, native.SCORES), n), kept.data_ptr(),
    )  # fmt: skip
    module, engine = native.native_module(), native.engine()[0]
    native.run(module.prototypes(engine, *described, (*numbers, values.data_ptr(), 0, 0, 0, 0, 0), None))
    if not differentiated:
        return values, [None] * len(students)
    found = [torch.empty((n, k), dtype=dtype, device="cpu") for _ in students]
    of_values = constant(1 / n, dtype, (n,)).data_ptr()
    outputs = tuple(map(address, found))
    native.run(module.prototypes(engine, *described, (*numbers, 0, 0, 0, of_values, 0, 0), outputs))
    return values, list(found)
