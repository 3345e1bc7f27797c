"""Alignment and uniformity against Wang and Isola's published code, RankMe against its formula."""

import pytest
import torch
from torch import Tensor

import fastcl


def pairs(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    return torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(n, d).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [2.0, 1.0, 3.5])
def test_alignment(alpha: float, dtype: torch.dtype) -> None:
    x, y = pairs(9, 5, dtype)
    wide = [part.detach().double().requires_grad_() for part in (x, y)]
    a, b = (torch.nn.functional.normalize(part, dim=1) for part in wide)
    expected = (a - b).norm(p=2, dim=1).pow(alpha).mean()
    got = fastcl.alignment(x, y, alpha)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got, expected, check_dtype=False)
    for g, e in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(g, e.to(dtype))


@pytest.mark.parametrize("alpha", [2.0, 1.0])
def test_alignment_of_equal_rows(alpha: float) -> None:
    x = torch.randn(4, 3).requires_grad_()
    loss = fastcl.alignment(x, x.detach().clone(), alpha)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("t", [2.0, 0.5, 100.0])
def test_uniformity(t: float, backend: str) -> None:
    x, _ = pairs(11, 6)
    unit = torch.nn.functional.normalize(x, dim=1)
    expected = torch.pdist(unit, p=2).pow(2).mul(-t).exp().mean().log()
    got = fastcl.uniformity(x, t)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (got, expected)))


def test_uniformity_of_one_point() -> None:
    torch.testing.assert_close(fastcl.uniformity(torch.ones(5, 3)), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastcl.alignment(torch.ones(2, 3), torch.ones(3, 3)), ValueError, "y"),
        (lambda: fastcl.alignment(torch.ones(0, 3), torch.ones(0, 3)), ValueError, "x"),
        (lambda: fastcl.alignment(torch.ones(2, 3), torch.ones(2, 3), 0), ValueError, "alpha"),
        (lambda: fastcl.alignment(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), (TypeError, ValueError), "alpha"),
        (lambda: fastcl.uniformity(torch.ones(1, 3)), ValueError, "embeddings"),
        (lambda: fastcl.uniformity(torch.ones(3)), ValueError, "embeddings"),
        (lambda: fastcl.uniformity(torch.ones(2, 3), -1), ValueError, "t"),
        (lambda: fastcl.uniformity(torch.ones(2, 3), 3e38), ValueError, "^t: expected at most"),
        (lambda: fastcl.uniformity([[1.0]]), TypeError, "embeddings"),
    ],
)
def test_errors(call, error, named) -> None:
    with pytest.raises(error, match=named):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (1, 4)])
def test_rankme_is_the_papers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = pairs(*shape, dtype)[0]
    values = torch.linalg.svdvals(rows.detach().double())
    p = values / values.norm(p=1) + 1e-7
    found = fastcl.rankme(rows)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad
    assert found.item() == pytest.approx((-p * p.log()).sum().exp().item(), rel=1e-5)


def test_rankme_of_known_spectra() -> None:
    orthogonal = torch.linalg.qr(pairs(20, 6)[0].detach())[0]
    assert fastcl.rankme(orthogonal).item() == pytest.approx(6)
    line = torch.tensor([3.0, 0, 0, 0, 0, 0])
    assert fastcl.rankme(orthogonal * line).item() == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0])
    assert fastcl.rankme(orthogonal * p * 1e-30).item() == pytest.approx(2**1.5)


def test_rankme_of_nothing_and_of_what_is_no_number() -> None:
    assert fastcl.rankme(torch.zeros(4, 3)) == 0
    assert fastcl.rankme(torch.zeros(0, 3)) == 0
    for bad in (torch.nan, torch.inf):
        rows = torch.ones(4, 3)
        rows[2, 1] = bad
        assert fastcl.rankme(rows).isnan()
    with pytest.raises(ValueError, match=r"^embeddings: expected shape \[N, D\], got \[3\]"):
        fastcl.rankme(torch.zeros(3))
