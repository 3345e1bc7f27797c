"""Soft assignments whose products with each other exceed the range of float32."""

import pytest
import torch

from fastcl.functional import cluster_infonce
from tests.losses.test_cluster_assignments import CANCELLING, formula, library, objective, problem
from tests.support.oracle import differentiate
from tests.support.strategies import generator


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize(
    ("exponent", "dtype"),
    [
        (-110, torch.float32), (-70, torch.float32), (61, torch.float32), (110, torch.float32),
        (-110, torch.bfloat16), (110, torch.bfloat16), (-200, torch.float64), (600, torch.float64),
    ],
)  # fmt: skip
def test_assignments_of_any_size(exponent, dtype, two_sets, backend) -> None:
    """Powers of two cancel to the bit, although products of weights and their sums exceed the range of float32."""
    arguments = problem(9, 6, 4, m=7 if two_sets else None, symmetric=two_sets, assignment_dtype=dtype)
    assignments = [name for name in ("assignments", "contrast_assignments") if name in arguments]
    leaves = ("embeddings", *assignments)
    expected, expected_gradients = differentiate(library, arguments, leaves, objective)
    scaled = arguments | {name: arguments[name] * 2.0**exponent for name in assignments}
    got, gradients = differentiate(library, scaled, leaves, objective)
    assert torch.equal(got, expected)
    for name in leaves:
        factor = 1.0 if name == "embeddings" else 2.0**exponent
        assert torch.equal(gradients[name] * factor, expected_gradients[name]), name


def test_an_anchor_of_hardly_any_weight_does_not_count(backend) -> None:
    """Its weights are tiny beside the largest assignments: its derivatives would overflow float32 and become NaN."""
    x = torch.randn(6, 3, generator=generator(0)).requires_grad_()
    for overlap, counts in ((1e-41, False), (1e-38, False), (1e-32, False), (1e-28, True)):
        r = torch.eye(2)[[0, 1, 1, 1, 1, 1]]
        r[0, 1] = overlap
        r.requires_grad_()
        loss = cluster_infonce(x, assignments=r, reduction="none")
        assert (loss != 0).tolist() == [counts, True, True, True, True, True]
        for gradient in torch.autograd.grad(loss.sum(), [x, r]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(1e30, torch.float32), (1e39, torch.float64), (1e-33, torch.float32)])
def test_one_row_of_another_size(size, dtype, two_sets, views, backend) -> None:
    """The other rows count by the weights that they share with it."""
    arguments = problem(9, 6, 4, views=views, m=7 if two_sets else None, symmetric=two_sets, assignment_dtype=dtype)
    arguments["assignments"][2] = size * torch.rand(4, generator=generator(1), dtype=torch.float64)
    leaves = tuple(name for name in ("embeddings", "assignments", "contrasts") if name in arguments)
    expected, expected_gradients = differentiate(formula, arguments, leaves, objective, torch.float64)
    parts = [differentiate(formula, arguments, leaves, objective, torch.float64, how=how)[1] for how in CANCELLING]
    got, gradients = differentiate(library, arguments, leaves, objective)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    for name in leaves:
        error = (gradients[name].double() - expected_gradients[name]).norm()
        assert error <= 1e-5 * sum(part[name].norm() for part in parts), name
