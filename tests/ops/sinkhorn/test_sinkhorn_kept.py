"""Backend `cpu` keeps exponentials from one pass of a backward to the next; where it cannot, passes read the scores."""

import math

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.sinkhorn import cpu
from fastcl.ops.sinkhorn.cpu import Pass
from fastcl.ops.sinkhorn.op import PASSES
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif("cpu" not in PASSES, reason="no native module")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes that ran, besides `solve`."""
    passes: list[Pass] = []
    call = cpu._call

    def recorded(which: Pass, *args, **options) -> None:
        passes.append(which)
        call(which, *args, **options)

    monkeypatch.setattr(cpu, "_call", recorded)
    return passes


def scores_of(spread: float, dtype: torch.dtype, batch: int = 1) -> Tensor:
    """Some rows and columns are far above the others, and one entry is -inf."""
    g = generator(3)
    scores = torch.randn(batch, 45, 21, dtype=torch.float64, generator=g)
    scores += spread * (torch.randn(45, 1, generator=g) + torch.randn(21, generator=g))
    scores[0, 7, 2] = -torch.inf
    return scores.to(dtype)


def gradients(scores: Tensor, masses: tuple[Tensor, Tensor], epsilon: float, **options) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (scores, *masses, torch.tensor(epsilon, dtype=masses[0].dtype))]
    s, prior, rows, e = leaves
    with fastcl.use_backend("cpu"):
        result = fastcl.sinkhorn(s, epsilon=e, prior=prior, row_marginal=rows, **options)
    outputs = [result.assignments, result.col_potential]
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=generator(5)) for o in outputs]
    weights[1].masked_fill_(outputs[1].isinf(), 0)
    return torch.autograd.grad(outputs, leaves, weights)


def masses_of(dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor]:
    """The larger the spread, the more orders of magnitude are between the rows."""
    g = generator(4)
    prior, rows = (torch.rand(size, dtype=dtype, generator=g) + 0.1 for size in (21, 45))
    rows = rows * 10 ** (-3 * spread * torch.rand(45, dtype=dtype, generator=g))
    prior[4], rows[9] = 0, 0
    return prior, rows


NEAR, FAR = (0.0, 0.5), (4.0, 0.02)  # spread and epsilon; FAR: potentials move by more than 2^24 between iterations
CASES = {
    "near": (NEAR, {}, {Pass.PLAN_PRODUCTS, Pass.PLAN_GRADIENT}),
    "batch": (NEAR, {"batch": 3}, {Pass.PLAN_PRODUCTS, Pass.PLAN_GRADIENT}),
    "one": (NEAR, {"n_iters": 1}, {Pass.PLAN_GRADIENT}),
    "warm": (NEAR, {"init": True}, {Pass.PRODUCTS, Pass.SCORE_GRADIENT}),
    "implicit": (NEAR, {"n_iters": 500, "tol": 1e-6}, {Pass.PLAN_PRODUCTS, Pass.PLAN_GRADIENT}),
    "far": (FAR, {}, {Pass.PRODUCTS, Pass.SCORE_GRADIENT}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_passes_over_the_scores(
    name: str, dtype: torch.dtype, ran: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    (spread, epsilon), options, expected = CASES[name]
    scores = scores_of(spread, dtype, options.get("batch", 1))
    call = {"n_iters": 3} | {key: value for key, value in options.items() if key != "batch"}
    if options.get("init"):
        call["init"] = torch.randn(21, generator=generator(6)).to(dtype)
    kept = gradients(scores, masses_of(dtype, spread), epsilon, **call)
    assert expected <= set(ran)
    ran.clear()
    monkeypatch.delattr(cpu, "backward")
    plain = gradients(scores, masses_of(dtype, spread), epsilon, **call)
    assert not {Pass.PLAN_PRODUCTS, Pass.PLAN_GRADIENT} & set(ran)
    tolerance = (1e-5 if dtype == torch.float32 else 1e-12) / epsilon * (100 if "tol" in call else 1)
    for one, other in zip(kept, plain, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_rows_far_from_zero_read_the_scores(offset: float, ran: list[Pass]) -> None:
    """S + g is rounded at the size of a row's offset, anew in each iteration."""
    scores = scores_of(0, torch.float32)
    scores[:, 3] += offset
    gradients(scores, masses_of(torch.float32, 0), 0.5, n_iters=3)
    assert (Pass.PLAN_GRADIENT in ran) == (offset == 0)
    assert (Pass.SCORE_GRADIENT in ran) == (offset != 0)


def test_without_a_gradient_of_the_scores_there_is_no_matrix(ran: list[Pass]) -> None:
    prior = torch.rand(21, generator=generator(1)).requires_grad_()
    with fastcl.use_backend("cpu"):
        result = fastcl.sinkhorn(scores_of(0, torch.float32), prior=prior[None])
    torch.autograd.grad(result.assignments.square().sum(), prior)
    assert set(ran) == {Pass.ASSIGNMENT_GRADIENT, Pass.PRODUCTS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("spread", "epsilon"), [NEAR, FAR])
def test_assignments_after_many_iterations(dtype: torch.dtype, spread: float, epsilon: float) -> None:
    """Each iteration multiplies the exponentials of an earlier one."""
    scores = scores_of(spread, dtype)[0]
    prior, rows = masses_of(dtype, spread)
    with fastcl.use_backend("cpu"):
        got = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior, row_marginal=rows, n_iters=40)
    with fastcl.use_backend("reference"):
        true = fastcl.sinkhorn(
            scores.double(), epsilon=epsilon, prior=prior.double(), row_marginal=rows.double(), n_iters=40
        )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert (got.assignments - true.assignments).norm() <= tolerance * true.assignments.norm()
    assert not got.assignments[:, 4].any()
    assert math.isinf(got.col_potential[4])
