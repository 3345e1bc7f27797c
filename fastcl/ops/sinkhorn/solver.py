"""Sinkhorn's iteration and its gradients, built from the passes of a backend.

P_ij = exp((S_ij + f_i + g_j) / epsilon) has row masses a and column masses b; all tensors have a leading batch
dimension B. With lse(t) = epsilon log sum exp(t / epsilon), one iteration is

    g_j = epsilon log b_j - lse_i(S_ij + f_i),      then      f_i = epsilon log a_i - lse_j(S_ij + g_j)

After it P = a R, with R the softmax over j of (S + g) / epsilon. The column masses are then m_j = sum_i a_i R_ij, and
the next column update is g_j += epsilon (log b_j - log m_j). A row update and the next column update therefore take one
exponential per entry and one read of the scores.

m_j does not underflow if b_j >= 1e-30 and the ratio of row masses is less extreme than that: after a column update
column j has mass b_j, a row update maps P_ij to a_i P_ij / sum_j P_ij, and the denominator is at most sum_j b_j = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from .reference import ColumnTerm, Normalizer, RowTerm, Scores


class Passes(Protocol):
    """The passes of a backend; `reference` describes them.

    A backend may also define `solve(problem, out) -> Solution | None`: all of `pass_by_pass` in one call, or None for a
    problem that it does not support; `out` [B, N, K], if not None, is memory that the assignments may take. And
    `backward(problem, moments) -> Passes`: the passes of one backward, for which they may keep numbers from one to the
    next in the memory of the scores' gradient; without `moments` that result of `score_gradient` is not needed.
    """

    def column_sums(self, x: Scores, f: Tensor) -> Normalizer: ...
    def row_pass(
        self, x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
    ) -> tuple[Normalizer, Tensor | None, Tensor | None]: ...
    def products(self, x: Scores, g: Tensor, rows: Normalizer, mass: Tensor, w: Tensor) -> tuple[Tensor, Tensor]: ...
    def column_products(self, x: Scores, f: Tensor, columns: Normalizer, w: Tensor) -> Tensor: ...
    def assignment_gradient(
        self, x: Scores, g: Tensor, rows: Normalizer, grad: Tensor | None, less: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def score_gradient(
        self,
        x: Scores,
        g: Tensor,
        rows: Normalizer,
        grad: Tensor | None,
        less: Tensor,
        terms: Sequence[RowTerm | ColumnTerm],
    ) -> tuple[Tensor, Tensor]: ...


class Iterations(Protocol):
    """The optional function `iterate` of a backend: all iterations at once, from the first g [B, K] in float64.

    Fills `kept` except for its first rows and columns, and returns the assignments [B, N, K], the L1 error of the
    column masses [B] and the number of iterations []; or None for a problem that it does not support.
    """

    def __call__(self, p: Problem, g: Tensor, mass: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor] | None: ...


@dataclass(frozen=True)
class Problem:
    """A Sinkhorn problem. Masses have the dtype of epsilon: float32, or float64 for float64 scores."""

    scores: Tensor  # [B, N, K]: this process's rows
    epsilon: Tensor  # []
    log_prior: Tensor  # [B, K], normalised; -inf: no mass
    log_row_marginal: Tensor  # [B, N]; not normalised, because the sum includes other processes' rows
    init: Tensor | None  # [B, K]: a column potential
    n_iters: int
    tol: float | None
    group: str  # name of the process group that shares the rows; "": none

    @property
    def steps(self) -> int:
        """Number of iterations that are saved: all, or with a tolerance only the last."""
        return self.n_iters if self.tol is None else 1

    # Cached, because for few scores these operations take as long as the passes.
    @cached_property
    def x(self) -> Scores:
        return Scores(self.scores, self.exact.reciprocal().to(self.epsilon.dtype))

    @cached_property
    def exact(self) -> Tensor:
        """Epsilon in float64. Potentials, which are only O(N + K) numbers, are computed with it in float64."""
        return self.epsilon.double()

    def log_row_mass(self) -> Tensor:
        total = self.over_processes(self.log_row_marginal.exp().sum(-1))
        return self.log_row_marginal - total.log()[:, None]

    @cached_property
    def massless(self) -> Tensor:
        return self.log_prior == -torch.inf

    def start(self) -> Tensor:
        """f = 0; -inf for rows without mass, which are thus excluded from the first column update on."""
        return self.exact.new_zeros(self.log_row_marginal.shape).masked_fill(
            self.log_row_marginal == -torch.inf, -torch.inf
        )

    def start_columns(self) -> Tensor | None:
        return None if self.init is None else self.without_mass(self.init.to(self.exact.dtype))

    def without_mass(self, g: Tensor) -> Tensor:
        return g.masked_fill(self.massless, -torch.inf)

    def row_update(self, rows: Normalizer, log_mass: Tensor) -> Tensor:
        """f [B, N] from the rows' normalizer."""
        return self.exact * log_mass - rows.total(self.exact)

    def over_processes(self, part: Tensor, largest: bool = False) -> Tensor:
        """The sum (or maximum) over the processes of the group."""
        if not self.group:
            return part
        whole = part.contiguous().clone()
        dist.all_reduce(whole, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, named(self.group))
        return whole


