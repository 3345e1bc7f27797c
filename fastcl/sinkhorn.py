"""Sinkhorn's algorithm with any prior over the columns, in the log domain: the public function, and priors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import (
    INTEGER_DTYPES,
    ROW_DTYPES,
    check_count,
    check_device,
    check_mass_values,
    check_masses,
    check_rows,
    check_scores,
    check_tensor,
    few,
    finite_number,
    positive_number,
    scalar_tensor,
    values_visible,
)
from .ops.backends.rows import accumulation_dtype
from .ops.prototypes.potentials import potentials
from .ops.sinkhorn import small
from .ops.sinkhorn.op import sinkhorn as _solve
from .ops.sinkhorn.op import sum_over

LARGEST_EPSILON = 1e36  # potentials are up to some hundred times as large and must fit float32


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """What `sinkhorn` returns. With a batch, every field but `n_iters` has a leading dimension B."""

    assignments: Tensor
    """``[N, K]``, rows sum to 1; dtype of the scores. None from `sinkhorn_potentials`"""
    row_potential: Tensor
    """``[N]``, in the scores' units; -inf for a row without mass. float32, float64 for float64 scores"""
    col_potential: Tensor
    """``[K]``, in the scores' units; -inf for a column without mass. Can be passed as ``init`` of a later call"""
    marginal_error: Tensor | None
    """L1 distance of the column sums from the prior, ``[]``; None unless ``tol`` is given"""
    n_iters: int | Tensor
    """number of iterations: the argument, or with ``tol`` an int64 tensor ``[]`` on the scores' device"""
    _solved: tuple[Any, ...] | None = field(default=None, repr=False)  # arguments of `_solve`
    _lent: bool = field(default=False, repr=False)  # the caller may have overwritten the assignments

    @property
    def transport_cost(self) -> Tensor:
        r"""The cost of the plan, :math:`-\sum_{ij} P_{ij} S_{ij}`: ``[]``, or ``[B]`` for a batch.

        float32, float64 for float64 scores. The plan has total mass 1, and scores of -inf, which have no mass,
        contribute nothing. Differentiable once in scores, epsilon, prior and row_marginal, as exactly as the
        assignments. Computed anew on every access, from scores and assignments, without another N x K matrix. The
        problem is solved again for half-precision scores, in float32, because their assignments are rounded; and with
        ``out``, which a later call may have overwritten.

        With ``group`` the value covers the process's own rows, and the values of all processes add up to the cost. It
        is a collective: all processes of the group must access it.
        """
        if self._solved is None:
            raise ValueError("transport_cost: expected a result of fastcl.sinkhorn, got one without scores")
        scores, epsilon, log_prior, log_rows, *options = self._solved
        assignments = self.assignments if self.assignments.dim() == 3 else self.assignments[None]
        if self._lent or assignments.dtype != epsilon.dtype:
            scores = scores.to(epsilon.dtype)
            assignments = _solve(scores, epsilon, log_prior, log_rows, *options)[0]
        mass = log_rows.exp()
        total = mass.sum(-1, keepdim=True)
        if options[-1]:
            total = sum_over(options[-1], total)
        costs: Tensor = -(mass / total * _RowScores.apply(assignments, scores)).sum(-1)
        return costs if self.assignments.dim() == 3 else costs[0]


