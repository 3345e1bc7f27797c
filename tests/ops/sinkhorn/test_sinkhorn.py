"""`sinkhorn` against its definition in float64, and the properties of a transport plan."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from tests.support.backends import QUICK, VARIANTS, needs_interpreter, running
from tests.support.pairs import pairs
from tests.support.sinkhorn_oracle import differentiated, log_domain, swav_loop
from tests.support.strategies import generator
from tests.support.tolerances import accumulation_dtype, check

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("assignments", "row_potential", "col_potential")
EXACT = pytest.mark.parametrize("backend", QUICK, indirect=True)  # with float64, which Triton leaves to `chunked`


@dataclass(frozen=True)
class Case:
    scores: Tensor  # [N, K]
    epsilon: float
    prior: Tensor  # [K]
    row_marginal: Tensor  # [N]
    n_iters: int
    init: Tensor | None
    cotangents: tuple[Tensor, Tensor, Tensor]

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.scores.dtype)

    def permuted(self, rows: Tensor, columns: Tensor) -> "Case":
        weight, row_weight, column_weight = self.cotangents
        return Case(
            self.scores[rows][:, columns],
            self.epsilon,
            self.prior[columns],
            self.row_marginal[rows],
            self.n_iters,
            None if self.init is None else self.init[columns],
            (weight[rows][:, columns], row_weight[rows], column_weight[columns]),
        )


def masses(kind: str, size: int, seed: int) -> Tensor:
    """Unnormalised masses, float64; at least one is positive."""
    g = generator(seed)
    if kind == "uniform":
        return torch.full((size,), 3.0, dtype=torch.float64)
    if kind == "random":
        return torch.rand(size, dtype=torch.float64, generator=g) + 0.1
    if kind == "wide":  # 12 orders of magnitude
        return 10 ** (-12 * torch.rand(size, dtype=torch.float64, generator=g))
    values = torch.rand(size, dtype=torch.float64, generator=g) + 0.1
    zero = torch.rand(size, generator=g) < 0.5
    zero[int(torch.randint(size, (1,), generator=g))] = False
    return values.masked_fill(zero, 0)


KINDS = ("uniform", "random", "wide", "zeros")


@st.composite
def problems(draw, dtypes=DTYPES, large=(31, 64, 131, 257)) -> Case:
    n = draw(st.one_of(st.integers(1, 24), st.sampled_from(large)))
    k = draw(st.one_of(st.integers(1, 24), st.sampled_from(large)))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**20))
    g = generator(seed)
    spread = draw(st.sampled_from([0.3, 1.0, 10.0]))
    epsilon = float(torch.tensor(draw(st.sampled_from([0.001, 0.003, 0.02, 0.05, 0.3, 1.0, 10.0]))))
    wide = accumulation_dtype(dtype)
    return Case(
        (spread * torch.randn(n, k, dtype=torch.float64, generator=g)).to(dtype),
        epsilon,
        masses(draw(st.sampled_from(KINDS)), k, seed + 1).to(wide),
        masses(draw(st.sampled_from(KINDS)), n, seed + 2).to(wide),
        draw(st.sampled_from([1, 2, 3, 7])),
        torch.randn(k, generator=g).to(wide) * spread if draw(st.booleans()) else None,
        tuple(torch.randn(shape, generator=g).to(wide) for shape in ((n, k), (n,), (k,))),  # type: ignore[arg-type]
    )


def run(case: Case) -> tuple[fastcl.SinkhornResult, tuple[Tensor, ...]]:
    """The result, and the gradients of <cotangents, result> in scores, epsilon, prior and row marginal."""
    scores, prior, rows = (t.clone().requires_grad_() for t in (case.scores, case.prior, case.row_marginal))
    epsilon = torch.tensor(case.epsilon, dtype=case.accumulation, requires_grad=True)
    result = fastcl.sinkhorn(
        scores, epsilon=epsilon, prior=prior, row_marginal=rows, n_iters=case.n_iters, init=case.init
    )
    outputs = [result.assignments, result.row_potential, result.col_potential]
    weights = [
        torch.where(output.isinf(), 0, weight).to(output.dtype)
        for output, weight in zip(outputs, case.cotangents, strict=True)
    ]
    return result, torch.autograd.grad(outputs, (scores, epsilon, prior, rows), weights)


def eager_forms(case: Case) -> list[tuple[Tensor, ...]]:
    """Values and gradients in eager PyTorch in the accumulation dtype, with several orders and divisions by epsilon."""
    n, k = case.scores.shape
    forms = []
    size = case.scores.double().abs().mean().item()
    for seed in range(6):
        rows = torch.randperm(n, generator=generator(seed)) if seed else torch.arange(n)
        columns = torch.randperm(k, generator=generator(seed + 9)) if seed else torch.arange(k)
        p = case.permuted(rows, columns)
        got = differentiated(
            p.scores,
            p.epsilon,
            p.prior,
            p.row_marginal,
            p.n_iters,
            p.init,
            p.cotangents,
            case.accumulation,
            seed % 2 == 1,
            size * (seed // 2),
        )
        back, across = rows.argsort(), columns.argsort()
        forms.append(
            (
                got.plan.assignments[back][:, across],
                got.plan.row_potential[back],
                got.plan.col_potential[across],
                got.scores[back][:, across],
                got.epsilon,
                got.prior[across],
                got.row_marginal[back],
            )
        )
    return forms


def compare(case: Case) -> None:
    result, gradients = run(case)
    assert result.assignments.dtype == case.scores.dtype
    assert result.row_potential.dtype == result.col_potential.dtype == case.accumulation
    cotangents = tuple(
        torch.where(getattr(result, name).isinf(), 0, w).to(getattr(result, name).dtype).double()
        for name, w in zip(NAMES, case.cotangents, strict=True)
    )
    init = None if case.init is None else case.init.double()
    truth = differentiated(
        case.scores, case.epsilon, case.prior, case.row_marginal, case.n_iters, init, cotangents, torch.float64
    )
    eager = eager_forms(case)
    if not all(bool(part.isfinite().all()) for form in eager for part in form[3:]):
        pytest.fail("eager PyTorch itself is not finite")
    plan = truth.plan.assignments
    terms = plan * cotangents[0].abs()
    largest = terms.sum(1) + cotangents[1].abs() * case.epsilon
    by_column = terms.sum(0) + cotangents[2].abs() * case.epsilon
    potentials = 1 + case.scores.double().abs().max() / case.epsilon + math.log(max(case.scores.shape))
    # Terms that cancel: potentials come from log-sums as large as the scores and the log of their number. The gradient
    # of a softmax is a difference of weighted terms, that in epsilon a sum of such terms times scores / epsilon^2, and
    # that in the masses a sum of them over a row or column and over the iterations. In float64 the truth rounds like
    # eager PyTorch, so exponents as large as the potentials are rounded in all of them.
    exponents = potentials if case.accumulation == torch.float64 else 1.0
    magnitudes = (
        plan * exponents if case.accumulation == torch.float64 else None,
        potentials * case.epsilon * torch.ones_like(largest),
        potentials * case.epsilon * torch.ones_like(cotangents[2]),
        largest / case.epsilon * exponents,
        largest * potentials / case.epsilon * exponents,
        torch.where(case.prior > 0, by_column / case.prior, 0) * exponents * case.n_iters,
        torch.where(case.row_marginal > 0, largest / case.row_marginal, 0) * exponents * case.n_iters,
    )
    results = (result.assignments, result.row_potential, result.col_potential, *gradients)
    truths = (*truth.plan, *truth[1:])
    names = (*NAMES, "d scores", "d epsilon", "d prior", "d row_marginal")
    for name, got, exact, magnitude, *draws in zip(names, results, truths, magnitudes, *eager, strict=True):
        half = case.scores.dtype if name == "d scores" and case.scores.dtype in DTYPES[2:] else None
        check(name, got, exact, draws, accumulation=case.accumulation, half_rows=half, magnitude=magnitude)


@pytest.mark.parametrize("variant", QUICK)
@settings(max_examples=60)
@given(case=problems())
def test_values_and_gradients_follow_the_formula(variant: str, case: Case) -> None:
    with running(variant):
        compare(case)


@needs_interpreter
@settings(max_examples=15)
@given(case=problems(dtypes=DTYPES[1:], large=(31, 64, 65, 131)))
def test_triton_follows_the_formula(case: Case) -> None:
    with fastcl.use_backend("triton"):
        compare(case)


@pairs(variant=VARIANTS, kind=["uniform", "zeros"], dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_small_epsilon_and_large_scores(variant: str, kind: str, dtype: torch.dtype) -> None:
    """Epsilon 0.001 and scores of 1e4: entries of a row are ten million nats apart."""
    g = generator(3)
    scores = (1e4 * torch.randn(65, 33, generator=g)).to(dtype)
    wide = accumulation_dtype(dtype)
    cotangents = tuple(torch.randn(shape, generator=g).to(wide) for shape in ((65, 33), (65,), (33,)))
    prior, rows = masses(kind, 33, 1).to(wide), masses("random", 65, 2).to(wide)
    case = Case(scores, float(torch.tensor(0.001)), prior, rows, 3, None, cotangents)  # type: ignore[arg-type]
    with running(variant):
        compare(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swav_at_the_same_number_of_iterations(backend: str, dtype: torch.dtype) -> None:
    cosines = torch.nn.functional.normalize(torch.randn(70, 16, generator=generator(0)), dim=1) @ (
        torch.nn.functional.normalize(torch.randn(30, 16, generator=generator(1)), dim=1).T
    )
    for n_iters in (1, 2, 3, 10):
        got = fastcl.sinkhorn(cosines.to(dtype), epsilon=0.05, n_iters=n_iters).assignments
        expected = swav_loop(cosines.double(), 0.05, n_iters)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-6, atol=1e-9)


def test_a_batch_is_its_problems_one_by_one(backend: str) -> None:
    scores = torch.randn(3, 20, 9, generator=generator(0)).requires_grad_()
    prior = torch.stack([masses("random", 9, seed) for seed in range(3)]).float().requires_grad_()
    rows = masses("zeros", 20, 5).float()
    init = torch.randn(9, generator=generator(1))
    weight = torch.randn(3, 20, 9, generator=generator(2))
    for tol in (None, 1e-4):
        whole = fastcl.sinkhorn(scores, prior=prior, row_marginal=rows, init=init, n_iters=9, tol=tol)
        parts = [
            fastcl.sinkhorn(scores[b], prior=prior[b], row_marginal=rows, init=init, n_iters=9, tol=tol)
            for b in range(3)
        ]
        one = torch.autograd.grad(whole.assignments, (scores, prior), weight)
        other = torch.autograd.grad([p.assignments for p in parts], (scores, prior), list(weight))
        if tol is None:  # with a tolerance the batch runs until its last problem has converged
            for name in NAMES:
                torch.testing.assert_close(getattr(whole, name), torch.stack([getattr(p, name) for p in parts]))
            for left, right in zip(one, other, strict=True):
                torch.testing.assert_close(left, right)
        else:
            assert whole.marginal_error is not None
            assert whole.marginal_error.shape == (3,)
    shared = fastcl.sinkhorn(scores, prior=prior[0])
    torch.testing.assert_close(shared.assignments[1], fastcl.sinkhorn(scores[1], prior=prior[0]).assignments)


# Properties


def plan_error(result: fastcl.SinkhornResult, prior: Tensor, rows: Tensor) -> float:
    mass = (rows / rows.sum()) @ result.assignments
    return (mass - prior / prior.sum()).abs().sum().item()


def check_assignments(case: Case) -> None:
    """Rows sum to one, and nothing is NaN."""
    result = fastcl.sinkhorn(
        case.scores,
        epsilon=case.epsilon,
        prior=case.prior,
        row_marginal=case.row_marginal,
        n_iters=case.n_iters,
        init=case.init,
    )
    k = case.scores.shape[1]
    eps = torch.finfo(case.scores.dtype).eps
    rounding = 8 * torch.finfo(case.accumulation).eps
    sums = result.assignments.double().sum(1)
    # each entry is rounded once: by half a unit of its size, or of the smallest subnormal number
    tiny = torch.finfo(case.scores.dtype).tiny * eps if case.scores.dtype in DTYPES[2:] else 0.0
    assert ((sums - 1).abs() <= rounding * math.sqrt(k) + (eps / 2 if eps > 1e-6 else 0) + k * tiny).all()
    assert (result.assignments >= 0).all()
    assert (result.assignments[:, case.prior == 0] == 0).all()
    assert (result.col_potential.isinf() == (case.prior == 0)).all()
    assert (result.row_potential.isinf() == (case.row_marginal == 0)).all()
    assert not result.row_potential.isnan().any()
    assert not result.col_potential.isnan().any()


@pytest.mark.parametrize("variant", QUICK)
@settings(max_examples=40)
@given(case=problems())
def test_rows_sum_to_one_and_nothing_is_nan(variant: str, case: Case) -> None:
    with running(variant):
        check_assignments(case)


@needs_interpreter
@settings(max_examples=15)
@given(case=problems(dtypes=DTYPES[1:], large=(31, 64, 65)))
def test_rows_sum_to_one_in_triton_too(case: Case) -> None:
    with fastcl.use_backend("triton"):
        check_assignments(case)


@pytest.mark.parametrize("variant", QUICK)
@settings(max_examples=25)
@given(case=problems(dtypes=(torch.float64,)))
def test_column_error_never_grows(variant: str, case: Case) -> None:
    errors = []
    with running(variant):
        for n_iters in range(1, 8):
            result = fastcl.sinkhorn(
                case.scores, epsilon=case.epsilon, prior=case.prior, row_marginal=case.row_marginal, n_iters=n_iters
            )
            errors.append(plan_error(result, case.prior, case.row_marginal))
    assert all(later <= earlier + 1e-11 for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("variant", QUICK)
@settings(max_examples=25)
@given(case=problems(dtypes=(torch.float64,)), seed=st.integers(0, 99))
def test_shifts_and_permutations_change_nothing_else(variant: str, case: Case, seed: int) -> None:
    n, k = case.scores.shape
    g = generator(seed)
    options = {"epsilon": case.epsilon, "n_iters": case.n_iters}
    with running(variant):
        plain = fastcl.sinkhorn(case.scores, prior=case.prior, row_marginal=case.row_marginal, **options)
        # g absorbs a shift of columns. f would absorb a shift of rows, except that the first column update uses f = 0.
        # A shift of everything is also a shift of columns.
        shift = torch.randn(k, dtype=torch.float64, generator=g)
        moved = fastcl.sinkhorn(case.scores + shift + 5, prior=case.prior, row_marginal=case.row_marginal, **options)
        rows, columns = torch.randperm(n, generator=g), torch.randperm(k, generator=g)
        mixed = fastcl.sinkhorn(
            case.scores[rows][:, columns], prior=case.prior[columns], row_marginal=case.row_marginal[rows], **options
        )
    size = 1e-13 * (1 + case.scores.abs().max().item() / case.epsilon) * case.n_iters
    torch.testing.assert_close(moved.assignments, plain.assignments, rtol=0, atol=size)
    torch.testing.assert_close(moved.col_potential, plain.col_potential - shift - 5, rtol=0, atol=size)
    torch.testing.assert_close(mixed.assignments, plain.assignments[rows][:, columns], rtol=0, atol=size)


def test_rows_without_mass_have_no_influence(backend: str) -> None:
    scores = torch.randn(12, 7, generator=generator(0))
    padding = 1e4 * torch.randn(5, 7, generator=generator(1))
    mass = torch.cat([torch.ones(12), torch.zeros(5)])
    alone = fastcl.sinkhorn(scores, n_iters=4)
    padded = fastcl.sinkhorn(torch.cat([scores, padding]), row_marginal=mass, n_iters=4)
    torch.testing.assert_close(padded.assignments[:12], alone.assignments)
    torch.testing.assert_close(padded.col_potential, alone.col_potential)
    torch.testing.assert_close(padded.assignments[12:].sum(1), torch.ones(5))


def test_a_tolerance_is_met_and_reported(backend: str) -> None:
    scores = torch.randn(50, 20, generator=generator(0))
    prior = fastcl.power_law_prior(20, 1.0)
    result = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=500, tol=1e-5)
    assert result.marginal_error is not None
    assert result.marginal_error < 1e-5
    assert 3 < int(result.n_iters) < 500
    mass = result.assignments.double().mean(0)
    assert (mass - prior).abs().sum() < 2e-5
    fixed = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=int(result.n_iters))
    torch.testing.assert_close(fixed.assignments, result.assignments)
    assert fixed.marginal_error is None
    assert fixed.n_iters == int(result.n_iters)
    few = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=2, tol=1e-5)
    assert few.marginal_error is not None
    assert few.marginal_error > 1e-5
    assert int(few.n_iters) == 2
    torch.testing.assert_close(
        few.assignments, fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=2).assignments
    )


@EXACT
def test_a_solution_is_where_a_warm_start_stays(backend: str) -> None:
    scores = torch.randn(40, 15, dtype=torch.float64, generator=generator(0))
    prior = masses("wide", 15, 1)
    solved = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=3000, tol=1e-13)
    again = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=1, init=solved.col_potential)
    torch.testing.assert_close(again.assignments, solved.assignments, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.col_potential, solved.col_potential, rtol=0, atol=1e-9)
    nearby = scores + 1e-3 * torch.randn(40, 15, dtype=torch.float64, generator=generator(1))
    options = {"epsilon": 0.5, "prior": prior, "n_iters": 3000, "tol": 1e-8}
    warm = fastcl.sinkhorn(nearby, init=solved.col_potential, **options)
    assert int(warm.n_iters) < int(fastcl.sinkhorn(nearby, **options).n_iters)


# Gradients


@EXACT
@pytest.mark.parametrize("n_iters", [1, 2, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_gradcheck_of_the_iteration(backend: str, n_iters: int, warm: bool) -> None:
    leaves = leaf_problem()
    init = torch.randn(4, dtype=torch.float64, generator=generator(8)) if warm else None

    def outputs(scores: Tensor, epsilon: Tensor, prior: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        result = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior, row_marginal=rows, n_iters=n_iters, init=init)
        return result.assignments, result.row_potential, result.col_potential

    assert torch.autograd.gradcheck(outputs, leaves)


@EXACT
def test_gradcheck_of_the_fixed_point(backend: str) -> None:
    """Of the assignments, and of potentials up to the constant that can move from one to the other."""

    def outputs(scores: Tensor, epsilon: Tensor, prior: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        result = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior, row_marginal=rows, n_iters=2000, tol=1e-14)
        assert int(result.n_iters) < 2000
        f, g = result.row_potential, result.col_potential
        return result.assignments, f - f.mean(), g - g.mean(), f.mean() + g.mean()

    assert torch.autograd.gradcheck(outputs, leaf_problem(), rtol=1e-4, atol=1e-6)


def leaf_problem() -> tuple[Tensor, ...]:
    scores = torch.randn(6, 4, dtype=torch.float64, generator=generator(0))
    epsilon = torch.tensor(0.7, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (scores, epsilon, masses("random", 4, 1), masses("random", 6, 2)))


@EXACT
@pytest.mark.parametrize("zeros", [False, True])
def test_the_implicit_gradient_is_the_limit_of_the_unrolled_one(backend: str, zeros: bool) -> None:
    scores = torch.randn(30, 12, dtype=torch.float64, generator=generator(0)).requires_grad_()
    epsilon = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    kind = "zeros" if zeros else "random"
    prior, rows = masses(kind, 12, 3).requires_grad_(), masses(kind, 30, 4).requires_grad_()
    weight = torch.randn(30, 12, dtype=torch.float64, generator=generator(5))
    leaves, gradients = (scores, epsilon, prior, rows), []
    for tol in (None, 1e-12):
        result = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior, row_marginal=rows, n_iters=800, tol=tol)
        gradients.append(torch.autograd.grad(result.assignments, leaves, weight))
    for unrolled, implicit in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-7, atol=1e-9)
        assert implicit.isfinite().all()
    assert (gradients[1][2][prior == 0] == 0).all()


def test_a_tolerance_that_was_missed_differentiates_the_iterations(backend: str) -> None:
    scores = torch.randn(30, 12, generator=generator(0)).requires_grad_()
    weight = torch.randn(30, 12, generator=generator(5))
    missed = fastcl.sinkhorn(scores, n_iters=3, tol=1e-7)
    fixed = fastcl.sinkhorn(scores, n_iters=3)
    one, other = (torch.autograd.grad(r.assignments, scores, weight)[0] for r in (missed, fixed))
    torch.testing.assert_close(one, other)


@EXACT
def test_the_implicit_gradient_is_that_of_ott(backend: str) -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("ott")
    jax.config.update("jax_enable_x64", True)
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    g = generator(0)
    scores = torch.randn(10, 6, dtype=torch.float64, generator=g)
    weight = torch.randn(10, 6, dtype=torch.float64, generator=g)
    prior = masses("random", 6, 1)
    prior, rows = prior / prior.sum(), torch.full((10,), 0.1, dtype=torch.float64)

    def total(cost):  # a function of assignments, which are 10 times the plan
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=-cost, epsilon=0.5), a=rows.numpy(), b=prior.numpy()
        )
        solved = ott_sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=5000)(problem)
        return (10 * solved.matrix * weight.numpy()).sum()

    expected = torch.from_numpy(jax.device_get(jax.grad(total)(scores.numpy())).copy())
    scores.requires_grad_()
    result = fastcl.sinkhorn(scores, epsilon=0.5, prior=prior, n_iters=5000, tol=1e-12)
    (gradient,) = torch.autograd.grad(result.assignments, scores, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_the_oracle_agrees_with_swav() -> None:
    scores = torch.randn(9, 5, dtype=torch.float64, generator=generator(0))
    one = torch.ones(9, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(log_domain(scores, 0.3, one[1], one[0], 4).assignments, swav_loop(scores, 0.3, 4))


# Priors


def test_priors() -> None:
    torch.testing.assert_close(fastcl.uniform_prior(4), torch.full((4,), 0.25))
    ranks = torch.arange(1, 6) ** -0.25
    torch.testing.assert_close(fastcl.power_law_prior(5), ranks / ranks.sum())
    torch.testing.assert_close(fastcl.power_law_prior(5, exponent=0), fastcl.uniform_prior(5))
    torch.testing.assert_close(fastcl.prior_from_counts(torch.tensor([3, 0, 1])), torch.tensor([0.75, 0, 0.25]))
    assert fastcl.prior_from_counts(torch.ones(3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_masses_of_any_size(size: float, backend: str) -> None:
    scores = torch.randn(9, 5)
    expected = fastcl.sinkhorn(scores).assignments
    prior = torch.full((5,), size, dtype=torch.float64)
    torch.testing.assert_close(fastcl.sinkhorn(scores, prior=prior).assignments, expected)
    rows = torch.full((9,), 3e38)
    torch.testing.assert_close(fastcl.sinkhorn(scores, row_marginal=rows).assignments, expected)


def test_a_problem_of_nan_leaves_the_gradient_of_its_batch_alone(backend: str) -> None:
    scores = torch.rand(2, 6, 4) * 3
    scores[0] = torch.nan
    weights = torch.randn(6, 4)

    def gradient(s: torch.Tensor) -> torch.Tensor:
        s = s.clone().requires_grad_()
        result = fastcl.sinkhorn(s, tol=1e-2, n_iters=200, epsilon=0.05).assignments
        (found,) = torch.autograd.grad((result[-1] * weights).sum(), s)
        return found[-1]

    torch.testing.assert_close(gradient(scores), gradient(scores[1:]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # functorch triggers it on first use
def test_forward_mode_raises() -> None:
    s = torch.randn(4, 3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda s: fastcl.sinkhorn(s).assignments, (s,), (s,))
