"""The cost of Sinkhorn's plan against the formula in float64, with its gradients."""

import sys

import pytest
import torch
from torch import Tensor

import fastcl
from tests.support.backends import BACKENDS
from tests.support.sinkhorn_oracle import log_domain
from tests.support.strategies import generator

N, K = 13, 7


def inputs(dtype: torch.dtype, shift: float = 0.0) -> dict[str, Tensor]:
    g = generator(0)
    return {
        "scores": (torch.randn(N, K, generator=g) + shift).to(dtype),
        "epsilon": torch.tensor(0.3),
        "prior": torch.rand(K, generator=g) + 0.1,
        "row_marginal": torch.rand(N, generator=g) + 0.1,
    }


def formula(scores: Tensor, epsilon: Tensor, prior: Tensor, row_marginal: Tensor, n_iters: int) -> Tensor:
    r = log_domain(scores, epsilon, prior, row_marginal, n_iters).assignments
    plan = row_marginal[:, None] / row_marginal.sum() * r
    return -torch.where(scores == -torch.inf, 0, plan * scores).sum()


def learned(values: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: value.to(dtype or value.dtype).clone().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_formula(dtype: torch.dtype, shift: float, backend: str) -> None:
    values = inputs(dtype, shift)
    got, truth = learned(values), learned(values, torch.float64)
    with fastcl.use_backend(backend):
        cost = fastcl.sinkhorn(**got).transport_cost
        gradients = torch.autograd.grad(cost, list(got.values()))
    expected = formula(**truth, n_iters=3)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cost.shape == ()
    tight = 1e-6 if dtype == torch.float64 else 1e-5  # marginals and epsilon are float32
    torch.testing.assert_close(cost.double(), expected, rtol=tight, atol=0)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    for name, one, other in zip(got, gradients, torch.autograd.grad(expected, list(truth.values())), strict=True):
        assert one.dtype == got[name].dtype
        bound = 5e-5 * (1 + shift / 10) + (rounding if name == "scores" else 0)
        assert (one.double() - other).norm() <= bound * other.norm(), name


def test_a_score_of_minus_infinity_adds_nothing() -> None:
    values = inputs(torch.float32)
    values["scores"][2, 3] = values["scores"][5, 0] = -torch.inf
    got = learned(values)
    cost = fastcl.sinkhorn(**got).transport_cost
    assignments = fastcl.sinkhorn(**{name: value.double() for name, value in values.items()}).assignments
    mass = values["row_marginal"].double()
    plan = mass[:, None] / mass.sum() * assignments
    expected = -(plan * values["scores"].double().nan_to_num(neginf=0)).sum()
    torch.testing.assert_close(cost.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(cost, list(got.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][2, 3] == gradients[0][5, 0] == 0


def test_of_a_batch_and_of_a_tolerance() -> None:
    scores = torch.randn(4, N, K, dtype=torch.float64, generator=generator(1)).requires_grad_()
    options = {"epsilon": 0.3, "tol": 1e-12, "n_iters": 5000}
    cost = fastcl.sinkhorn(scores, **options).transport_cost
    uniform = torch.ones(K, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    expected = torch.stack([formula(one, torch.tensor(0.3, dtype=torch.float64), *uniform, 400) for one in scores])
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=0)
    weights = torch.arange(1.0, 5.0)
    (gradient,) = torch.autograd.grad((cost * weights).sum(), scores)
    (other,) = torch.autograd.grad((expected * weights).sum(), scores)
    torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9)


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(N, K, generator=generator(2)).requires_grad_()
    whole = fastcl.sinkhorn(scores).transport_cost
    monkeypatch.setattr(sys.modules["fastcl.sinkhorn"], "BLOCK", 3 * K)
    parts = fastcl.sinkhorn(scores).transport_cost
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, scores), torch.autograd.grad(whole, scores))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_compiled() -> None:
    torch.compiler.reset()
    scores = torch.randn(N, K, generator=generator(3)).requires_grad_()
    expected = fastcl.sinkhorn(scores).transport_cost
    inside = torch.compile(lambda s: fastcl.sinkhorn(s).transport_cost, fullgraph=True, backend="aot_eager")(scores)
    outside = torch.compile(fastcl.sinkhorn, fullgraph=True, backend="aot_eager")(scores).transport_cost
    for cost in (inside, outside):
        torch.testing.assert_close(cost, expected)
        torch.testing.assert_close(
            torch.autograd.grad(cost, scores, retain_graph=True),
            torch.autograd.grad(expected, scores, retain_graph=True),
        )


def test_what_it_refuses() -> None:
    scores = torch.randn(N, K, generator=generator(4)).requires_grad_()
    (gradient,) = torch.autograd.grad(fastcl.sinkhorn(scores).transport_cost, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(gradient.sum(), scores)
    result = fastcl.sinkhorn(scores)
    parts = result.assignments, result.row_potential, result.col_potential
    bare = fastcl.SinkhornResult(*parts, None, 3)
    with pytest.raises(ValueError, match="transport_cost: expected a result of"):
        _ = bare.transport_cost
