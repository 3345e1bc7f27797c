"""The nearest other row of each of few rows on a CPU, by one call of the engine, without an operator."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..backends import native


def nearest_other(rows: Tensor) -> Tensor:
    """[N] int64: the row with the largest inner product with each of N >= 2 rows, itself excluded; as `op.topk` has it.

    rows: float32 or float64 [N, D] on the CPU, finite.
    """
    n, d = rows.shape
    values, indices = torch.empty(n, dtype=rows.dtype, device="cpu"), torch.empty(n, dtype=torch.int64, device="cpu")
    described, names = native.describe_rows(rows), _names(n).data_ptr()
    threads = native.threads(n * n * d, native.PRODUCTS)
    call = (
        *described, *described, d, 1, names, names, rows.dtype == torch.float64, threads,
        values.data_ptr(), indices.data_ptr(),
    )  # fmt: skip
    native.run(native.native_module().topk(native.engine()[0], call))
    return indices


@lru_cache(maxsize=32)
def _names(n: int) -> Tensor:
    """The rows' places, of the width of a lane. It is only read."""
    with torch.inference_mode(False):
        return torch.arange(n, dtype=torch.int32, device="cpu")
