"""Sinkhorn's usual problem on a CPU where no gradient is asked for: one call of the engine, without an operator.

For few scores, arguments made into tensors, masses, operators and records would take longer than the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import LARGEST_COUNT, SMALLEST
from ..backends import native
from ..backends.choose import chooses_cpu
from ..backends.native import DTYPES, run
from ..library import intercepted
from ..small import MOST_ROWS, PLAIN, constant, needs_gradient, real_of

FEW = 1 << 18  # up to this many scores `col_potential` makes the assignments too, and drops them


class Found(NamedTuple):
    assignments: Tensor  # [N, K]
    row_potential: Tensor  # [N]
    col_potential: Tensor  # [K]
    solved: tuple[Any, ...]  # arguments of `op.sinkhorn` with the same results, the scores [1, N, K]


def solve(scores: Any, epsilon: Any, n_iters: Any, largest_epsilon: float) -> Found | None:
    """The given number of iterations with uniform masses; None for a call that is not for this path, or is an error."""
    if type(scores) not in PLAIN or not scores.is_cpu or scores.dtype not in DTYPES or scores.dim() != 2:
        return None
    n, k = scores.shape
    if not (0 < n <= MOST_ROWS and 0 < k <= MOST_ROWS) or needs_gradient(scores):
        return None
    if type(epsilon) is not float or not SMALLEST <= epsilon <= largest_epsilon:
        return None
    if type(n_iters) is not int or not 1 <= n_iters <= LARGEST_COUNT:
        return None
    if intercepted(scores) or not chooses_cpu():
        return None
    real = real_of(scores)
    scale, log_rows = constant(epsilon, real), constant(0.0, real, (1, n))
    log_prior = constant(-math.log(k), real, (1, k))
    assignments = torch.empty((n, k), dtype=scores.dtype)
    f, g = torch.empty(n, dtype=real), torch.empty(k, dtype=real)
    # What a backward would need, `Kept` in solver.py.
    columns = torch.empty((2 * n_iters + 2) * k, dtype=torch.float64)
    rows = torch.empty((n_iters + 1) * 2 * n, dtype=real)
    call = (
        *native.describe_rows(scores),
        k,
        real == torch.float64,
        native.threads(n * k, native.SCORES),
        assignments.data_ptr(),
        log_prior.data_ptr(),
        log_rows.data_ptr(),
        0,
        n_iters,
        rows.data_ptr(),
        n,
        columns.data_ptr(),
        k,
        f.data_ptr(),
        g.data_ptr(),
    )
    run(native.native_module().sinkhorn_solve(native.engine()[0], scale.item(), call))
    return Found(assignments, f, g, (scores[None], scale, log_prior, log_rows, None, n_iters, None, ""))


def col_potential(parts: Sequence[Any], epsilon: Any, n_iters: Any, largest_epsilon: float) -> Tensor | None:
    """The column potential [K] of a problem whose scores are one tensor of at most `FEW`, or None. No gradient."""
    if len(parts) != 1 or not isinstance(parts[0], Tensor) or parts[0].numel() > FEW:
        return None
    with torch.no_grad():
        found = solve(parts[0], epsilon, n_iters, largest_epsilon)
    return None if found is None else found.col_potential
