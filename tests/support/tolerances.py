"""The one error rule that every numerical test goes by.

A result is judged by the norm of its difference from the plain formula in float64, evaluated on the same stored
inputs. It may be as large as

    max(1.5 * the error of eager PyTorch in float32,  1e-5 of the norm of the truth,  a few roundings of what cancels)
    + one rounding to the dtype of the result
    + for gradients of products of half-precision rows: 2^-8 (bfloat16) or 2^-11 (float16) of the norm of the truth.

*Eager's own error* is one draw of a random variable: another order of the features gives other roundings. A single
draw that happens to be small would fail a correct kernel, so the rule takes the largest of a few equivalent evaluations
(permuted features and rows, the scale multiplied in at another place): `oracle.eager_evaluations`.

*What cancels.* On converged rows a loss of 0.001 is the difference of two numbers near 20, each of which has been a
float32; where eager happens to round both alike its error is 0, which no other kernel owes. `magnitude` is the size of
the numbers that cancel (`oracle.CANCELLING`), of which ROUNDINGS roundings are always allowed. This is far below
eager's usual error: rounding a logit s costs |s| roundings of its exponential.

*With one positive nothing cancels*: the loss is log(1 + neg / pos), its gradient a multiple of neg / (neg + pos), and
the oracle evaluates it so in float32 too. Logits are then all that is rounded, and however small the loss, 1e-5 of it
is all that is allowed at ordinary temperatures.

Products in float64 are held to the same rule in units of float64, with 1e-12 in place of 1e-5 and more
roundings of what cancels, as the truth has made some of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EAGER_FACTOR = 1.5
RELATIVE_FLOOR = {torch.float32: 1e-5, torch.float64: 1e-12}
ROUNDINGS = {torch.float32: 4, torch.float64: 64}
HALF_ROWS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of rows of these dtypes are summed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding each of `values` to `dtype` (subnormal numbers included)."""
    info = torch.finfo(dtype)
    return values.double().abs().clamp(min=info.tiny) * (info.eps / 2)


def _norm(values: Tensor) -> float:
    return torch.linalg.vector_norm(values.detach().double()).item()


def error_bound(
    truth: Tensor,
    eager: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    accumulation: torch.dtype = torch.float32,
    half_rows: torch.dtype | None = None,
    magnitude: Tensor | None = None,
) -> float:
    """Largest admissible norm of the error of a result of `dtype`; all values finite. See the module's docstring."""
    size = _norm(truth)
    bound = max(
        EAGER_FACTOR * max(_norm(draw.double() - truth) for draw in eager),
        RELATIVE_FLOOR[accumulation] * size,
        0.0 if magnitude is None else ROUNDINGS[accumulation] * torch.finfo(accumulation).eps / 2 * _norm(magnitude),
    )
    return bound + _norm(half_ulp(truth, dtype)) + HALF_ROWS.get(half_rows, 0.0) * size


def check(
    name: str,
    got: Tensor,
    truth: Tensor,
    eager: Sequence[Tensor],
    *,
    accumulation: torch.dtype = torch.float32,
    half_rows: torch.dtype | None = None,
    magnitude: Tensor | None = None,
) -> None:
    """Raises AssertionError unless `got` obeys the error rule.

    name: what is being compared, for the message. got: the result, any dtype. truth: float64, same shape.
    eager: the same quantity from several eager evaluations. accumulation: dtype of the sums (`accumulation_dtype`).
    half_rows: for gradients of rows, the dtype of the product. magnitude: what cancels in the result, where something
    does.
    Infinities must stand at the same places with the same sign; NaN is never right.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    assert eager, f"{name}: at least one eager evaluation is needed"
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    got = got.detach()
    truth = truth.detach()
    assert not got.isnan().any(), f"{name}: NaN at {got.isnan().nonzero()[:4].tolist()}"
    assert not truth.isnan().any(), f"{name}: the truth holds NaN"
    infinite = truth.isinf()
    wrong = (got.isinf() != infinite) | (infinite & (got.double() != truth))
    assert not wrong.any(), f"{name}: infinities differ at {wrong.nonzero()[:4].tolist()}"

    finite = ~infinite
    bound = error_bound(
        truth[finite],
        [draw.detach()[finite] for draw in eager],
        got.dtype,
        accumulation=accumulation,
        half_rows=half_rows,
        magnitude=magnitude,
    )
    error = _norm(got.double()[finite] - truth[finite])
    assert error <= bound, (
        f"{name}: error {error:.3g}, allowed {bound:.3g}, norm of the truth {_norm(truth[finite]):.3g}, "
        f"eager's errors {[float(f'{_norm(draw.double()[finite] - truth[finite]):.3g}') for draw in eager]}"
    )
