"""Sinkhorn's algorithm with any prior over the columns, in the log domain: the solver's front, and priors."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .kernels.checks import (
    ROW_DTYPES,
    check_device,
    check_tensor,
    finite_number,
    positive_number,
    scalar_tensor,
    values_visible,
)
from .kernels.problem import accumulation_dtype
from .kernels.sinkhorn_ops import sinkhorn as _solve

LARGEST_EPSILON = 1e36  # potentials are up to some hundred times as large, and have to fit float32


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """What `sinkhorn` returns. With a batch, every field but `n_iters` has a leading dimension B."""

    assignments: Tensor
    """``[N, K]``, rows sum to 1; dtype of the scores"""
    row_potential: Tensor
    """``[N]``, in the scores' units; -inf for a row without mass. float32, float64 for float64 scores"""
    col_potential: Tensor
    """``[K]``, in the scores' units; -inf for a column without mass. May be the next call's ``init``"""
    marginal_error: Tensor | None
    """L1 distance of the column sums from the prior, ``[]``; None unless ``tol`` is given"""
    n_iters: int | Tensor
    """iterations done: the argument, or with ``tol`` an int64 tensor ``[]`` on the scores' device"""


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
) -> SinkhornResult:
    r"""Entropy-regularised assignment of N rows to K columns of prescribed masses.

    The plan

    .. math:: P_{ij} = \exp\big((S_{ij} + f_i + g_j) / \varepsilon\big)

    maximises :math:`\langle P, S \rangle + \varepsilon H(P)` subject to row sums ``row_marginal`` and column sums
    ``prior``. From f = 0, one iteration makes the columns right, then the rows; the rows of the result are therefore
    exact, and the assignments are softmax_j((S + g) / epsilon). At a fixed number of iterations they are those of
    SwAV's loop. Everything happens in the log domain: any epsilon, scores of any size. The scores are read once an
    iteration, and no N x K matrix but the assignments is formed.

    Args:
        scores: ``[N, K]`` or ``[B, N, K]``; float64, float32, bfloat16 or float16, any strides. -inf: never assigned.
            A row of nothing else, or a column that has mass, makes the problem one without a solution: an error on the
            CPU, NaN elsewhere, under torch.compile and with ``group``.
        epsilon: regularisation > 0, at most 1e36, in the scores' units: a number or a tensor of one element.
        prior: ``[K]`` (or ``[B, K]``) non-negative masses of the columns; normalised. None: uniform. A column without
            mass is assigned nothing, exactly.
        row_marginal: ``[N]`` (or ``[B, N]``) non-negative masses of the rows; normalised. None: uniform. A row without
            mass (padding) has no influence on the others, as long as its scores are finite; its own assignments are
            still formed.
        n_iters: iterations; with ``tol`` at most so many.
        tol: iterate until the L1 distance of the column sums from the prior is below it.
        init: ``[K]`` (or ``[B, K]``): a column potential from an earlier call. One row update from it comes first,
            uncounted. No gradient flows to it.
        group: the rows are spread over the processes of this group, each of which holds its own (any number of them);
            assignments and row potentials are of the own rows. One all-reduce of K numbers an iteration, two in the
            first. A prior, epsilon and ``init`` must be alike on all.

    Returns:
        :class:`SinkhornResult`, whose assignments and potentials are differentiable once in scores, epsilon, prior and
        row_marginal. The gradient is that of the iterations that were done, exactly, in memory O(T (N + K)) for T
        iterations; where ``tol`` was met, that of the fixed point, by implicit differentiation in memory O(N + K).
        Entries without mass have gradient 0. With ``group``, gradients are of the sum of all processes' losses, each
        process's share with respect to its own tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.

    Source: Cuturi, "Sinkhorn distances" (2013); Caron et al., "Unsupervised learning of visual features by contrasting
    cluster assignments" (2020); Cuturi, Teboul, Niles-Weed and Vert, "Supervised quantile normalization for low rank
    matrix factorization" (2020) for the implicit gradient.
    """
    _check_scores(scores)
    batched = scores.dim() == 3
    s = scores if batched else scores[None]
    batch, n, k = s.shape
    dtype = accumulation_dtype(scores)
    if group is None and n == 0:
        raise ValueError(f"scores: expected at least one row, got shape {list(scores.shape)}")
    count = check_count("n_iters", n_iters)
    tolerance = None if tol is None else _tolerance(tol)
    scale = scalar_tensor("epsilon", _epsilon(epsilon), scores.device, dtype)
    sizes = {"prior": k, "row_marginal": n, "init": k}
    values = {"prior": prior, "row_marginal": row_marginal, "init": init}
    for name, value in values.items():
        if value is not None:
            _check_masses(name, value, sizes[name], batch if batched else None, scores.device)
    log_prior = _log_masses("prior", prior, (batch, k), dtype, scores.device, alone=True)
    log_rows = _log_masses("row_marginal", row_marginal, (batch, n), dtype, scores.device, alone=group is None)
    start = None if init is None else _start(init, dtype).expand(batch, k)
    log_prior = log_prior - log_prior.logsumexp(-1, keepdim=True)
    outputs = _solve(s, scale, log_prior, log_rows, start, count, tolerance, _group_name(group))
    if group is None:
        _check_finite(s, log_prior, log_rows, outputs[2])
    assignments, rows, columns, error = outputs[:4] if batched else (output[0] for output in outputs[:4])
    if tol is None:
        return SinkhornResult(assignments, rows, columns, None, count)
    return SinkhornResult(assignments, rows, columns, error, outputs[4])


