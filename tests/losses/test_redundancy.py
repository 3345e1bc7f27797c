"""VICReg, Barlow Twins, W-MSE and the negative cosine similarity against float64 formulas written out."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl.functional import barlow_twins_loss, negative_cosine_similarity, vicreg_loss, wmse_loss
from tests.support.strategies import generator

SHAPES = [(9, 4), (4, 9), (7, 7), (2, 5), (6, 1)]


def views(n: int = 9, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    z = torch.randn(2, n, d, generator=generator(seed), dtype=torch.float64)
    z[1] = 0.7 * z[0] + 0.5 * z[1] + 0.3
    return [one.to(dtype).requires_grad_() for one in z]


def off(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diag())


def plain_vicreg(a, b, lam=25.0, mu=25.0, nu=1.0, eps=1e-4) -> Tensor:
    variance = sum((1 - (z.var(0) + eps).sqrt()).relu().mean() / 2 for z in (a, b))
    covariance = sum(off(torch.cov(z.T).reshape(z.shape[1], -1)).square().sum() / z.shape[1] for z in (a, b))
    return lam * F.mse_loss(a, b) + mu * variance + nu * covariance


def plain_barlow(a, b, lam=5e-3, scale=1.0) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
    c = a.T @ b / len(a)
    return scale * ((c.diag() - 1).square().sum() + lam * off(c).square().sum())


def plain_cosine(a, b) -> Tensor:
    return -F.cosine_similarity(a, b).mean()


def plain_wmse(a, b, eps=0.1) -> Tensor:
    white = []
    for z in (a, b):
        covariance = torch.cov(z.T).reshape(z.shape[1], -1)
        factor = torch.linalg.cholesky((1 - eps) * covariance + eps * torch.eye(z.shape[1], dtype=z.dtype))
        white.append(F.normalize((torch.linalg.inv(factor) @ (z - z.mean(0)).T).T, dim=1))
    return (white[0] - white[1]).square().sum(1).mean()


LOSSES = {
    "vicreg": (fastcl.VICRegLoss, vicreg_loss, plain_vicreg),
    "barlow": (fastcl.BarlowTwinsLoss, barlow_twins_loss, plain_barlow),
    "wmse": (partial(fastcl.WMSELoss, 0.1), partial(wmse_loss, eps=0.1), plain_wmse),
    "cosine": (fastcl.NegativeCosineSimilarity, negative_cosine_similarity, plain_cosine),
}
each = pytest.mark.parametrize("name", LOSSES)


@each
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_its_formula(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    kind, form, plain = LOSSES[name]
    given = views(*shape, dtype=dtype)
    value = kind()(*given)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = [z.detach().double().requires_grad_() for z in given]
    truth = plain(*wide)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    assert torch.equal(form(*given), value)
    expected = torch.autograd.grad(truth, wide)
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0)
    for gradient, right in zip(torch.autograd.grad(value, given), expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - right).norm() <= (tolerance + rounding) * right.norm() + tolerance


def test_options_reach_the_formula() -> None:
    a, b = views()
    torch.testing.assert_close(fastcl.VICRegLoss(3.0, 5.0, 7.0, 0.1)(a, b), plain_vicreg(a, b, 3.0, 5.0, 7.0, 0.1))
    torch.testing.assert_close(fastcl.BarlowTwinsLoss(0.3, scale=0.5)(a, b), plain_barlow(a, b, 0.3, 0.5))


def test_solo_learns_variance_term_and_scale() -> None:
    """Their formulas: the variance terms of both views added, and 0.025 of Barlow Twins."""
    a, b = views()
    stds = [(z.var(0) + 1e-4).sqrt() for z in (a, b)]
    covariances = [off(torch.cov(z.T)).square().sum() / 5 for z in (a, b)]
    theirs = 25 * F.mse_loss(a, b) + 25 * sum((1 - std).relu().mean() for std in stds) + sum(covariances)
    torch.testing.assert_close(fastcl.VICRegLoss(mu_param=50)(a, b), theirs)
    norm = torch.nn.BatchNorm1d(5, affine=False, dtype=torch.float64)
    c = norm(a).T @ norm(b) / 9
    difference = (c - torch.eye(5)).square()
    theirs = 0.025 * (difference.diag().sum() + 0.0051 * off(difference).sum())
    torch.testing.assert_close(fastcl.BarlowTwinsLoss(0.0051, scale=0.025)(a, b), theirs)


@each
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_derivatives_of_both_products(name: str, shape: tuple[int, int]) -> None:
    assert torch.autograd.gradcheck(LOSSES[name][1], views(*shape))
    assert torch.autograd.gradgradcheck(LOSSES[name][1], views(*shape))


@each
@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows(name: str, n: int) -> None:
    """One row has no variance: only the distance of VICReg and the cosine remain."""
    a, b = views(n)
    value = LOSSES[name][1](a, b)
    left = {"vicreg": lambda: 25 * F.mse_loss(a, b), "cosine": lambda: plain_cosine(a, b)}
    torch.testing.assert_close(value, left[name]() if n and name in left else torch.zeros((), dtype=torch.float64))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, [a, b]))


@each
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_columns(name: str, fill: float) -> None:
    a, b = (torch.full((6, 3), fill).requires_grad_() for _ in range(2))
    value = LOSSES[name][1](a, b)
    expected = {"vicreg": 25 * 0.99, "barlow": 3.0, "wmse": 2.0, "cosine": -fill}[name]
    assert value.item() == pytest.approx(expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, [a, b]))


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(1, 3), (9, 4), (4, 9), (5, 1)])
def test_a_number_that_is_none_is_never_hidden(name: str, bad: float, shape: tuple[int, int]) -> None:
    for place in range(2):
        given = [z.detach() for z in views(*shape)]
        given[place][0, 0] = bad
        assert not LOSSES[name][1](*given).isfinite()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@each
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_autocast_and_compilation_change_nothing(name: str, shape: tuple[int, int]) -> None:
    kind = LOSSES[name][0]
    given = views(*shape, dtype=torch.float32)
    value = kind()(*given)
    gradients = torch.autograd.grad(value, given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kind()(*given)
        inner = torch.autograd.grad(inside, given)
    assert torch.equal(inside, value)
    assert all(map(torch.equal, inner, gradients))
    compiled = torch.compile(kind(), fullgraph=True, dynamic=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, given), gradients)


@each
def test_copies_and_shapes(name: str) -> None:
    loss = LOSSES[name][0]()
    given = views()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss)
        assert torch.equal(other(*given), loss(*given))
    assert loss.state_dict() == {}
    meta = torch.empty(6, 3, device="meta")
    assert loss(meta, meta).is_meta


def test_whitening_without_shrinkage() -> None:
    a, b = views(12)
    torch.testing.assert_close(fastcl.WMSELoss()(a, b), plain_wmse(a, b, 0))
    # Any invertible map of a view's features is undone up to a rotation, a triangular one entirely.
    triangle = torch.eye(5, dtype=torch.float64) + torch.randn(5, 5, dtype=torch.float64).tril() / 9
    torch.testing.assert_close(fastcl.WMSELoss()(a @ triangle.T + 3, b), fastcl.WMSELoss()(a, b))
    with pytest.raises(ValueError, match=r"^z_a: expected more rows than features, 5, to whiten with eps=0, got 5"):
        fastcl.WMSELoss()(a[:5], b[:5])
    with torch.no_grad():
        a[:, 2] = 1
    assert fastcl.WMSELoss()(a, b).isnan()


def test_whitening_of_parts_of_the_batch() -> None:
    a, b = views(12, 3)
    order = torch.randperm(12, generator=generator(4)).split(6)
    expected = torch.stack([plain_wmse(a[part], b[part]) for part in order]).mean()
    found = fastcl.WMSELoss(0.1, w_size=6)(a, b, generator=generator(4))
    torch.testing.assert_close(found, expected)
    pairs = zip(torch.autograd.grad(found, [a, b]), torch.autograd.grad(expected, [a, b]), strict=True)
    assert all(torch.allclose(*pair) for pair in pairs)
    assert wmse_loss(a, b, eps=0.1, w_size=6) != wmse_loss(a, b, eps=0.1, w_size=6)  # drawn anew


def test_reprs() -> None:
    assert repr(fastcl.WMSELoss(w_size=128)) == "WMSELoss(eps=0, w_size=128)"
    assert repr(fastcl.VICRegLoss(gather=True)) == (
        "VICRegLoss(lambda_param=25, mu_param=25, nu_param=1, eps=0.0001, gather=True)"
    )
    assert repr(fastcl.BarlowTwinsLoss(scale=0.025)) == "BarlowTwinsLoss(lambda_param=0.005, scale=0.025)"
    assert repr(fastcl.NegativeCosineSimilarity()) == "NegativeCosineSimilarity()"


x = torch.randn(4, 3)
WRONG = {
    "lambda_param": (lambda: fastcl.VICRegLoss(torch.nan), "lambda_param: expected a finite number .*, got nan"),
    "nu_param": (lambda: vicreg_loss(x, x, nu_param="1"), "nu_param: expected a number, got str"),
    "eps": (lambda: fastcl.VICRegLoss(eps=0), "eps: expected a positive number .*, got 0"),
    "gather": (lambda: fastcl.VICRegLoss(gather="ring"), "gather: expected True or False, got 'ring'"),
    "scale": (lambda: fastcl.BarlowTwinsLoss(scale=torch.inf), "scale: expected a finite number .*, got inf"),
    "z_a": (lambda: fastcl.VICRegLoss()(x[0], x), r"z_a: expected shape \[N, D\], got \[3\]"),
    "z_b": (lambda: fastcl.BarlowTwinsLoss()(x, x[:3]), r"z_b: expected shape \[4, 3\], as z_a, got \[3, 3\]"),
    "eps 1": (lambda: fastcl.WMSELoss(1), "eps: expected a number from 0 to less than 1, got 1"),
    "w_size": (lambda: wmse_loss(x, x, w_size=3), "z_a: expected a multiple of w_size=3 rows, got 4"),
    "w_size 1": (lambda: fastcl.WMSELoss(w_size=1), "w_size: expected at least 2, got 1"),
    "w_size, gather": (lambda: fastcl.WMSELoss(w_size=4, gather=True), "w_size: expected None with gather=True, got 4"),
    "generator": (lambda: wmse_loss(x, x, generator=1), "generator: expected a torch.Generator, got int"),
    "x1": (lambda: negative_cosine_similarity(x, None), "x1: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