class _RowScores(torch.autograd.Function):
    """Mean score [B, N] of each row, weighted by its assignments R [B, N, K], in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, assignments: Tensor, scores: Tensor) -> Tensor:
        parts = []
        for r, s in _blocks(assignments, scores):
            parts.append(torch.where(s == -torch.inf, 0, r * s).sum(-1))
        found = torch.cat(parts, 1) if parts else assignments.new_zeros(assignments.shape[:2])
        ctx.save_for_backward(assignments, scores, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        assignments, scores, found = ctx.saved_tensors
        of_assignments = of_scores = None
        if ctx.needs_input_grad[0]:
            # A row of R adds up to 1: subtracting a constant from its gradient changes only the rounding.
            of_assignments = (scores - found[..., None]).mul_(grad[..., None]).masked_fill_(scores == -torch.inf, 0)
        if ctx.needs_input_grad[1]:
            of_scores = assignments * grad[..., None]
        return of_assignments, of_scores


BLOCK = 1 << 20  # numbers in a block of assignments


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the same rows of all matrices [B, N, K], `BLOCK` numbers each; a single block while compiling."""
    batch, n, k = matrices[0].shape
    if torch.compiler.is_compiling():
        yield matrices
        return
    step = max(BLOCK // max(batch * k, 1), 1)
    for i in range(0, n, step):
        yield tuple(matrix[:, i : i + step] for matrix in matrices)


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float | Tensor = 0.05,
    prior: Tensor | None = None,
    row_marginal: Tensor | None = None,
    n_iters: int = 3,
    tol: float | None = None,
    init: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    out: Tensor | None = None,
) -> SinkhornResult:
    r"""Entropy-regularised assignment of N rows to K columns with prescribed masses.

    The plan

    .. math:: P_{ij} = \exp\big((S_{ij} + f_i + g_j) / \varepsilon\big)

    maximises :math:`\langle P, S \rangle + \varepsilon H(P)` subject to row sums ``row_marginal`` and column sums
    ``prior``. It starts from f = 0. An iteration makes the column sums exact, then the row sums, so the rows of the
    result are exact. The assignments are softmax_j((S + g) / epsilon); after the same number of iterations they equal
    those of SwAV's loop. All computation is in the log domain, so epsilon and scores may have any size. An iteration
    reads the scores once, and the assignments are the only N x K matrix.

    Args:
        scores: ``[N, K]`` or ``[B, N, K]``; float64, float32, bfloat16 or float16, any strides. An entry of -inf gets
            no assignment. If all entries of a row, or of a column with mass, are -inf, there is no solution: an error
            on the CPU; NaN on other devices, under torch.compile and with ``group``.
        epsilon: regularisation > 0, at most 1e36, in the scores' units: a number or a tensor of one element.
        prior: ``[K]`` (or ``[B, K]``) non-negative masses of the columns, normalised internally. None: uniform. A
            column without mass gets exactly no assignment.
        row_marginal: ``[N]`` (or ``[B, N]``) non-negative masses of the rows, normalised internally. None: uniform. A
            row without mass (padding) does not influence the others if its scores are finite; its own assignments are
            still computed.
        n_iters: number of iterations; with ``tol`` the maximum.
        tol: iterate until the L1 distance of the column sums from the prior is below it.
        init: ``[K]`` (or ``[B, K]``): a column potential from an earlier call. One row update from it comes first and
            is not counted. No gradient flows to it.
        group: process group that shares the rows. Each process passes its own rows (any number of them) and gets their
            assignments and row potentials. One all-reduce of K numbers per iteration, two in the first. Prior, epsilon
            and ``init`` must be the same on all processes.
        out: memory for the assignments, with the scores' shape, dtype and device, and apart from their memory; the
            result's ``assignments`` are this tensor. Without it every call allocates a new matrix; on a CPU the system
            maps the pages of a large one at its first write, which can take as long as the iterations. Only where no
            gradient is asked for. After an error the contents are undefined.

    Returns:
        :class:`SinkhornResult`; its assignments and potentials are differentiable once in scores, epsilon, prior and
        row_marginal. The gradient is exact for the iterations that ran, with O(T (N + K)) memory for T iterations. If
        ``tol`` was met it is the gradient of the fixed point, by implicit differentiation, with O(N + K) memory.
        Entries without mass have gradient 0. With ``group``, each process gets the gradient of the sum of all
        processes' losses with respect to its own tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.

    Source: Cuturi, "Sinkhorn distances" (2013); Caron et al., "Unsupervised learning of visual features by contrasting
    cluster assignments" (2020); Cuturi, Teboul, Niles-Weed and Vert, "Supervised quantile normalization for low rank
    matrix factorization" (2020) for the implicit gradient.
    """
    usual = prior is None and row_marginal is None and tol is None and init is None and group is None and out is None
    if usual and (found := small.solve(scores, epsilon, n_iters, LARGEST_EPSILON)) is not None:
        f, g, solved = found.row_potential, found.col_potential, found.solved
        if not f.sum().item() + g.sum().item() < torch.inf:
            _check_finite(solved[0], solved[2], solved[3], f, g)
        return SinkhornResult(found.assignments, f, g, None, n_iters, solved)
    check_scores("scores", scores)
    batched = scores.dim() == 3
    s = scores if batched else scores[None]
    dtype = accumulation_dtype(scores)
    sizes = s.shape[0] if batched else None, s.shape[1], s.shape[2]
    options = _options("scores", scores, sizes, dtype, epsilon, prior, row_marginal, n_iters, tol, init, group)
    solved = (s, *options)
    log_prior, log_rows, count = options[1], options[2], options[4]
    if out is not None:
        _check_out(out, scores, epsilon, prior, row_marginal)
        # `transport_cost` reads them again, and they may lie in the memory of `out`.
        options = (options[0].clone(), *options[1:3], None if options[3] is None else options[3].clone(), *options[4:])
        solved = (s, *options)
    outputs = _solve(*solved, out=out if out is None or batched else out[None])
    if group is None:
        _check_finite(s, log_prior, log_rows, outputs[1], outputs[2])
    # The derivative of `[0]` would copy the gradient into a matrix of zeros; that of `squeeze` is a view.
    assignments, rows, columns, error = outputs[:4] if batched else (output.squeeze(0) for output in outputs[:4])
    if out is not None:
        assignments = out
    if tol is None:
        return SinkhornResult(assignments, rows, columns, None, count, solved, out is not None)
    return SinkhornResult(assignments, rows, columns, error, outputs[4], solved, out is not None)


