"""Sums over pairs: every backend against the plain formulas in float64."""

from dataclasses import replace

import pytest
import torch

from fastcl.ops.pair_maps import KINDS
from fastcl.ops.pairs.records import Gradients, Needs, Pairs, Sums
from tests.support.pair_sums import TARGETS, check_sweep, plain, problem, swept
from tests.support.strategies import generator

KIND_NAMES = tuple(KINDS)
SIZES = [(1, None, 3), (37, None, 17), (201, None, 5), (13, 29, 8), (70, 210, 33)]
MOST_INTERPRETED = 30_000  # numbers multiplied, beyond which the interpreter takes too long


def skip_if_slow(backend: str, p: Pairs) -> None:
    n, m = p.sizes
    if backend == "triton" and n * m * p.anchors.values.shape[1] > MOST_INTERPRETED:
        pytest.skip("takes too long in the interpreter")


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_sweep_agrees_with_the_formula(backend, kind, n, m, d):
    skip_if_slow(backend, problem(n, m, d, kind))
    check_sweep(problem(n, m, d, kind))
    check_sweep(problem(n, m, d, kind, normalize=False, seed=1))


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [None, 23])
def test_dtypes(backend, kind, dtype, m):
    check_sweep(problem(31, m, 12, kind, dtype=dtype))


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("offset", ["all", "rows"])
@pytest.mark.parametrize("only_positives", [False, True])
def test_ids_bias_and_offset(backend, kind, offset, only_positives):
    p = problem(29, 43, 9, kind, ids=True, bias=True, offset=offset, only_positives=only_positives)
    check_sweep(p)
    assert p.contrasts is not None
    alone = replace(p, anchors=p.anchors._replace(clusters=None), contrasts=p.contrasts._replace(clusters=None))
    check_sweep(alone)


def test_self_contrast_with_one_offset(backend):
    check_sweep(problem(45, None, 9, "softplus", offset="all"))
    check_sweep(problem(45, None, 9, "hinge", offset="all", only_positives=True))


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("m", [None, 40])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("near", [1e-2, 1e-5])
def test_converged_rows(backend, kind, m, normalize, near):
    """Positives whose rows nearly agree: distances there must keep their digits, which a product of rows would lose."""
    p = problem(40, m, 11, kind, near=near, normalize=normalize, seed=3)
    if KINDS[kind].of_distance:
        p = replace(p, pos_margin=0.0)
    check_sweep(p)


@pytest.mark.parametrize("kind", [kind for kind in KIND_NAMES if KINDS[kind].of_distance])
@pytest.mark.parametrize("m", [None, 12])
def test_small_distances_keep_their_digits(backend, kind, m):
    p = replace(problem(24, m, 7, kind, near=1e-4, seed=5), pos_margin=0.0, only_positives=True)
    weights = torch.ones(2, 24)
    truth = plain(p, weights, torch.float64)
    needs = Needs(True, m is not None)
    sums, found = swept(p, weights, needs)
    assert (sums.values - truth.values).norm() <= 1e-6 * truth.values.norm()
    for got, right in zip(found[:2], truth.gradients, strict=False):
        if got is not None and right is not None:
            assert (got - right).norm() <= 1e-6 * right.norm()


def test_equal_rows_have_gradient_0(backend):
    rows = torch.ones(5, 3)
    p = problem(5, None, 3, "distance")
    p = replace(p, anchors=p.anchors._replace(values=rows, clusters=torch.tensor([0, 0, 0, 1, 1])), pos_margin=0.0)
    sums, found = swept(p, torch.ones(2, 5), Needs(True))
    assert sums.values[0].tolist() == [0] * 5
    assert torch.allclose(sums.values[1], torch.tensor([2 * 1.3] * 3 + [3 * 1.3] * 2))
    assert found.anchors is not None
    assert found.anchors.abs().max() == 0


