"""Fixed iterations of Sinkhorn in one native call equal those pass by pass."""

from dataclasses import replace

import pytest
import torch

from fastcl.ops.backends.native import native_module
from fastcl.ops.sinkhorn import solver as sinkhorn_solver
from fastcl.ops.sinkhorn.op import PASSES
from fastcl.ops.sinkhorn.solver import Problem
from tests.support.backends import VARIANTS, running
from tests.support.strategies import DTYPES, generator

pytestmark = pytest.mark.skipif("cpu" not in PASSES, reason="no native module")
ENGINES = [variant for variant in VARIANTS if variant.startswith("cpu")]


def problem(n: int, k: int, seed: int, dtype: torch.dtype, n_iters: int, init: bool, epsilon: float) -> Problem:
    """Two problems; some rows and columns have no mass, and the scores are a strided view."""
    g = generator(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    scores = torch.randn(2, k, n + 1, generator=g).to(dtype).transpose(1, 2)[:, :n]
    masses = [torch.rand(2, size, generator=g, dtype=real) + 0.1 for size in (k, n)]
    for part in masses:
        part[0, 1::5] = 0
    log_prior, log_rows = ((part / part.sum(-1, keepdim=True)).log() for part in masses)
    start = torch.randn(2, k, generator=g, dtype=real) if init else None
    return Problem(scores, torch.tensor(epsilon, dtype=real), log_prior, log_rows, start, n_iters, None, "")


@pytest.mark.parametrize("variant", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "n_iters", "init", "epsilon"),
    [
        (1, 1, 1, False, 0.05),
        (37, 19, 3, False, 0.05),
        (37, 19, 4, True, 1.0),
        (64, 131, 1, True, 0.3),
        (300, 512, 3, False, 0.003),
    ],
)
def test_the_same_as_pass_by_pass(variant, dtype, n, k, n_iters, init, epsilon) -> None:
    """The same but for roundings: float32 and float64 scores keep exponentials from one pass to the next."""
    p = problem(n, k, n + k, dtype, n_iters, init, epsilon)
    with running(variant):
        once = PASSES["cpu"].solve(p)
        parts = sinkhorn_solver.pass_by_pass(PASSES["cpu"], p)
    assert once.n_iters == parts.n_iters
    assert once.assignments.dtype == p.scores.dtype
    assert not once.error.any()
    # In float64 the potentials' roundings are divided by epsilon.
    tolerance = 1e-6 if p.epsilon.dtype == torch.float32 else 1e-14 / epsilon
    for name in ("assignments", "row_potential", "col_potential"):
        one, other = (getattr(s, name) for s in (once, parts))
        assert one.dtype == other.dtype
        assert near(one, other, tolerance), name
    assert near(once.kept.columns, parts.kept.columns, tolerance)
    # Shift and sum of a row update may differ, if the log-sum-exp that they stand for is the same.
    first = 0 if init else 1  # without `init`, the first row update does not take place
    one, other = (
        s.kept.rows[first:, 0].double() + p.exact * s.kept.rows[first:, 1].double().log() for s in (once, parts)
    )
    assert near(one, other, tolerance)


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is small relative to that of `other`. Infinities must be the same."""
    one, other = one.double(), other.double()
    same = (one == other) & other.isinf()
    one, other = one.masked_fill(same, 0), other.masked_fill(same, 0)
    return bool((one - other).norm() <= tolerance * other.norm())


def test_what_is_not_for_it() -> None:
    p = problem(5, 4, 0, torch.float32, 3, False, 0.1)
    assert PASSES["cpu"].solve(replace(p, tol=1e-3)) is None
    empty = replace(p, scores=p.scores[:, :0], log_row_marginal=p.log_row_marginal[:, :0])
    assert PASSES["cpu"].solve(empty) is None


def test_null_pointers_are_refused() -> None:
    native = native_module()
    engine = native.supported_engines()[0]
    with pytest.raises(ValueError, match="null pointer"):
        native.sinkhorn_solve(engine, 0.1, (1, 8, 2, 3, 1, 3, False, 1, 0, 8, 8, 0, 1, 8, 2, 8, 3, 8, 8))
    with pytest.raises(ValueError, match="must be positive"):
        native.sinkhorn_solve(engine, 0.1, (1, 8, 2, 3, 1, 3, False, 1, 8, 8, 8, 0, 0, 8, 2, 8, 3, 8, 8))
