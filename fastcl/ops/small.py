"""Shared by the direct paths of small calls on the CPU: which tensors they take, and tensors that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import INTEGER_DTYPES, LARGEST, SMALLEST
from .backends import native
from .backends.native import DTYPES
from .library import intercepted, once_differentiable

MOST_ROWS = 1 << 13  # tensors of their length stay in memory
PLAIN = Tensor, torch.nn.Parameter  # torch's own types
_IDS = frozenset(INTEGER_DTYPES) - {torch.uint64}


MOST_FACTOR = 1e25  # of a loss's term
MOST = 1 << 25  # up to this N M D: beyond, the sweep takes longer than all that surrounds it


def is_small(anchors: Tensor, contrasts: Tensor | None, most: int | None = None) -> bool:
    """Whether N M D is at most `MOST` and `most`, and one call of the engine takes both. Rows are as in `are_rows`."""
    if anchors.dim() == 3 and not anchors.is_contiguous():
        return False
    numbers = anchors.numel()
    products = numbers * (numbers if contrasts is None else contrasts.numel()) // anchors.shape[-1]
    if not 0 < products <= (MOST if most is None else min(most, MOST)):
        return False
    return contrasts is None or (anchors.dtype == torch.float64) == (contrasts.dtype == torch.float64)


def real_of(anchors: Tensor) -> torch.dtype:
    """The dtype of sums over these rows."""
    return torch.float64 if anchors.dtype == torch.float64 else torch.float32


def needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would take longer
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def are_rows(*values: Any) -> bool:
    """Whether all are tensors of few rows [N, D] or [N, V, D] on the CPU, of torch's own types."""
    for value in values:
        if type(value) not in PLAIN or not value.is_cpu or value.dtype not in DTYPES:
            return False
        if not 2 <= value.dim() <= 3 or not 0 < value.numel() <= MOST_ROWS * value.shape[-1]:
            return False
    return True


def are_plain(*values: Tensor) -> bool:
    """Whether all are rows [N, D] on the CPU, any number of them but 0, of torch's own types."""
    for value in values:
        if type(value) not in PLAIN or not value.is_cpu or value.dtype not in DTYPES:
            return False
        if value.dim() != 2 or value.numel() == 0:
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether it is a Python number, or a floating tensor of one element on the CPU, of torch's own types."""
    if type(value) in PLAIN:
        return bool(value.is_cpu and value.numel() == 1 and value.dtype in DTYPES)
    return type(value) is float or type(value) is int


def in_range(value: float | Tensor, *, positive: bool) -> bool:
    """Whether `checks.positive_number`, or else `checks.finite_number`, accepts it. Tensors are not `intercepted`."""
    number = value.item() if isinstance(value, Tensor) else value
    return SMALLEST <= number <= LARGEST if positive else abs(number) <= LARGEST


def are_floats(*values: Any, positive: bool = False) -> bool:
    """Whether all are floats of Python that `in_range` accepts, and whose products with counts float32 can hold."""
    for value in values:
        if type(value) is not float or not (SMALLEST if positive else -MOST_FACTOR) <= value <= MOST_FACTOR:
            return False
    return True


def are_ids(value: Any, count: int) -> bool:
    """Whether it is a tensor [count] of integers on the CPU. uint64 is none here, as its values may be too large."""
    if type(value) is not Tensor or value.dtype not in _IDS or not value.is_cpu:
        return False
    return bool(value.shape == (count,))


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Tensor:
    """A tensor of equal numbers. It is only read."""
    with torch.inference_mode(False):  # later calls may have to save it
        return torch.full(shape, value, dtype=dtype, device="cpu")


@lru_cache(maxsize=64)
def places(samples: int, views: int, count: int) -> Tensor:
    """[count] int64: the sample of each of `samples` * `views` rows, -1 for further rows. It is only read."""
    with torch.inference_mode(False):
        rows = torch.arange(samples, device="cpu").repeat_interleave(views)[:count]
        return torch.cat((rows, rows.new_full((count - len(rows),), -1)))


