"""Arithmetic of rows that all backends share: dtypes of sums, norms, unit rows, sizes of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import values_visible


def unit(rows: Tensor) -> Tensor:
    """Rows over their norms, differentiable, in the accumulation dtype; zeros stay zeros and get no gradient."""
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
    """Rows over their norms, detached, in float32, or float64 if that is their or the given dtype; zeros stay zeros."""
    wide = torch.float64 in (rows.dtype, dtype)
    rows = rows.detach().to(torch.float64 if wide else torch.float32)
    return rows * inverse_norms(rows)[:, None]


NORM_FLOOR = 1e-12
LARGEST_INVERSE = {  # rounded as in `inverse_norms`
    dtype: torch.tensor(NORM_FLOOR, dtype=dtype).reciprocal().item() for dtype in (torch.float32, torch.float64)
}
# Powers of two that bring the largest rows to where their squares are in range, as they leave all rows beyond FAR.
DOWN = {torch.float32: 2.0**-80, torch.float64: 2.0**-600}
FAR = {torch.float32: 2.0**60, torch.float64: 2.0**500}


def accumulation_dtype(*rows: Tensor | None) -> torch.dtype:
    wide = any(part is not None and part.dtype == torch.float64 for part in rows)
    return torch.float64 if wide else torch.float32


def inverse_norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """1 / max(|x|, 1e-12) of rows [N, D], as [N]; 0 for a row of zeros, which so gets similarity 0 and gradient 0.

    dtype: of the norms, which are summed in it; None: that of the rows.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    inverse: Tensor = norms.clamp(min=NORM_FLOOR).reciprocal_()
    inverse.masked_fill_(norms == 0, 0)
    if values_visible(inverse) and int(inverse.count_nonzero()) == len(inverse):
        return inverse
    # 0: a row of zeros, or one whose squares leave the dtype's range: too small to be told from zeros, or too large.
    small = (rows != 0).any(1).to(inverse.dtype) * LARGEST_INVERSE[inverse.dtype]
    power = DOWN[inverse.dtype]
    large = torch.linalg.vector_norm(rows * power, dim=1, dtype=dtype).reciprocal() * power
    return torch.where(norms == 0, small, torch.where(inverse == 0, large, inverse))


def through_normalization(grad: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """Gradient of the rows x from that of the unit rows u = x / |x|: a (g - u <u, g>), all [N, D] but a = 1 / |x| [N].

    u as rounded is not quite of length 1, hence the division by <u, u>. Below the floor of the norm, u = x / 1e-12 is
    linear and there is nothing to project.
    """
    linear = (inverse_norms == 0) | (inverse_norms >= LARGEST_INVERSE[inverse_norms.dtype])
    along = ((unit * grad).sum(1) / (unit * unit).sum(1)).masked_fill_(linear, 0)
    return torch.addcmul(grad, unit, along[:, None], value=-1).mul_(inverse_norms[:, None])


# Logits in a block. On a CPU it should stay in the caches while several passes go over it; a GPU wants large launches.
CPU_BLOCK = 1 << 20
GPU_BLOCK = 1 << 25
FEWEST_ROWS = 16  # a product of fewer rows runs at the memory's speed


def tf32_allowed() -> bool:
    """Whether products of float32 rows may be rounded to TF32, as `torch.set_float32_matmul_precision` tells torch.

    Newer versions of torch keep it by device, and the old question raises where the new setting was used.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else bool(setting == "tf32")
