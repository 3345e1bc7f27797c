"""SCAN's clustering step against its float64 formula."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.functional import scan_loss
from tests.support.strategies import generator


def given(n: int = 9, c: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    scores = 2 * torch.randn(2, n, c, generator=generator(0), dtype=torch.float64)
    return [one.to(dtype).requires_grad_() for one in scores]


def plain(anchors: Tensor, neighbors: Tensor, weight: float = 2.0) -> Tensor:
    p, q = anchors.softmax(1), neighbors.softmax(1)
    mean = p.mean(0)
    return -(p * q).sum(1).log().mean() + weight * (mean * mean.log()).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [2.0, 5.0, 0.0])
def test_is_its_formula(weight: float, dtype: torch.dtype) -> None:
    scores = given(dtype=dtype)
    value = fastcl.SCANLoss(weight)(*scores)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = [one.detach().double().requires_grad_() for one in scores]
    truth = plain(*wide, weight)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    assert torch.equal(scan_loss(*scores, entropy_weight=weight), value)
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0)
    pairs = zip(torch.autograd.grad(value, scores), torch.autograd.grad(truth, wide), strict=True)
    for gradient, right in pairs:
        assert (gradient.double() - right).norm() <= (tolerance + rounding) * right.norm()


def test_second_derivatives() -> None:
    assert torch.autograd.gradgradcheck(scan_loss, given(4, 3))


def test_scores_of_any_size() -> None:
    """Neighbours that agree on nothing, and clusters without anchors: log and gradient stay finite."""
    anchors = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]]).requires_grad_()
    neighbors = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, -1e4]]).requires_grad_()
    loss = scan_loss(anchors, neighbors)
    # The first pair has the probability e^-20000 in each of three clusters. Every anchor is in one cluster: entropy 0.
    assert loss.item() == pytest.approx((2e4 - math.log(3)) / 2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [anchors, neighbors]))


def test_a_score_of_minus_infinity_is_no_probability() -> None:
    anchors, neighbors = (one.detach() for one in given())
    left_out = anchors.clone()
    left_out[:, 4] = -torch.inf
    expected = -(anchors[:, :4].softmax(1) * neighbors.softmax(1)[:, :4]).sum(1).log().mean()
    torch.testing.assert_close(scan_loss(left_out, neighbors, entropy_weight=0), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_none_is_never_hidden(place: int, bad: float) -> None:
    scores = [one.detach() for one in given()]
    scores[place][2, 1] = bad
    assert scan_loss(*scores).isnan()


def test_no_rows() -> None:
    scores = given(0)
    loss = scan_loss(*scores)
    assert loss == 0
    assert all(gradient.shape == (0, 5) for gradient in torch.autograd.grad(loss, scores))


def test_autocast_compilation_copies_and_meta() -> None:
    scores, loss = given(dtype=torch.float32), fastcl.SCANLoss(3.0)
    value = loss(*scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*scores), value)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(*scores)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, scores), torch.autograd.grad(value, scores))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss) == "SCANLoss(entropy_weight=3)"
    assert loss(*(torch.empty(4, 3, device="meta") for _ in range(2))).is_meta


x = torch.randn(4, 3, generator=generator(0))
WRONG = {
    "entropy_weight": (lambda: fastcl.SCANLoss(torch.nan), "entropy_weight: expected a finite number .*, got nan"),
    "gather": (lambda: fastcl.SCANLoss(gather="ring"), "gather: expected True or False, got 'ring'"),
    "anchors": (lambda: scan_loss(x[0], x), r"anchors: expected shape \[N, D\], got \[3\]"),
    "neighbors": (lambda: scan_loss(x, x[:2]), r"neighbors: expected shape \[4, 3\], as anchors, got \[2, 3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