def rows_of(values: Tensor) -> tuple[int, ...]:
    """`native.describe_rows` of rows [N, D], or of contiguous views [N, V, D] as N * V rows."""
    shape: Sequence[int] = values.shape
    if len(shape) == 2:
        return DTYPES[values.dtype], values.data_ptr(), shape[0], *values.stride()
    return DTYPES[values.dtype], values.data_ptr(), shape[0] * shape[1], shape[2], 1


def described(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor | None,
    contrast_clusters: Tensor | None,
    scale: Tensor,
    normalize: bool,
    symmetric: bool,
    differentiated: bool,
    ids: Tensor | None = None,
) -> tuple[Any, ...]:
    """The problem as csrc/bindings reads it.

    scale: [], or several [S] where the call takes them. differentiated: the call also computes gradients. ids: of both
    sets; pairs of equal ids take no part.
    """
    own, other = rows_of(anchors), (0, 0, 0, 0, 0) if contrasts is None else rows_of(contrasts)
    d, two = anchors.shape[-1], contrasts is not None
    threads = native.threads(own[2] * (other[2] if two else own[2]) * d, native.PRODUCTS, differentiated)
    places = native.address(ids)
    return (
        *own, *other, d, native.address(clusters), native.address(contrast_clusters), places, places, scale.data_ptr(),
        scale.numel(), 0, normalize, normalize and two, scale.dtype == torch.float64, symmetric, threads, 0,
    )  # fmt: skip


def as_saved(values: Any) -> Any:
    """Rows, or None, from `saved_tensors` for `rows_of`: a hook may have given views [N, V, D] other strides."""
    return values if values is None or values.dim() == 2 else values.contiguous()


def number_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of one element as a tensor [], detached."""
    value = value.detach()
    value = value if value.dtype == dtype else value.to(dtype)
    return value.reshape(()) if value.dim() else value


def scale_of(value: float | Tensor, inverted: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The scale as a tensor [], and the tensor that it is learned by. inverted: `value` is the temperature."""
    if not isinstance(value, Tensor):
        return constant(1 / value if inverted else value, dtype), None
    number = number_of(value, dtype)
    return number.reciprocal() if inverted else number, value


def gradient_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of rows, contiguous."""
    if values.dtype == dtype and values.is_contiguous():
        return torch.empty_like(values)  # takes half the time of the following
    return torch.empty(values.shape, dtype=dtype, device="cpu")


def scaled(
    grad: Tensor,
    sources: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    keep: bool = False,
    public: str = "contrastive_stats",
) -> tuple[Tensor | None, ...]:
    """The gradients times `grad`, in the dtypes and shapes of their sources. For use in a backward.

    keep: leaves `found` as they are; else they may be overwritten. public: whose second derivatives are an error.
    """
    if torch.is_grad_enabled():
        result: tuple[Tensor | None, ...] = once_differentiable(public, _kept, grad, len(sources), *sources, *found)
        return result
    return _scaled(grad, sources, found, keep)


def _scaled(
    grad: Tensor, sources: Sequence[Tensor | None], found: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor | None, ...]:
    if keep or intercepted(grad):
        found = [None if gradient is None else gradient * grad for gradient in found]
    elif grad.item() != 1:
        found = [None if gradient is None else gradient.mul_(grad) for gradient in found]
    return tuple(map(_like, found, sources))


def _like(gradient: Tensor | None, source: Tensor | None) -> Tensor | None:
    if gradient is None or source is None:
        return None
    gradient = gradient if gradient.dtype is source.dtype else gradient.to(source.dtype)
    return gradient if gradient.dim() == source.dim() else gradient.reshape(source.shape)


def _kept(grad: Tensor, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return _scaled(grad, tensors[:count], tensors[count:], True)
