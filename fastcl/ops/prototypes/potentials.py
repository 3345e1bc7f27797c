"""Sinkhorn's potentials without the assignments, of stored scores or of features and prototypes. No derivative.

The rows may lie in several tensors, which are read in turn. Scores of features are formed for a block of rows at a
time, in each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import choose_backend
from ..library import LIBRARY, without_autocast
from ..sinkhorn.chunked import rescaled
from ..sinkhorn.op import PASSES
from ..sinkhorn.reference import Normalizer, Scores
from ..sinkhorn.solver import Problem, column_normalizer
from .features import block_rows, wide

LIBRARY.define(
    "prototype_potentials(Tensor[] rows, Tensor? prototypes, Tensor epsilon, Tensor log_prior, "
    "Tensor log_row_marginal, Tensor? init, int n_iters, float? tol, str group, bool by_row, str backend) -> "
    "(Tensor row_potential, Tensor col_potential, Tensor error, Tensor n_iters)"
)


class Parts:
    """The passes that an iteration needs, over the rows of several tensors.

    rows: scores [B, N_part, K]; or with prototypes [K, D] features [B, N_part, D]. The values of a pass's `Scores` are
    not read.
    """

    def __init__(self, passes: Any, rows: Sequence[Tensor], prototypes: Tensor | None, dtype: torch.dtype) -> None:
        self.passes, self.rows, self.dtype = passes, rows, dtype
        self.prototypes = None if prototypes is None else wide(prototypes, dtype)
        self.k = rows[0].shape[2] if prototypes is None else len(prototypes)

    def _blocks(self, x: Scores) -> Iterator[tuple[slice, Scores]]:
        first = 0
        for part in self.rows:
            batch, n, d = part.shape
            # Stored scores are one block: a backend's pass has its own.
            step = max(n, 1) if self.prototypes is None else block_rows(batch, n, self.prototypes)
            memory = x.new(batch * step * self.k if self.prototypes is not None else 0)
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                count = rows.stop - start
                scores = part[:, rows]
                if self.prototypes is not None:
                    features = wide(scores, self.dtype).reshape(batch * count, d)
                    scores = memory[: batch * count * self.k].view(batch * count, self.k)
                    torch.mm(features, self.prototypes.T, out=scores)
                    scores = scores.view(batch, count, self.k)
                yield slice(first + start, first + rows.stop), Scores(scores, x.inverse_epsilon)
            first += n

    def column_sums(self, x: Scores, f: Tensor) -> Normalizer:
        largest, total = x.new(len(f), self.k).fill_(-torch.inf), x.new(len(f), self.k).zero_()
        for rows, scores in self._blocks(x):
            part = self.passes.column_sums(scores, f[:, rows].contiguous())
            shift = torch.maximum(largest, part.shift)
            total = rescaled(x, total, largest, shift) + rescaled(x, part.sum, part.shift, shift)
            largest = shift
        return Normalizer(largest, total)

    def row_pass(
        self, x: Scores, g: Tensor, above: Tensor | None, mass: Tensor | None, assignments: bool
    ) -> tuple[Normalizer, Tensor | None, None]:
        batch, n = len(g), sum(part.shape[1] for part in self.rows)
        found = Normalizer(x.new(batch, n), x.new(batch, n))
        columns = None if mass is None else x.new(batch, self.k).zero_()
        for rows, scores in self._blocks(x):
            bound, weights = (None if v is None else v[:, rows].contiguous() for v in (above, mass))
            part, part_columns, _ = self.passes.row_pass(scores, g, bound, weights, False)
            found.shift[:, rows], found.sum[:, rows] = part
            if columns is not None and part_columns is not None:
                columns += part_columns
        return found, columns, None


def _potentials(*args: Any) -> tuple[Tensor, ...]:
    rows, prototypes, *options, by_row, backend = args
    p = Problem(rows[0], *options)
    passes: Any = PASSES[backend]
    if prototypes is not None or len(rows) > 1:
        passes = Parts(passes, rows, prototypes, p.epsilon.dtype)
    device = rows[0].device
    with without_autocast(device), torch.no_grad():
        f, g, error, done = _iterated(passes, p, by_row)
    dtype = p.epsilon.dtype
    return f.to(dtype), g.to(dtype), error, torch.full((), done, dtype=torch.int64, device=device)


def _iterated(passes: Any, p: Problem, by_row: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `solver.pass_by_pass`; by_row False: without the last row update."""
    x, log_mass = p.x, p.log_row_mass()
    mass, prior = log_mass.exp(), p.log_prior.exp()
    f, g = p.start(), p.start_columns()
    if g is not None:
        f = p.row_update(passes.row_pass(x, g, None, None, False)[0], log_mass)
    g = p.without_mass(p.exact * p.log_prior - column_normalizer(passes, p, f).total(p.exact))
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
    epsilon, log_prior, log_row_marginal = args[2:5]
    new = epsilon.new_empty
    return new(log_row_marginal.shape), new(log_prior.shape), new(len(log_prior)), new((), dtype=torch.int64)


LIBRARY.impl("prototype_potentials", _potentials, "CompositeExplicitAutograd")
torch.library.register_fake("fastcl::prototype_potentials", _fake, lib=LIBRARY)


def potentials(
    rows: Sequence[Tensor], prototypes: Tensor | None, *options: Any, by_row: bool = True
) -> tuple[Tensor, ...]:
    """Potentials [B, N] and [B, K], error [B], number of iterations.

    rows: with prototypes [K, D] features [B, N_part, D], else scores [B, N_part, K]. options: the further arguments of
    `solver.Problem`. by_row: False saves a pass; the row potentials are then those of the iteration before.
    """
    backend = choose_backend(rows[0].device, options[0].dtype, "sinkhorn")
    detached = None if prototypes is None else prototypes.detach()
    outputs: tuple[Tensor, ...] = torch.ops.fastcl.prototype_potentials(
        [part.detach() for part in rows], detached, *options, by_row, backend
    )
    return outputs