def _check_out(out: Any, scores: Tensor, *others: Any) -> None:
    check_tensor("out", out)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (out, scores, *others)):
        raise ValueError("out: expected None where a gradient is asked for (not under torch.no_grad()), got a tensor")
    if out.dtype != scores.dtype:
        raise TypeError(f"out: expected the scores' dtype {scores.dtype}, got {out.dtype}")
    if out.shape != scores.shape:
        raise ValueError(f"out: expected the scores' shape {list(scores.shape)}, got {list(out.shape)}")
    check_device("out", out, scores.device)
    if _overlaps_itself(out):
        raise ValueError(f"out: expected a number of its own for each assignment, got strides {list(out.stride())}")
    if values_visible(out) and values_visible(scores) and out.numel():
        (first, last), (start, end) = _addresses(out), _addresses(scores)
        if first < end and start < last:
            raise ValueError("out: expected memory apart from that of the scores, got a view of the same numbers")


def _overlaps_itself(matrix: Tensor) -> bool:
    """Whether two numbers may have the same place."""
    last = 0  # place of the last number of the dimensions so far
    for step, size in sorted(zip(matrix.stride(), matrix.shape, strict=True)):
        if size > 1 and step <= last:
            return matrix.numel() > 0
        last += step * (size - 1)
    return False


