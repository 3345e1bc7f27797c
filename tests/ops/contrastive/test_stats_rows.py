"""contrastive_stats with rows of every size and layout, and with formulas that mask rows."""

import pytest
import torch
from torch import Tensor

import fastcl
from tests.support.oracle import TRUTH, contrastive_stats, differentiate
from tests.support.stats_checks import check_stats, library_stats, objective, simple_problem
from tests.support.strategies import DTYPES, FIELDS, generator

# Rows of every kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 6])
def test_rows_of_zeros(dtype, m, backend) -> None:
    """Similarity 0 and gradient 0, not NaN."""
    arguments = simple_problem(n=5, m=m, d=4, dtype=dtype, contrast_dtype=dtype, bias=False, ids=False).arguments()
    arguments["anchors"][2] = 0
    leaves = ["anchors"]
    if m is not None:
        arguments["contrasts"][[0, 3]] = 0
        leaves.append("contrasts")
    arguments["logit_scale"] = 20.0
    check_stats(arguments, tuple(leaves), backends=(backend,))
    _, gradients = differentiate(library_stats, arguments, leaves, objective)
    assert torch.equal(gradients["anchors"][2], torch.zeros(4, dtype=dtype))
    if m is not None:
        assert torch.equal(gradients["contrasts"][[0, 3]], torch.zeros(2, 4, dtype=dtype))


def test_all_rows_zero(backend) -> None:
    x = torch.zeros(5, 3, requires_grad=True)
    stats = fastcl.contrastive_stats(x, normalize_anchors=True)
    torch.testing.assert_close(stats.lse_all, torch.full((5,), 4.0).log())
    (gradient,) = torch.autograd.grad(stats.lse_all.sum(), x)
    assert torch.equal(gradient, torch.zeros(5, 3))


@pytest.mark.parametrize("size", [1e-15, 1e-13, 1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_of_rows(size, dtype, backend) -> None:
    """Cosines do not depend on norms above 1e-12; smaller norms are replaced by 1e-12."""
    problem = simple_problem(n=12, m=None, bias=False, dtype=dtype, contrast_dtype=dtype)
    arguments = problem.arguments()
    arguments["anchors"] = arguments["anchors"] * size
    check_stats(arguments, problem.leaves, backends=(backend,))


def strided(x: Tensor, how: str) -> Tensor:
    """The values of x with other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if how == "every other":
        wide = x.new_full((x.shape[0] * 2, *x.shape[1:]), float("nan") if x.is_floating_point() else -9)
        wide[::2] = x
        return wide[::2]
    if how == "columns":
        wide = x.new_full((*x.shape, 3), float("nan") if x.is_floating_point() else -9)
        wide[..., 1] = x
        return wide[..., 1]
    wide = x.new_full((x.numel() + 3,), float("nan") if x.is_floating_point() else -9)
    wide[3:] = x.flatten()
    return wide[3:].view(x.shape)


@pytest.mark.parametrize("how", ["transposed", "every other", "columns", "offset"])
@pytest.mark.parametrize("m", [None, 14])
def test_strides(how, m, backend) -> None:
    problem = simple_problem(m=m, bias=True)
    arguments = problem.arguments()
    other = {
        name: strided(value, how) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in arguments.items()
    }
    expected, expected_gradients = differentiate(library_stats, arguments, problem.leaves, objective)
    got, gradients = differentiate(library_stats, other, problem.leaves, objective)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-5)


def test_expanded_rows(backend) -> None:
    """All rows share memory; the gradient still has a place for each."""
    row = torch.randn(1, 4, generator=generator(0))
    expected = differentiate(library_stats, {"anchors": row.repeat(6, 1)}, ["anchors"], objective)
    got = differentiate(library_stats, {"anchors": row.expand(6, 4)}, ["anchors"], objective)
    torch.testing.assert_close(got, expected)


def test_non_leaf_inputs(backend) -> None:
    w = torch.randn(4, 6, generator=generator(0), dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 4, generator=generator(1), dtype=torch.float64)

    def loss(stats):
        x_w = (x @ w).relu()
        return objective(stats(anchors=x_w, anchor_clusters=torch.arange(7) // 3, normalize_anchors=True))

    got = torch.autograd.grad(loss(library_stats), w)
    expected = torch.autograd.grad(loss(lambda **a: contrastive_stats(want=("lse_all", "sum_pos"), **a)), w)
    torch.testing.assert_close(got, expected)


def test_expanded_gradients(backend) -> None:
    """The gradient of sum() is one number expanded to N."""
    problem = simple_problem(n=20, m=23)

    def expanded(fields):
        return sum(field.sum() for name, field in fields.items() if name.endswith("lse_all"))

    def written_out(fields):
        return sum((field * torch.ones(len(field))).sum() for name, field in fields.items() if name.endswith("lse_all"))

    arguments = problem.arguments() | {"want": ("lse_all",)}
    _, got = differentiate(library_stats, arguments, problem.leaves, expanded)
    _, expected = differentiate(library_stats, arguments, problem.leaves, written_out)
    for name in problem.leaves:
        assert torch.equal(got[name], expected[name])
        assert got[name].abs().sum() > 0


# Masked rows


@pytest.mark.parametrize("m", [None, 11])
@pytest.mark.parametrize("normalize", [False, True])
def test_formulas_that_are_nan_where_masked(m, normalize, backend) -> None:
    """NaN gradients of fields over empty sets leave the gradient finite and right."""
    problem = simple_problem(
        n=12,
        m=m,
        pattern="negatives",
        dtype=torch.float64,
        contrast_dtype=torch.float64,
        normalize_anchors=normalize,
        normalize_contrasts=normalize,
    )
    arguments = problem.arguments()

    def rows_of(side):
        num_pos = side["num_pos"]
        # 0 / 0 sends NaN to sum_pos, the root of a product of infinities sends it to lse_pos.
        return side["lse_all"] + side["lse_neg"] - side["sum_pos"] / num_pos + (side["lse_pos"] ** 2 + 1).sqrt()

    def masked(fields):
        total = 0
        for prefix in ("", "reverse.") if m else ("",):
            side = {name: fields[prefix + name] for name in (*FIELDS, "num_pos", "num_neg")}
            valid = (side["num_pos"] > 0) & (side["num_neg"] > 0)
            assert 0 < valid.sum() < len(valid)
            total = total + torch.where(valid, rows_of(side), 0).sum()
        return total

    def selected(fields):
        total = 0
        for prefix in ("", "reverse.") if m else ("",):
            valid = (fields[prefix + "num_pos"] > 0) & (fields[prefix + "num_neg"] > 0)
            side = {name: fields[prefix + name][valid] for name in (*FIELDS, "num_pos", "num_neg")}
            total = total + rows_of(side).sum()
        return total

    _, got = differentiate(library_stats, arguments, problem.leaves, masked)
    _, truth = differentiate(contrastive_stats, arguments, problem.leaves, selected, torch.float64, how=TRUTH)
    for name in problem.leaves:
        assert got[name].isfinite().all()
        torch.testing.assert_close(got[name], truth[name], rtol=1e-10, atol=1e-12)


def test_nan_gradients_of_counting_rows_are_passed_on(backend) -> None:
    """Only empty sets are exempt: a NaN from the user's formula must show."""
    x = torch.randn(4, 3, generator=generator(0), requires_grad=True)
    stats = fastcl.contrastive_stats(x, anchor_clusters=torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad((stats.lse_all * torch.tensor([torch.nan, 0, 0, 0])).sum(), x)
    assert gradient.isnan().any()