class Kept(NamedTuple):
    """Normalizers and potentials of T iterations, stacked and saved for the backward."""

    rows: Tensor  # [T + 1, 2, B, N]: shift and sum of the row update from `init`, then of each iteration's
    columns: Tensor  # [2 T + 2, B, K] float64: shift and sum of the first column update, then T times g, then T times m

    @classmethod
    def like(cls, p: Problem) -> Kept:
        batch, n, k = p.scores.shape
        rows = p.epsilon.new_zeros(p.steps + 1, 2, batch, n)
        return cls(rows, p.epsilon.new_zeros(2 * p.steps + 2, batch, k, dtype=torch.float64))

    @property
    def steps(self) -> int:
        return self.rows.shape[0] - 1

    @property
    def first(self) -> Normalizer:
        shift, total = self.columns[:2].to(self.rows.dtype)
        return Normalizer(shift, total)

    def step(self, t: int) -> tuple[Tensor, Normalizer, Tensor]:
        """g [B, K], normalizer of the rows [B, N] and column masses [B, K] of iteration t, counted from 0."""
        shift, total = self.rows[t + 1]
        masses = self.columns[2 + self.steps + t].to(self.rows.dtype)
        return self.columns[2 + t], Normalizer(shift, total), masses


class Solution(NamedTuple):
    assignments: Tensor  # [B, N, K]
    row_potential: Tensor  # [B, N]
    col_potential: Tensor  # [B, K]
    error: Tensor  # [B]: L1 error of the columns; 0 without a tolerance
    n_iters: Tensor  # [] int64
    kept: Kept


def solve(passes: Passes, p: Problem, out: Tensor | None = None) -> Solution:
    """out [B, N, K]: becomes the assignments."""
    at_once = getattr(passes, "solve", None)
    solution: Solution | None = None if at_once is None else at_once(p, out)
    if solution is None:
        solution = pass_by_pass(passes, p)
    if out is None or solution.assignments is out:
        return solution
    return solution._replace(assignments=out.copy_(solution.assignments))


def pass_by_pass(passes: Passes, p: Problem) -> Solution:
    x, log_mass = p.x, p.log_row_mass()
    mass, prior = log_mass.exp(), p.log_prior.exp()
    kept = Kept.like(p)
    f, g = p.start(), p.start_columns()
    if g is not None:
        rows, _, _ = passes.row_pass(x, g, None, None, False)
        kept.rows[0, 0], kept.rows[0, 1] = rows
        f = p.row_update(rows, log_mass)
    columns = column_normalizer(passes, p, f)
    kept.columns[0], kept.columns[1] = columns
    g = p.without_mass(p.exact * p.log_prior - columns.total(p.exact))
    iterate: Iterations | None = None if p.group else getattr(passes, "iterate", None)
    if iterate is not None and (ended := iterate(p, g, mass, kept)) is not None:
        g, rows, _ = kept.step(kept.steps - 1)
        f = p.row_update(rows, log_mass)
        return Solution(ended[0], f.to(p.epsilon.dtype), g.to(p.epsilon.dtype), *ended[1:], kept)
    error = prior.new_zeros(prior.shape[0])
    done, assignments = 0, None
    for t in range(p.n_iters):
        last = t + 1 == p.n_iters and p.tol is None
        # After a column update no entry of the plan exceeds its column's mass, so none exceeds 1: S + g <= -f.
        rows, part, assignments = passes.row_pass(x, g, -f, None if last else mass, last)
        f = p.row_update(rows, log_mass)
        done += 1
        place = t if p.tol is None else 0
        kept.rows[place + 1, 0], kept.rows[place + 1, 1] = rows
        kept.columns[2 + place] = g
        if part is None:
            break
        masses = p.over_processes(part)
        kept.columns[2 + kept.steps + place] = masses
        if p.tol is not None:
            error = (masses - prior).abs().sum(-1)
            if done == p.n_iters or not bool((error >= p.tol).any()):  # NaN ends the iterations too
                break
        floor = torch.finfo(masses.dtype).tiny
        g = p.without_mass(g + p.exact * (p.log_prior - masses.clamp(min=floor).to(g.dtype).log()))
    if assignments is None:
        _, _, assignments = passes.row_pass(x, g, rows.shift, None, True)
        assert assignments is not None
    return Solution(
        assignments,
        f.to(p.epsilon.dtype),
        g.to(p.epsilon.dtype),
        error,
        torch.full((), done, dtype=torch.int64, device=p.scores.device),  # a kernel, which a CUDA graph can capture
        kept,
    )