@pytest.mark.parametrize("kind", [kind for kind in KIND_NAMES if KINDS[kind].of_distance])
@pytest.mark.parametrize("m", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rows_are_at_distance_0(backend, kind, m, dtype):
    """However the difference of two products is rounded: duplicates are not active, and have no gradient."""
    row = torch.randn(1, 13, generator=generator(4)).to(dtype).expand(6, -1)
    p = replace(problem(6, m, 13, kind, dtype=dtype), pos_margin=0.0, neg_margin=0.5)
    together = torch.zeros(6, dtype=torch.int64)
    for clusters in (together, torch.arange(6)):
        sides = [
            rows and rows._replace(values=row, clusters=labels, ids=None)
            for rows, labels in zip(
                (p.anchors, p.contrasts), (clusters, clusters if clusters is together else clusters + 6), strict=True
            )
        ]
        sums, found = swept(
            replace(p, anchors=sides[0], contrasts=sides[1]), torch.ones(2, 6), Needs(True, m is not None)
        )
        assert sums.values[0].abs().max() == 0
        assert sums.active[0].abs().max() == 0
        assert bool((sums.active[1] == sums.counts[1]).all())
        for gradient in found[:2]:
            assert gradient is None or gradient.abs().max() == 0


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-3])
def test_softplus_of_extreme_logits(backend, scale):
    p = problem(21, 33, 6, "softplus")
    check_sweep(replace(p, logit_scale=torch.tensor(scale)))


def test_softplus_keeps_its_digits_far_below_0(backend):
    """With a bias of -20 as SigLIP has, every term is near exp(-20): 1 + exp(-20) would round it to 0."""
    p = replace(problem(17, 19, 6, "softplus", clusters=None, offset="all"), offset=torch.tensor(-20.0))
    truth = plain(p, torch.ones(2, 17), torch.float64)
    sums, found = swept(p, torch.ones(2, 17), Needs(True, True, True, True))
    assert (sums.values - truth.values).norm() <= 1e-5 * truth.values.norm()
    assert found.anchors is not None
    assert (found.anchors - truth.gradients[0]).norm() <= 1e-5 * truth.gradients[0].norm()


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("m", [None, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_bad_rows_show(backend, kind, m, bad, normalize):
    """A row of NaN, or with an infinite number, makes every sum that it takes part in NaN."""
    p = problem(18, m, 5, kind, normalize=normalize)
    p.anchors.values[3, 2] = bad
    sums, found = swept(p, torch.ones(2, 18), Needs(True, m is not None))
    some = sums.counts.sum(0) > 0
    assert bool(sums.values[:, 3].sum().isnan())
    assert bool(sums.values.sum(0)[some].isnan().all()) == (m is None)
    assert found.anchors is not None
    assert bool(found.anchors[3].isnan().any())


def test_left_out_contrasts_may_hold_nan(backend):
    p = problem(18, 20, 5, "softplus", bias=True)
    assert p.contrasts is not None
    p.contrasts.values[1] = torch.nan
    check_sweep(replace(p, contrasts=p.contrasts._replace(values=p.contrasts.values.nan_to_num())))
    _, found = swept(p, torch.ones(2, 18), Needs(True, True, True, False, True))
    for name, gradient in zip(TARGETS, found, strict=True):
        if gradient is not None and name != "offset":
            assert bool(gradient.isfinite().all()), name
    assert found.contrasts is not None
    assert found.contrasts[1].abs().max() == 0


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, None)])
def test_empty_sets(backend, n, m):
    p = problem(n, m, 4, "softplus", bias=m is not None)
    needs = Needs(True, m is not None, True, False, m is not None)
    sums, found = swept(p, torch.ones(2, n), needs)
    assert sums.values.tolist() == torch.zeros(2, n).tolist()
    assert sums.counts.tolist() == torch.zeros(2, n).tolist()
    assert all(gradient is None or bool((gradient == 0).all()) for gradient in found)


def test_strides(backend):
    p = problem(16, 20, 6, "softplus")
    assert p.contrasts is not None
    wide = torch.randn(20, 12, generator=generator(2))
    p = replace(p, contrasts=p.contrasts._replace(values=wide[:, ::2]))
    check_sweep(p, torch.rand(16, 2, generator=generator(3)).T)


@pytest.mark.parametrize("m", [None, 300])
def test_results_repeat(backend, m):
    p = problem(250 if backend != "triton" else 40, m and (300 if backend != "triton" else 50), 5, "softplus")
    weights = torch.ones(2, p.sizes[0])
    needs = Needs(True, m is not None, True)

    def flat(found: tuple[Sums, Gradients]) -> list[list[float]]:
        return [part.tolist() for side in found for part in side if part is not None]

    assert flat(swept(p, weights, needs)) == flat(swept(p, weights, needs))
