"""Arithmetic of rows that all backends share: dtypes of sums, norms, unit rows, sizes of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import values_visible


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms, differentiable, in the accumulation dtype; zeros stay zeros and get gradient 0."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    inverse = inverse_norms(rows.detach())[:, None]
    near = inverse > 1 / FAR[inverse.dtype]
    if values_visible(rows) and int(near.count_nonzero()) == len(rows):
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / norms.clamp(min=NORM_FLOOR)
    empty = inverse == 0
    rows = torch.where(near | empty, rows, rows * DOWN[inverse.dtype])
    norms = torch.linalg.vector_norm(torch.where(empty, 1, rows), dim=1, keepdim=True)
    return torch.where(empty, rows.detach() * 0, rows / norms.clamp(min=NORM_FLOOR))


def unit_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows divided by their norms, detached; float64 if the rows or `dtype` are, else float32. Zeros stay zeros."""
    wide = torch.float64 in (rows.dtype, dtype)
    rows = rows.detach().to(torch.float64 if wide else torch.float32)
    return rows * inverse_norms(rows)[:, None]


NORM_FLOOR = 1e-12
LARGEST_INVERSE = {  # rounded in the same way as in `inverse_norms`, so that comparisons are exact
    dtype: torch.tensor(NORM_FLOOR, dtype=dtype).reciprocal().item() for dtype in (torch.float32, torch.float64)
}
# Rows with norms above FAR are multiplied by DOWN, a power of two, so that their squares do not overflow.
DOWN = {torch.float32: 2.0**-80, torch.float64: 2.0**-600}
FAR = {torch.float32: 2.0**60, torch.float64: 2.0**500}


def accumulation_dtype(*rows: Tensor | None) -> torch.dtype:
    wide = any(part is not None and part.dtype == torch.float64 for part in rows)
    return torch.float64 if wide else torch.float32


def inverse_norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """1 / max(|x|, 1e-12) [N] of rows [N, D]; 0 for a row of zeros, which gives it similarity 0 and gradient 0.

    dtype: dtype of the norms and of their sums; None: that of the rows.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    inverse: Tensor = norms.clamp(min=NORM_FLOOR).reciprocal_()
    inverse.masked_fill_(norms == 0, 0)
    if values_visible(inverse) and int(inverse.count_nonzero()) == len(inverse):
        return inverse
    # An inverse of 0 means a row of zeros, or a row whose squares underflow (norm 0) or overflow (norm infinite).
    small = (rows != 0).any(1).to(inverse.dtype) * LARGEST_INVERSE[inverse.dtype]
    power = DOWN[inverse.dtype]
    large = torch.linalg.vector_norm(rows * power, dim=1, dtype=dtype).reciprocal() * power
    return torch.where(norms == 0, small, torch.where(inverse == 0, large, inverse))


def through_normalization(grad: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """Gradient [N, D] of rows x from the gradient g [N, D] of unit rows u = x / |x|: a (g - u <u, g>), a = 1 / |x| [N].

    The rounded u is not exactly of length 1, hence the division by <u, u>. Below the floor of the norm u = x / 1e-12 is
    linear, and nothing is projected.
    """
    linear = (inverse_norms == 0) | (inverse_norms >= LARGEST_INVERSE[inverse_norms.dtype])
    along = ((unit * grad).sum(1) / (unit * unit).sum(1)).masked_fill_(linear, 0)
    return torch.addcmul(grad, unit, along[:, None], value=-1).mul_(inverse_norms[:, None])


# Logits in a block. On a CPU a block should stay in the caches for several passes; a GPU needs large launches.
CPU_BLOCK = 1 << 20
GPU_BLOCK = 1 << 25
FEWEST_ROWS = 16  # a product of fewer rows is limited by memory bandwidth


def tf32_allowed() -> bool:
    """Whether `torch.set_float32_matmul_precision` allows TF32 in products of float32 rows.

    Newer versions of torch have a setting per device; where it was used, reading the old setting raises.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else bool(setting == "tf32")
