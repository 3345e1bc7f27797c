"""Sinkhorn's potentials without the assignments, of stored scores or of features and prototypes. No derivative.

Scores of features are formed for a block of rows at a time, in each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import choose_backend
from ..library import LIBRARY, without_autocast
from ..sinkhorn.chunked import _rescaled
from ..sinkhorn.op import PASSES
from ..sinkhorn.reference import Normalizer, Scores
from ..sinkhorn.solver import Problem, _column_sums
from .features import block_rows, wide

LIBRARY.define(
    "prototype_potentials(Tensor rows, Tensor? prototypes, Tensor epsilon, Tensor log_prior, Tensor log_row_marginal, "
    "Tensor? init, int n_iters, float? tol, str group, bool by_row, str backend) -> "
    "(Tensor row_potential, Tensor col_potential, Tensor error, Tensor n_iters)"
)


class FromFeatures:
    """The passes that an iteration needs, over the scores of features x.values [B, N, D] and prototypes [K, D]."""

    def __init__(self, passes: Any, prototypes: Tensor, dtype: torch.dtype) -> None:
        self.passes, self.prototypes = passes, wide(prototypes, dtype)

    def _blocks(self, x: Scores) -> Iterator[tuple[slice, Scores]]:
        (batch, n, _), k = x.values.shape, len(self.prototypes)
        step = block_rows(batch * k, n, x.values.device)
        memory = x.new(batch * step * k)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            features = wide(x.values[:, rows], x.dtype)
            count = rows.stop - start
            scores = memory[: batch * count * k].view(-1, k)
            torch.mm(features.reshape(batch * count, -1), self.prototypes.T, out=scores)
            yield rows, Scores(scores.view(batch, count, k), x.inverse_epsilon)

    def column_sums(self, x: Scores, f: Tensor) -> Normalizer:
        batch, k = x.values.shape[0], len(self.prototypes)
        largest, total = x.new(batch, k).fill_(-torch.inf), x.new(batch, k).zero_()
        for rows, scores in self._blocks(x):
            part = self.passes.column_sums(scores, f[:, rows].contiguous())
            shift = torch.maximum(largest, part.shift)
            total = _rescaled(x, total, largest, shift) + _rescaled(x, part.sum, part.shift, shift)
            largest = shift
        return Normalizer(largest, total)

    def row_pass(
        self, x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
    ) -> tuple[Normalizer, Tensor | None, None]:
        batch, n, _ = x.values.shape
        found = Normalizer(x.new(batch, n), x.new(batch, n))
        columns = None if mass is None else x.new(batch, len(self.prototypes)).zero_()
        for rows, scores in self._blocks(x):
            bound, weights = (None if v is None else v[:, rows].contiguous() for v in (above, mass))
            part, part_columns, _ = self.passes.row_pass(scores, g, bound, weights, False)
            found.shift[:, rows], found.sum[:, rows] = part
            if columns is not None and part_columns is not None:
                columns += part_columns
        return found, columns, None


def _potentials(*args: Any) -> tuple[Tensor, ...]:
    rows, prototypes, *options, by_row, backend = args
    p = Problem(rows, *options)
    passes: Any = PASSES[backend]
    if prototypes is not None:
        passes = FromFeatures(passes, prototypes, p.epsilon.dtype)
    with without_autocast(rows.device), torch.no_grad():
        f, g, error, done = _iterated(passes, p, by_row)
    dtype = p.epsilon.dtype
    return f.to(dtype), g.to(dtype), error, torch.full((), done, dtype=torch.int64, device=rows.device)


def _iterated(passes: Any, p: Problem, by_row: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `solver.pass_by_pass`; by_row False: without the last row update."""
    x, log_mass = p.x, p.log_row_mass()
    mass, prior = log_mass.exp(), p.log_prior.exp()
    f, g = p.start(), p.start_columns()
    if g is not None:
        f = p.row_update(passes.row_pass(x, g, None, None, False)[0], log_mass)
    g = p.without_mass(p.exact * p.log_prior - _column_sums(passes, p, f).total(p.exact))
    error, done = prior.new_zeros(prior.shape[0]), 0
    for t in range(p.n_iters):
        last = t + 1 == p.n_iters and p.tol is None
        done += 1
        if last and not by_row:
            break
        rows, part, _ = passes.row_pass(x, g, -f, None if last else mass, False)
        f = p.row_update(rows, log_mass)
        if part is None:
            break
        masses = p.over_processes(part)
        if p.tol is not None:
            error = (masses - prior).abs().sum(-1)
            if done == p.n_iters or not bool((error >= p.tol).any()):  # NaN ends the iterations too
                break
        floor = torch.finfo(masses.dtype).tiny
        g = p.without_mass(g + p.exact * (p.log_prior - masses.clamp(min=floor).to(g.dtype).log()))
    return f, g, error, done


def _fake(*args: Any) -> tuple[Tensor, ...]:
    rows, epsilon, log_prior = args[0], args[2], args[3]
    batch, n, _ = rows.shape
    new = epsilon.new_empty
    return new(batch, n), new(log_prior.shape), new(batch), new((), dtype=torch.int64)


LIBRARY.impl("prototype_potentials", _potentials, "CompositeExplicitAutograd")
torch.library.register_fake("fastcl::prototype_potentials", _fake, lib=LIBRARY)


def potentials(rows: Tensor, prototypes: Tensor | None, *options: Any, by_row: bool = True) -> tuple[Tensor, ...]:
    """Potentials [B, N] and [B, K], error [B], number of iterations. rows, without `prototypes`: scores [B, N, K].

    options: the further arguments of `solver.Problem`. by_row: False saves a pass; the row potentials are then those of
    the iteration before.
    """
    backend = choose_backend(rows.device, options[0].dtype, "sinkhorn")
    detached = None if prototypes is None else prototypes.detach()
    outputs: tuple[Tensor, ...] = torch.ops.fastcl.prototype_potentials(
        rows.detach(), detached, *options, by_row, backend
    )
    return outputs