def uniform_prior(k: int) -> Tensor:
    """``[K]``: 1 / K each. float32.

    Raises TypeError or ValueError unless k is an integer >= 1.
    """
    k = check_count("k", k)
    return torch.full((k,), 1 / k, dtype=torch.float32)


def power_law_prior(k: int, exponent: float = 0.25) -> Tensor:
    """``[K]``: masses proportional to rank ** -exponent, ranks 1 to K, the largest first. float32.

    An exponent of 0 is uniform. Assran et al., "The hidden uniform cluster prior in self-supervised learning" (2023),
    take 0.25.

    Raises TypeError or ValueError unless k is an integer >= 1 and the exponent a number >= 0.
    """
    k, exponent = check_count("k", k), finite_number("exponent", exponent)
    if exponent < 0:
        raise ValueError(f"exponent: expected a number >= 0, got {exponent}")
    masses = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return (masses / masses.sum()).float()


def prior_from_counts(counts: Tensor) -> Tensor:
    """``[K]``: masses proportional to the counts ``[K]`` (integers or floating, non-negative). float32.

    float64 for float64 counts. A column that was counted 0 times gets no mass.

    Raises TypeError or ValueError for anything else than a vector of non-negative finite numbers with a positive sum.
    """
    check_tensor("counts", counts)
    if counts.dtype == torch.bool or counts.dtype.is_complex:
        raise TypeError(f"counts: expected integers or a floating dtype, got {counts.dtype}")
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"counts: expected shape [K], K >= 1, got {list(counts.shape)}")
    masses = counts.double()
    check_mass_values("counts", masses, alone=True)
    return (masses / masses.sum()).to(torch.float64 if counts.dtype == torch.float64 else torch.float32)


def check_count(name: str, value: Any) -> int:
    """An integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    return int(value)


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


def _check_scores(scores: Any) -> None:
    check_tensor("scores", scores)
    if scores.dtype not in ROW_DTYPES:
        raise TypeError(f"scores: expected float64, float32, bfloat16 or float16, got {scores.dtype}")
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores: expected shape [N, K] or [B, N, K], got {list(scores.shape)}")
    if scores.shape[-1] == 0:
        raise ValueError(f"scores: expected at least one column, got shape {list(scores.shape)}")


def _check_finite(scores: Tensor, log_prior: Tensor, log_rows: Tensor, potential: Tensor) -> None:
    """Tells a problem without a solution from one with NaN in it, once its result has shown that it is either."""
    if not values_visible(scores) or not bool((potential.isnan() | (potential == torch.inf)).any()):
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


def _check_masses(name: str, value: Any, size: int, batch: int | None, device: torch.device) -> None:
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    shapes = [(size,)] + ([] if batch is None else [(batch, size)])
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    check_device(name, value, device)


def check_mass_values(name: str, value: Tensor, alone: bool) -> None:
    if not values_visible(value):
        return
    if not bool((value >= 0).all()) or not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected non-negative finite numbers, got {_few(value)}")
    if alone and not bool((value.sum(-1) > 0).all()):
        raise ValueError(f"{name}: expected a positive sum, got {_few(value)}")


def _few(value: Tensor) -> str:
    flat = value.detach().flatten()
    shown = ", ".join(f"{number:g}" for number in flat[:6].tolist())
    return f"[{shown}{', ...' if flat.numel() > 6 else ''}]"


def _log_masses(
    name: str, value: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, alone: bool
) -> Tensor:
    """Logarithms [B, size]; -inf, without a gradient, where there is no mass. alone: no other process has any."""
    if value is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    check_mass_values(name, value, alone)
    if alone:  # only ratios count, and those of any dtype's masses fit
        value = value.to(torch.promote_types(value.dtype, dtype))
        value = value / value.detach().amax(-1, keepdim=True)
    masses = value.to(dtype)
    present = masses > 0
    return torch.where(present, torch.where(present, masses, 1).log(), -torch.inf).expand(shape)


def _start(init: Tensor, dtype: torch.dtype) -> Tensor:
    if values_visible(init) and not bool((init < torch.inf).all()):
        raise ValueError(f"init: expected a column potential, finite or -inf, got {_few(init)}")
    return init.detach().to(dtype)


def _group_name(group: dist.ProcessGroup | None) -> str:
    if group is None:
        return ""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: expected a torch.distributed process group, got {type(group).__name__}")
    return str(group.group_name)