def column_normalizer(passes: Passes, p: Problem, f: Tensor) -> Normalizer:
    """Of the columns over the rows of all processes."""
    part = passes.column_sums(p.x, f)
    if not p.group:
        return part
    largest = p.over_processes(part.shift, largest=True)
    scale = torch.where(part.sum > 0, ((part.shift - largest) * p.x.inverse_epsilon).exp(), 0)
    return Normalizer(largest, p.over_processes(part.sum * scale))


class Needs(NamedTuple):
    """Which gradients are needed."""

    scores: bool
    epsilon: bool
    log_prior: bool
    log_row_marginal: bool


class Gradients(NamedTuple):
    scores: Tensor | None  # [B, N, K]
    epsilon: Tensor | None  # []
    log_prior: Tensor  # [B, K]: gradient of this process's copy
    log_row_marginal: Tensor  # [B, N]


@dataclass(frozen=True)
class Incoming:
    """Incoming gradients of the results of `solve`."""

    assignments: Tensor | None  # [B, N, K]
    row_potential: Tensor  # [B, N]
    col_potential: Tensor  # [B, K]


class _Adjoint(NamedTuple):
    """Gradients of the logarithms of the masses, and the terms of the gradient of S / epsilon."""

    less: Tensor  # [B, N]
    terms: list[RowTerm | ColumnTerm]
    log_prior: Tensor
    log_mass: Tensor  # [B, N]
    from_init: Tensor  # [] float64: the part of the gradient of 1 / epsilon that passes through init / epsilon


def differentiate(passes: Passes, p: Problem, kept: Kept, error: Tensor, grad: Incoming, needs: Needs) -> Gradients:
    """Gradients: implicit if a tolerance was met, else exact for the iterations that ran."""
    log_mass = p.log_row_mass()
    if p.tol is not None and not bool((error >= p.tol).any()):  # the condition of `pass_by_pass`: NaN counts as met
        passes = _of_backward(passes, p, needs)
        adjoint = _implicit(passes, p, kept, grad, log_mass)
    else:
        if p.tol is not None:
            # With a tolerance the forward saves only the last iteration, so the iterations run again.
            p = replace(p, tol=None)
            kept = solve(passes, p).kept
        passes = _of_backward(passes, p, needs)
        adjoint = _unrolled(passes, p, kept, grad, log_mass)
    scores = epsilon = None
    if needs.scores or needs.epsilon:
        g, rows, _ = kept.step(kept.steps - 1)
        scores, moment = passes.score_gradient(p.x, g, rows, grad.assignments, adjoint.less, adjoint.terms)
        f = p.row_update(rows, log_mass)
        potentials = _product(grad.row_potential, f).sum() + _product(grad.col_potential, g).sum()
        total = potentials / p.exact - (moment.double().sum() + adjoint.from_init) / p.exact.square()
        epsilon = total.to(p.epsilon.dtype)
    over_all = p.over_processes(adjoint.log_mass.sum(-1))
    log_row_marginal = adjoint.log_mass - log_mass.exp() * over_all[:, None]
    return Gradients(scores, epsilon, adjoint.log_prior, log_row_marginal)


def _of_backward(passes: Passes, p: Problem, needs: Needs) -> Passes:
    own = getattr(passes, "backward", None) if needs.scores else None
    result: Passes = passes if own is None else own(p, needs.epsilon)
    return result


def _product(grad: Tensor, potential: Tensor) -> Tensor:
    """grad * potential; 0 for an infinite potential, which is constant and has no gradient."""
    return torch.where(potential.isinf(), 0, grad * potential)


