"""cluster_infonce: which anchors count, weights, and invariances of the loss."""

from itertools import cycle

import pytest
import torch

from fastcl.functional import cluster_infonce as library_loss
from tests.support.backends import VARIANTS
from tests.support.judging import terms
from tests.support.pairs import pairs
from tests.support.strategies import INTEGERS, generator, loss_problem


@pairs(
    backend=VARIANTS,
    reduction=["mean", "sum", "none"],
    form=["outside", "inside"],
    denominator=["all", "negatives"],
    contrasts=[False, True],
)
def test_when_no_anchor_counts(reduction, form, denominator, contrasts, backend) -> None:
    """The loss is 0 with zero gradient, never NaN and never detached."""
    g = generator(0)
    inputs = {
        "embeddings": torch.randn(5, 3, generator=g, requires_grad=True),
        "temperature": torch.tensor(0.1, requires_grad=True),
        "weights": torch.ones(5, requires_grad=True),
    }
    options = {}
    if contrasts:
        inputs["contrasts"] = torch.randn(6, 3, generator=g, requires_grad=True)
        options = {"contrast_clusters": torch.arange(6) + 100, "symmetric": reduction != "none"}
    loss = library_loss(
        clusters=torch.arange(5), form=form, denominator=denominator, reduction=reduction, **inputs, **options
    )
    assert torch.equal(loss, torch.zeros(5) if reduction == "none" else torch.tensor(0.0))
    loss.sum().backward()
    for name, leaf in inputs.items():
        assert leaf.grad is not None, name
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_all_in_one_cluster_has_no_negatives(backend) -> None:
    x = torch.randn(5, 3, generator=generator(0), requires_grad=True)
    loss = library_loss(x, torch.zeros(5, dtype=torch.int64), denominator="negatives")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(5, 3))
    assert library_loss(x, torch.zeros(5, dtype=torch.int64)) > 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_mean_runs_over_anchors_that_count(symmetric, backend) -> None:
    g = generator(0)
    x, y = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    clusters, other = torch.tensor([0, 0, 1, 2, -1, 8]), torch.tensor([0, 1, 1, 7, -1, -1])
    options = {"contrasts": y, "contrast_clusters": other, "symmetric": symmetric}
    forward = terms(x, clusters, contrasts=y, contrast_clusters=other)
    reverse = terms(y, other, contrasts=x, contrast_clusters=clusters)
    assert (forward > 0).tolist() == [True, True, True, False, False, False]
    assert (reverse > 0).tolist() == [True, True, True, False, False, False]
    mean = (forward.sum() / 3 + reverse.sum() / 3) / 2 if symmetric else forward.sum() / 3
    total = (forward.sum() + reverse.sum()) / 2 if symmetric else forward.sum()
    torch.testing.assert_close(library_loss(x, clusters, **options), mean)
    torch.testing.assert_close(library_loss(x, clusters, reduction="sum", **options), total)
    torch.testing.assert_close(terms(x, clusters, **options), (forward + reverse) / 2 if symmetric else forward)


def test_each_direction_has_its_own_count(backend) -> None:
    g = generator(0)
    x, y = torch.randn(4, 3, generator=g), torch.randn(7, 3, generator=g)
    clusters, other = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 0, 1, -1])
    forward = library_loss(x, clusters, contrasts=y, contrast_clusters=other, reduction="sum") / 2
    reverse = library_loss(y, other, contrasts=x, contrast_clusters=clusters, reduction="sum") / 6
    got = library_loss(x, clusters, contrasts=y, contrast_clusters=other, symmetric=True)
    torch.testing.assert_close(got, (forward + reverse) / 2)


def test_weights(backend) -> None:
    z = torch.randn(5, 2, 3, generator=generator(0))
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    unweighted = terms(z)
    torch.testing.assert_close(terms(z, weights=w), unweighted * w[:, None])
    torch.testing.assert_close(library_loss(z, weights=w, reduction="sum"), (unweighted * w[:, None]).sum())
    expected = (unweighted * w[:, None]).sum() / (2 * w.sum())
    torch.testing.assert_close(library_loss(z, weights=w), expected)
    torch.testing.assert_close(library_loss(z, weights=w * 100), expected)


