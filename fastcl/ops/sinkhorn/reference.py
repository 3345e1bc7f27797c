"""Sinkhorn's passes over the scores, dense: the specification in code. `solver` iterates them.

Every pass computes exp((S + potential - shift) / epsilon), with the largest S + potential of the row or column as its
shift, and reduces it. The sum is formed before the division by epsilon: scores and potentials nearly cancel where the
plan has mass, and their sum is then exact even if they are large. Potentials are therefore float64, and are added in
two parts: rounded to float32, and the remainder. Shift and sum are stored separately: a log-sum-exp in one number would
round at the size of the scores, a quotient of two exponentials does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores S [B, N, K] of any dtype and strides, and 1 / epsilon [] in the dtype of the computation."""

    values: Tensor
    inverse_epsilon: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.inverse_epsilon.dtype

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.values.device)

    def new_matrix(self) -> Tensor:
        """Uninitialised [B, N, K] in the scores' dtype, contiguous."""
        return torch.empty(self.values.shape, dtype=self.values.dtype, device=self.values.device)

    def block(self, rows: slice) -> Scores:
        return replace(self, values=self.values[:, rows])

    def plus(self, potential: Tensor) -> Tensor:
        """S + potential, [B, N, K]."""
        high, low = split(potential, self.dtype)
        return (self.values.to(self.dtype) + high).add_(low)


CHUNK = 512  # largest number of rows that a GPU kernel sums at once: bounds the rounding error
LEAST_CHUNK = 16  # smallest number of rows of a chunk, whose sums are written and read once


def split(potential: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A potential as the sum of two tensors of `dtype`."""
    high = potential.to(dtype)
    return high, (potential - high).masked_fill_(high.isinf(), 0).to(dtype)


class Normalizer(NamedTuple):
    """epsilon * log-sum-exp of (S + potential) / epsilon in two parts: shift + epsilon * log(sum)."""

    shift: Tensor
    sum: Tensor

    def total(self, epsilon: Tensor) -> Tensor:
        """The log-sum-exp as one number, in the dtype of epsilon."""
        return self.shift.to(epsilon.dtype) + epsilon * self.sum.to(epsilon.dtype).log()


class RowTerm(NamedTuple):
    """The term R_ij (p_i + q_i w_j) of `score_gradient`, with R the softmax over j of (S + g) / epsilon."""

    g: Tensor  # [B, K]
    rows: Normalizer  # [B, N]
    p: Tensor  # [B, N]
    q: Tensor  # [B, N]
    w: Tensor  # [B, K]


class ColumnTerm(NamedTuple):
    """The term C_ij w_j of `score_gradient`, with C the softmax over i of (S + f) / epsilon."""

    f: Tensor  # [B, N]
    columns: Normalizer  # [B, K]
    w: Tensor  # [B, K]


def finite(shift: Tensor) -> Tensor:
    """Shifts with -inf replaced by 0, so that exp(-inf - shift) is 0 instead of NaN."""
    return shift.masked_fill(shift == -torch.inf, 0)


def column_sums(x: Scores, f: Tensor) -> Normalizer:
    """sum_i exp((S_ij + f_i) / epsilon) [B, K] for f [B, N], as shift and sum."""
    t = x.plus(f[..., None])
    if t.shape[1] == 0:
        return Normalizer(t.new_full(t.shape[::2], -torch.inf), t.new_zeros(t.shape[::2]))
    largest = t.amax(1)
    return Normalizer(largest, _exp(x, t, finite(largest)[:, None]).sum(1))


def row_pass(
    x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
) -> tuple[Normalizer, Tensor | None, Tensor | None]:
    """The softmax R over j of (S + g) / epsilon, g [B, K].

    Returns its normalizer [B, N]; the column masses sum_i mass_i R_ij [B, K] if the row masses `mass` [B, N] are given;
    and R in the scores' dtype if `assignments`. above [B, N], if given, is an upper bound of each row's largest S + g.
    A backend may use it as the shift if it is close enough.
    """
    rows, e = _exponentials(x, g)
    columns = None if mass is None else _times(mass / rows.sum, e)
    return rows, columns, (e / rows.sum[..., None]).to(x.values.dtype).contiguous() if assignments else None


def products(x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """y_i = sum_j R_ij w_j [B, N] and sum_i mass_i y_i R_ij [B, K]."""
    e = _exponentials_again(x, g, rows)
    y = torch.einsum("bnk,bk->bn", e, w) / rows.sum
    return y, _times(mass * y / rows.sum, e)


def column_products(x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor:
    """sum_j C_ij w_j [B, N], with C the softmax over i of (S + f) / epsilon and `columns` its normalizer."""
    return torch.einsum("bnk,bk->bn", _column_exponentials(x, f, columns), per_sum(w, columns))


def assignment_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
) -> tuple[Tensor, Tensor]:
    """For a gradient [B, N, K] of R: d_i = sum_j R_ij grad_ij [B, N] and sum_i R_ij (grad_ij - d_i - less_i) [B, K].

    grad None: a gradient of zeros.
    """
    r = _exponentials_again(x, g, rows) / rows.sum[..., None]
    if grad is None:
        return torch.zeros_like(less), -_times(less, r)
    weighted = r * grad.to(x.dtype)
    d = weighted.sum(-1)
    return d, weighted.sum(1) - _times(d + less, r)


def score_gradient(
    x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor, terms: Sequence[RowTerm | ColumnTerm]
) -> tuple[Tensor, Tensor]:
    """G_ij = R_ij (grad_ij - less_i) - the terms.

    Returns inverse_epsilon * G in the scores' dtype, and sum_ij G_ij S_ij as [B, N].
    """
    r = _exponentials_again(x, g, rows) / rows.sum[..., None]
    total = r * ((0 if grad is None else grad.to(x.dtype)) - less[..., None])
    for term in terms:
        if isinstance(term, RowTerm):
            e = _exponentials_again(x, term.g, term.rows)
            per_row, per_pair = term.p / term.rows.sum, term.q / term.rows.sum
            total -= e * (per_row[..., None] + per_pair[..., None] * term.w[:, None])
        else:
            total -= _column_exponentials(x, term.f, term.columns) * per_sum(term.w, term.columns)[:, None]
    moment = torch.where(total != 0, total * x.values.to(x.dtype), 0).sum(-1)  # a score of -inf has weight 0
    return total.mul_(x.inverse_epsilon).to(x.values.dtype), moment


def _exp(x: Scores, t: Tensor, shift: Tensor) -> Tensor:
    return t.sub_(shift).mul_(x.inverse_epsilon).exp_()


def _exponentials(x: Scores, g: Tensor) -> tuple[Normalizer, Tensor]:
    t = x.plus(g[:, None])
    shift = t.amax(-1)
    e = _exp(x, t, shift[..., None])
    return Normalizer(shift, e.sum(-1)), e


def _exponentials_again(x: Scores, g: Tensor, rows: Normalizer) -> Tensor:
    return _exp(x, x.plus(g[:, None]), rows.shift[..., None])


def _column_exponentials(x: Scores, f: Tensor, columns: Normalizer) -> Tensor:
    return _exp(x, x.plus(f[..., None]), finite(columns.shift)[:, None])


def per_sum(w: Tensor, columns: Normalizer) -> Tensor:
    """w / columns.sum; 0 for a column with sum 0, which no row reaches."""
    return torch.where(columns.sum > 0, w / columns.sum, 0)


def _times(weights: Tensor, e: Tensor) -> Tensor:
    """sum_i weights_i e_ij, [B, K]."""
    return torch.einsum("bn,bnk->bk", weights, e)