def _addresses(matrix: Tensor) -> tuple[int, int]:
    """Of the first byte, and behind the last one."""
    last = sum((size - 1) * step for size, step in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.data_ptr(), matrix.data_ptr() + (last + 1) * matrix.element_size()


def _options(
    name: str,
    rows: Tensor,
    sizes: tuple[int | None, int, int],
    dtype: torch.dtype,
    epsilon: float | Tensor,
    prior: Tensor | None,
    row_marginal: Tensor | None,
    n_iters: int,
    tol: float | None,
    init: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Any, ...]:
    """Checks the arguments of a problem of `sizes` (batch or None, N, K); returns all of `_solve`'s but the scores."""
    batch, n, k = sizes
    if group is None and n == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {list(rows.shape)}")
    count = check_count("n_iters", n_iters)
    tolerance = None if tol is None else _tolerance(tol)
    scale = scalar_tensor("epsilon", _epsilon(epsilon), rows.device, dtype)
    lengths = {"prior": k, "row_marginal": n, "init": k}
    for what, value in {"prior": prior, "row_marginal": row_marginal, "init": init}.items():
        if value is not None:
            check_masses(what, value, lengths[what], batch, rows.device)
    problems = 1 if batch is None else batch
    log_rows = _log_masses("row_marginal", row_marginal, (problems, n), dtype, rows.device, alone=group is None)
    start = None if init is None else _start(init, dtype).expand(problems, k)
    if prior is None and not torch.compiler.is_compiling():  # the logarithm of a symbolic size would fix it
        log_prior = torch.full((problems, k), -math.log(k), dtype=dtype, device=rows.device)
    else:
        log_prior = _log_masses("prior", prior, (problems, k), dtype, rows.device, alone=True)
        log_prior = log_prior - log_prior.logsumexp(-1, keepdim=True)
    return scale, log_prior, log_rows, start, count, tolerance, _group_name(group)


def sinkhorn_potentials(
    features: Tensor,
    prototypes: Tensor,
    *,
    epsilon: float | Tensor = 0.05,
    prior: Tensor | None = None,
    row_marginal: Tensor | None = None,
    n_iters: int = 3,
    tol: float | None = None,
    init: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> SinkhornResult:
    """The potentials of `sinkhorn` for the scores ``features @ prototypes.T``, of which no N x K matrix exists.

    Scores are formed for a block of rows at a time, in every iteration: an iteration is a product of features and
    prototypes, 2 N K D operations. It takes the time of that product, and memory O((N + K) D).

    Args:
        features: ``[N, D]`` or ``[B, N, D]``; float64, float32, bfloat16 or float16. Products are float32, or float64.
        prototypes: ``[K, D]``.
        epsilon, prior, row_marginal, n_iters, tol, init, group: as for `sinkhorn`.

    Returns:
        :class:`SinkhornResult` whose ``assignments`` are None. No gradient flows to the potentials. The column
        potential is the ``potential`` of `prototype_cross_entropy` at ``teacher_temperature=epsilon``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("features", features, dims=(2,) if not isinstance(features, Tensor) or features.dim() != 3 else (3,))
    check_rows("prototypes", prototypes, like=features)
    if len(prototypes) == 0:
        raise ValueError(f"prototypes: expected at least one, got shape {list(prototypes.shape)}")
    batched = features.dim() == 3
    rows = features if batched else features[None]
    dtype = accumulation_dtype(features, prototypes)
    sizes = rows.shape[0] if batched else None, rows.shape[1], len(prototypes)
    options = _options("features", features, sizes, dtype, epsilon, prior, row_marginal, n_iters, tol, init, group)
    with torch.no_grad():
        outputs = potentials([rows], prototypes, *options)
    f, g, error = outputs[:3] if batched else (output[0] for output in outputs[:3])
    nothing: Any = None  # the type of `assignments` is that of `sinkhorn`'s result
    if tol is None:
        return SinkhornResult(nothing, f, g, None, options[4])
    return SinkhornResult(nothing, f, g, error, outputs[3])


def column_potential(
    parts: Sequence[Tensor],
    prototypes: Tensor | None = None,
    *,
    epsilon: float,
    prior: Tensor | None,
    n_iters: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The column potential of `sinkhorn`, [K] or [B, K], without the assignments and without a gradient.

    parts: scores of one problem, whose rows lie in several tensors [N_part, K] or [B, N_part, K]; or features
    [N_part, D] of prototypes [K, D].
    """
    if prototypes is None and prior is None and group is None:
        solved = small.col_potential(parts, epsilon, n_iters, LARGEST_EPSILON)
        if solved is not None:
            return solved
    if prototypes is None:
        for scores in parts:
            check_scores("scores", scores)
    batched = parts[0].dim() == 3
    rows = [part if batched else part[None] for part in parts]
    k = rows[0].shape[2] if prototypes is None else len(prototypes)
    n = sum(part.shape[1] for part in rows)
    dtypes = [accumulation_dtype(part) for part in (*parts, *([] if prototypes is None else [prototypes]))]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    sizes = rows[0].shape[0] if batched else None, n, k
    with torch.no_grad():
        options = _options("scores", parts[0], sizes, dtype, epsilon, prior, None, n_iters, None, None, group)
        found = potentials(rows, prototypes, *options, by_row=False)[1]
    return found if batched else found[0]


def uniform_prior(k: int) -> Tensor:
    """``[K]``: 1 / K each. float32.

    Raises TypeError or ValueError unless k is an integer from 1 to 2**31 - 1.
    """
    k = check_count("k", k)
    return torch.full((k,), 1 / k, dtype=torch.float32)


def power_law_prior(k: int, exponent: float = 0.25) -> Tensor:
    """``[K]``: masses proportional to rank ** -exponent, ranks 1 to K, the largest first. float32.

    An exponent of 0 is uniform. Assran et al., "The hidden uniform cluster prior in self-supervised learning" (2023),
    take 0.25.

    Raises TypeError or ValueError unless k is an integer from 1 to 2**31 - 1 and the exponent a number >= 0.
    """
    k, exponent = check_count("k", k), finite_number("exponent", exponent)
    if exponent < 0:
        raise ValueError(f"exponent: expected a number >= 0, got {exponent}")
    masses = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return (masses / masses.sum()).float()


def prior_from_counts(counts: Tensor) -> Tensor:
    """``[K]``: masses proportional to the counts ``[K]`` (integers or floating, non-negative). float32.

    float64 for float64 counts. A column with count 0 gets no mass.

    Raises TypeError or ValueError unless the counts are a vector of non-negative finite numbers with a positive sum.
    """
    check_tensor("counts", counts)
    if counts.dtype not in INTEGER_DTYPES and counts.dtype not in ROW_DTYPES:
        raise TypeError(f"counts: expected integers or a floating dtype, got {counts.dtype}")
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"counts: expected shape [K], K >= 1, got {list(counts.shape)}")
    masses = counts.double()
    check_mass_values("counts", masses, alone=True)
    return (masses / masses.sum()).to(torch.float64 if counts.dtype == torch.float64 else torch.float32)


def _tolerance(tol: Any) -> float:
    number = finite_number("tol", tol)
    if number <= 0:
        raise ValueError(f"tol: expected a positive number, got {number}")
    return number


def _epsilon(epsilon: Any) -> Any:
    value = positive_number("epsilon", epsilon)
    visible = values_visible(value) if isinstance(value, Tensor) else True
    number = float(value.detach() if isinstance(value, Tensor) else value) if visible else 0.0
    if number > LARGEST_EPSILON:
        raise ValueError(f"epsilon: expected at most {LARGEST_EPSILON:g}, got {number:g}")
    return value


def _check_finite(scores: Tensor, log_prior: Tensor, log_rows: Tensor, *potentials: Tensor) -> None:
    """Raises ValueError if the result is not finite because there is no solution; NaN in the scores is no error."""
    if not values_visible(scores):
        return
    if all(part.sum().item() < torch.inf or bool((part < torch.inf).all()) for part in potentials):
        return
    nothing = scores.detach() == -torch.inf
    without_mass = (log_rows == -torch.inf)[..., None]
    for kind, hopeless in (
        ("row", nothing.all(-1)),
        ("column", (nothing | without_mass).all(-2) & (log_prior > -torch.inf)),
    ):
        if bool(hopeless.any()):
            raise ValueError(
                "scores: expected one above -inf in every row, and for every column with mass in a row with mass; "
                f"{kind} {hopeless.nonzero()[0, -1].item()} has none"
            )


def _log_masses(
    name: str, value: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, alone: bool
) -> Tensor:
    """Logarithms [B, size] of masses; -inf without a gradient for mass 0. alone: no other process holds masses."""
    if value is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    check_mass_values(name, value, alone)
    if alone:  # only ratios matter; divided by the largest mass, masses of any dtype fit `dtype`
        value = value.to(torch.promote_types(value.dtype, dtype))
        value = value / value.detach().amax(-1, keepdim=True)
    masses = value.to(dtype)
    present = masses != 0  # also where it is NaN
    return torch.where(present, torch.where(present, masses, 1).log(), -torch.inf).expand(shape)


def _start(init: Tensor, dtype: torch.dtype) -> Tensor:
    if values_visible(init) and not bool((init < torch.inf).all()):
        raise ValueError(f"init: expected a column potential, finite or -inf, got {few(init)}")
    return init.detach().to(dtype)


def _group_name(group: dist.ProcessGroup | None) -> str:
    if group is None:
        return ""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: expected a torch.distributed process group, got {type(group).__name__}")
    return str(group.group_name)