def test_weights_of_anchors_that_do_not_count_do_not_enter_the_mean(backend) -> None:
    x = torch.randn(5, 3, generator=generator(0))
    clusters, w = torch.tensor([0, 0, 1, 2, -1]), torch.tensor([1.0, 3.0, 100.0, 100.0, 100.0])
    unweighted = terms(x, clusters)
    expected = (unweighted[0] + 3 * unweighted[1]) / 4
    torch.testing.assert_close(library_loss(x, clusters, weights=w), expected)


def test_the_reverse_direction_is_not_weighted(backend) -> None:
    g = generator(0)
    x, y, w = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g), torch.tensor([0.0, 1.0, 2.0, 4.0])
    forward, reverse = terms(x, contrasts=y), terms(y, contrasts=x)
    got = library_loss(x, contrasts=y, symmetric=True, weights=w)
    torch.testing.assert_close(got, ((forward * w).sum() / w.sum() + reverse.mean()) / 2)
    torch.testing.assert_close(terms(x, contrasts=y, symmetric=True, weights=w), (forward * w + reverse) / 2)


def test_weights_all_zero(backend) -> None:
    z = torch.randn(5, 2, 3, generator=generator(0), requires_grad=True)
    loss = library_loss(z, weights=torch.zeros(5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


# Invariances


@pytest.mark.parametrize("contrasts", [None, "clustered"])
def test_order_of_samples_and_names_of_clusters_do_not_matter(contrasts, backend) -> None:
    problem = loss_problem(
        n=21,
        contrasts=contrasts,
        m=30,
        pattern="negatives",
        dtype=torch.float64,
        contrast_dtype=torch.float64,
        weights=True,
        ids=contrasts is not None,
        reduction="none",
    )
    arguments = problem.arguments()
    order, columns = torch.randperm(21, generator=generator(1)), torch.randperm(30, generator=generator(2))
    names = torch.randperm(100, generator=generator(3)) * 10**12

    def rename(clusters):
        return torch.where(clusters < 0, clusters * 17, names[clusters.clamp(min=0)])

    other = dict(arguments)
    for name in ("embeddings", "clusters", "ids", "weights"):
        if name in other:
            other[name] = other[name][order]
    for name in ("contrasts", "contrast_clusters", "contrast_ids"):
        if name in other:
            other[name] = other[name][columns]
    for name in ("clusters", "contrast_clusters"):
        if name in other:
            other[name] = rename(other[name])
    torch.testing.assert_close(library_loss(**other), library_loss(**arguments)[order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "backend"), list(zip(INTEGERS, cycle(VARIANTS), strict=False)), indirect=["backend"])
def test_integer_dtypes(dtype, backend) -> None:
    """Every backend with each: `test_stats_fields.py`."""
    g = generator(0)
    x, y = torch.randn(8, 3, generator=g), torch.randn(9, 3, generator=g)
    clusters, other = torch.randint(0, 3, (8,), generator=g), torch.randint(0, 3, (9,), generator=g)
    got = library_loss(
        x,
        clusters.to(dtype),
        contrasts=y,
        contrast_clusters=other.to(dtype),
        ids=clusters.to(dtype),
        contrast_ids=(other + 1).to(dtype),
    )
    expected = library_loss(x, clusters, contrasts=y, contrast_clusters=other, ids=clusters, contrast_ids=other + 1)
    assert torch.equal(got, expected)
    assert torch.equal(library_loss(x, clusters.to(dtype)), library_loss(x, clusters))


@pytest.mark.parametrize("dtype", [torch.uint64, torch.int64])
def test_large_ids(dtype, backend) -> None:
    x = torch.randn(4, 3, generator=generator(0))
    clusters = torch.tensor([2**62, 2**62 + 1, 2**62, 2**62 + 1])
    assert torch.equal(library_loss(x, clusters.to(dtype)), library_loss(x, torch.tensor([0, 1, 0, 1])))


def test_uint64_ids_that_int64_does_not_hold_are_never_taken_for_negative() -> None:
    x = torch.randn(4, 3, generator=generator(0))
    with pytest.raises(ValueError, match="clusters"):
        library_loss(x, torch.tensor([2**63 + 1, 2**63 + 2, 2**63 + 1, 0], dtype=torch.uint64))