def _scaled(p: Problem, grad: Incoming, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u = f / epsilon and v = g / epsilon, the variables of the adjoint, from gradients of f and g."""
    u = torch.where(log_mass == -torch.inf, 0, p.epsilon * grad.row_potential)
    v = torch.where(p.log_prior == -torch.inf, 0, p.epsilon * grad.col_potential)
    return u, v


def _unrolled(passes: Passes, p: Problem, kept: Kept, grad: Incoming, log_mass: Tensor) -> _Adjoint:
    """The gradient back through the iterations.

    C, the softmax over i of (S + f) / epsilon, equals a R / m of the previous iteration, so it needs no exponential.
    """
    x, mass = p.x, log_mass.exp()
    u_grad, v_grad = _scaled(p, grad, log_mass)
    g, rows, _ = kept.step(kept.steps - 1)
    d, part = passes.assignment_gradient(x, g, rows, grad.assignments, u_grad)
    less = d + u_grad
    v_grad = v_grad + part  # of this process's rows
    log_prior, log_mass_grad = v_grad, u_grad
    terms: list[RowTerm | ColumnTerm] = []
    for t in range(kept.steps - 2, -1, -1):
        g, rows, masses = kept.step(t)
        w = torch.where(masses > 0, p.over_processes(v_grad) / masses, 0)
        y, v_grad = passes.products(x, g, rows, mass, w)
        u_grad = -mass * y
        terms.append(RowTerm(g, rows, u_grad, mass, w))
        log_prior, log_mass_grad = log_prior + v_grad, log_mass_grad + u_grad
    v_grad = p.over_processes(v_grad)
    from_init = p.exact.new_zeros(())
    start = p.start_columns()
    if start is None:
        terms.append(ColumnTerm(p.start(), kept.first, v_grad))
    else:
        rows = Normalizer(kept.rows[0, 0], kept.rows[0, 1])
        f = p.row_update(rows, log_mass)
        u_grad = -passes.column_products(x, f, kept.first, v_grad)
        terms.append(ColumnTerm(f, kept.first, v_grad))
        terms.append(RowTerm(start, rows, u_grad, torch.zeros_like(u_grad), torch.zeros_like(v_grad)))
        log_mass_grad = log_mass_grad + u_grad
        _, v_grad = passes.assignment_gradient(x, start, rows, None, u_grad)
        from_init = _product(v_grad, start).sum()
    return _Adjoint(less, terms, log_prior, log_mass_grad, from_init)


CG_ITERATIONS = 500


def _implicit(passes: Passes, p: Problem, kept: Kept, grad: Incoming, log_mass: Tensor) -> _Adjoint:
    """The gradient by the implicit function theorem at the fixed point.

    With X = S / epsilon, u = f / epsilon, v = g / epsilon and P's margins a and m, du and dv solve

        a_i du_i + sum_j P_ij dv_j = da_i - sum_j P_ij dX_ij,      sum_i P_ij du_i + m_j dv_j = db_j - sum_i P_ij dX_ij.

    The adjoint system, reduced to the columns, is (diag m - R' diag(a) R) beta = r with R = P / a. Scaled by sqrt m it
    is the identity minus a symmetric matrix. It is singular only along sqrt m: moving a constant from u to v does not
    change the plan.
    """
    x, mass = p.x, log_mass.exp()
    g, rows, masses = kept.step(0)
    u_grad, v_grad = _scaled(p, grad, log_mass)
    d, part = passes.assignment_gradient(x, g, rows, grad.assignments, u_grad)
    right = p.over_processes(v_grad + part)
    root = masses.sqrt()
    inverse_root = torch.where(masses > 0, masses.rsqrt(), 0)
    null = root / torch.linalg.vector_norm(root, dim=-1, keepdim=True)

    def project(z: Tensor) -> Tensor:
        return z.sub(null * (null * z).sum(-1, keepdim=True))

    def system(z: Tensor) -> Tensor:
        _, columns = passes.products(x, g, rows, mass, z * inverse_root)
        return project(z - p.over_processes(columns) * inverse_root)

    beta = _conjugate_gradients(system, project(right * inverse_root)) * inverse_root
    y, _ = passes.products(x, g, rows, mass, beta)
    log_mass_grad = u_grad - mass * y
    less = d + log_mass_grad
    term = RowTerm(g, rows, torch.zeros_like(mass), mass, beta)
    log_prior = masses * beta / (dist.get_world_size(named(p.group)) if p.group else 1)
    return _Adjoint(less, [term], log_prior, log_mass_grad, p.exact.new_zeros(()))


def named(group: str) -> dist.ProcessGroup:
    named: dist.ProcessGroup = torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return named


class _System(Protocol):
    def __call__(self, z: Tensor) -> Tensor: ...


def _conjugate_gradients(system: _System, right: Tensor) -> Tensor:
    """Solves system(z) = right for z [B, K], separately for each problem of the batch, to the dtype's precision."""
    z: Tensor
    z, residual, direction = torch.zeros_like(right), right, right
    square = (residual * residual).sum(-1, keepdim=True)
    enough = square * (8 * torch.finfo(right.dtype).eps) ** 2
    for _ in range(CG_ITERATIONS):
        open_ = square > enough
        if not bool(open_.any()):
            break
        image = system(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(open_ & (curvature > 0), square / curvature, 0)
        z = z + step * direction
        residual = residual - step * image
        before, square = square, (residual * residual).sum(-1, keepdim=True)
        square = torch.where(step > 0, square, 0)  # without curvature the direction is rounding: that problem is done
        direction = residual + torch.where(before > 0, square / before, 0) * direction
    return z
