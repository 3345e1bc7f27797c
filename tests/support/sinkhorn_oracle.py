"""Sinkhorn's definition in plain PyTorch, differentiated by autograd: the truth in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    assignments: Tensor  # [N, K]
    row_potential: Tensor  # [N]
    col_potential: Tensor  # [K]


def log_masses(masses: Tensor) -> Tensor:
    """The logarithms of normalised masses. Masses of 0 get no gradient, not even through the sum."""
    present = masses > 0
    return torch.where(present, torch.where(present, masses, 1).log() - masses[present].sum().log(), -torch.inf)


def log_domain(
    scores: Tensor,
    epsilon: Tensor | float,
    prior: Tensor,
    row_marginal: Tensor,
    n_iters: int,
    init: Tensor | None = None,
    scaled: bool = False,
    offset: float = 0.0,
) -> Plan:
    """Scores [N, K], both marginals unnormalised, all of one dtype, in which everything is computed.

    scaled: divide the scores by epsilon first, and the potentials by 1 / epsilon last. offset: keep f too large by it
    and g too small. Both change nothing but rounding.
    """
    if scaled:
        start = None if init is None else init / epsilon
        moved = offset / float(torch.as_tensor(epsilon).detach())
        plan = log_domain(scores / epsilon, 1.0, prior, row_marginal, n_iters, start, offset=moved)
        empty = plan.row_potential.isinf(), plan.col_potential.isinf()  # -inf times epsilon has no derivative
        f, g = (part.masked_fill(at, 0) * epsilon for part, at in zip(plan[1:], empty, strict=True))
        return Plan(plan.assignments, f.masked_fill(empty[0], -torch.inf), g.masked_fill(empty[1], -torch.inf))
    columns, rows = prior > 0, row_marginal > 0
    # Autograd of a logsumexp of nothing but -inf is NaN, so rows and columns without mass are removed, and restored at
    # the end.
    part = scores[rows][:, columns]
    a, b = log_masses(row_marginal)[rows], log_masses(prior)[columns]
    f = torch.full_like(a, offset)
    if init is not None:
        f = epsilon * (a - ((part + (init[columns] - offset)) / epsilon).logsumexp(1))
    g = torch.zeros_like(b)
    for _ in range(n_iters):
        g = epsilon * (b - ((part + f[:, None]) / epsilon).logsumexp(0))
        f = epsilon * (a - ((part + g) / epsilon).logsumexp(1))
    return Plan(
        torch.zeros_like(scores).masked_scatter(
            columns.expand_as(scores), ((scores[:, columns] + g) / epsilon).softmax(1)
        ),
        scores.new_full(row_marginal.shape, -torch.inf).masked_scatter(rows, f - offset),
        scores.new_full(prior.shape, -torch.inf).masked_scatter(columns, g + offset),
    )


def swav_loop(scores: Tensor, epsilon: float, n_iters: int) -> Tensor:
    """The kernel-domain loop of SwAV's code, transposed back to rows of samples [N, K]."""
    q = torch.exp(scores / epsilon).T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(n_iters):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


class Gradients(NamedTuple):
    plan: Plan
    scores: Tensor
    epsilon: Tensor
    prior: Tensor
    row_marginal: Tensor


def differentiated(
    scores: Tensor,
    epsilon: float,
    prior: Tensor,
    row_marginal: Tensor,
    n_iters: int,
    init: Tensor | None,
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
    scaled: bool = False,
    offset: float = 0.0,
) -> Gradients:
    """Values and gradients of <cotangents, plan>, computed in `dtype`; infinite entries are ignored."""
    leaves = [
        value.detach().to(dtype).requires_grad_()
        for value in (scores, torch.tensor(epsilon, dtype=torch.float64), prior, row_marginal)
    ]
    plan = log_domain(*leaves, n_iters, None if init is None else init.to(dtype), scaled, offset)
    total = sum(
        (torch.where(part.isinf(), 0, part) * weight.to(dtype)).sum()
        for part, weight in zip(plan, cotangents, strict=True)
    )
    return Gradients(Plan(*(part.detach() for part in plan)), *torch.autograd.grad(total, leaves))
