"""Sums over pairs on `triton`, interpreted, and on `cuda`, emulated: what is special about their kernels."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastcl.ops.backends import choose
from fastcl.ops.contrastive.records import Rows
from fastcl.ops.pair_maps import KINDS
from fastcl.ops.pairs.op import sweep
from fastcl.ops.pairs.records import Needs, Pairs
from tests.support.backends import INTERPRETED
from tests.support.emulated import on
from tests.support.pair_sums import check_sweep, plain, problem
from tests.support.tolerances import check

CALLS = [(name, kind) for name in (*INTERPRETED, "cuda") for kind, of in KINDS.items() if name != "cuda" or not of[1]]
ALL = Needs(True, True, True, True, True)


@pytest.fixture(params=CALLS, ids="-".join)
def call(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with on(request.param[0]):
        yield request.param


CASES = {
    "self-contrast": {"n": 37, "m": None},
    "self-contrast, offsets of rows": {"n": 70, "m": None, "offset": "rows"},
    "self-contrast, one offset": {"n": 17, "m": None, "offset": "all"},
    "two sets": {"n": 30, "m": 71, "offset": "rows"},
    "two sets, ids and bias": {"n": 67, "m": 40, "ids": True, "bias": True, "offset": "all"},
    "no clusters, bias": {"n": 20, "m": 70, "clusters": None, "bias": True},
    "only positives": {"n": 70, "m": 67, "ids": True, "only_positives": True},
    "rows as they come": {"n": 37, "m": 20, "normalize": False},
    "many columns": {"n": 5, "m": 140, "clusters": 2},
    "near pairs": {"n": 40, "m": 31, "near": 1e-4, "clusters": 3},
    "near pairs as they come": {"n": 40, "m": None, "near": 1e-4, "clusters": 3, "normalize": False},
}


@pytest.mark.parametrize("case", CASES)
def test_sweep_agrees_with_the_formula(call, case):
    name, kind = call
    check_sweep(problem(**({"d": 9} | CASES[case]), kind=kind), backend=name)


@pytest.mark.parametrize("case", ["self-contrast", "two sets, ids and bias", "near pairs as they come"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sweep_of_half_precision_rows(call, case, dtype):
    name, kind = call
    check_sweep(problem(**({"d": 9} | CASES[case]), kind=kind, dtype=dtype), backend=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_are_cut(call, dtype):
    """The gradient's columns belong to several programs, each of which forms the logits."""
    name, kind = call
    d = 600 if name == "cuda" else 140
    check_sweep(problem(6, 5, d, kind, dtype=dtype, clusters=2), backend=name)


def saturated(dtype: torch.dtype, m: int | None) -> tuple[Pairs, torch.Tensor]:
    """All slopes are near exp(-20): positives have logits near 20, negatives near -20."""
    g = torch.Generator().manual_seed(3)
    centres = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    clusters = torch.arange(30) % 3
    values = (centres[clusters] + 0.01 * torch.randn(30, 8, generator=g)).to(dtype)
    anchors = Rows(values, clusters, normalize=True)
    contrasts = None if m is None else Rows(values.flip(0)[:m], clusters.flip(0)[:m], normalize=True)
    scale, offset = torch.tensor(40.0), torch.tensor(-20.0)
    return Pairs(anchors, contrasts, scale, offset, "softplus"), torch.full((2, 30), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [None, 20])
@pytest.mark.parametrize("name", [*INTERPRETED, "cuda"])
def test_small_slopes_keep_their_digits(name, dtype, m):
    """float16 would flush them: 2e-9 is below its range."""
    p, weights = saturated(dtype, m)
    with on(name):
        check_sweep(p, weights, backend=name)


@pytest.mark.parametrize("name", [*INTERPRETED, "cuda"])
@pytest.mark.parametrize("kind", ["softplus", "hinge"])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits(name, kind, scale):
    p = replace(problem(20, 31, 8, kind), logit_scale=torch.tensor(scale))
    weights = torch.ones(2, 20)
    truth, eager = (plain(p, weights, dtype) for dtype in (torch.float64, torch.float32))
    with on(name):
        sums, found = sweep(p, name, weights, Needs(True, True, True))
    check("values", sums.values, truth.values, [eager.values])
    for got, right, drawn in zip(found[:3], truth.gradients, eager.gradients, strict=False):
        assert got is not None
        assert right is not None
        assert drawn is not None
        check("gradient", got, right, [drawn])


def test_rows_of_nan_give_nan(call):
    name, kind = call
    p = problem(9, 11, 8, kind)
    p.others.values[3, 2] = torch.nan
    sums, found = sweep(p, name, torch.ones(2, 9), ALL)
    assert sums.values.sum(0).isnan().all()
    assert found.anchors is not None
    assert found.anchors.isnan().any(1).sum() >= (1 if kind != "softplus" else 9)


def test_contrasts_left_out_may_hold_anything(call):
    name, kind = call
    p = problem(9, 11, 8, kind, bias=True)
    assert p.bias is not None
    assert p.bias[1] == -torch.inf
    weights = torch.ones(2, 9)
    expected = sweep(p, name, weights, ALL)
    p.others.values[1] = torch.nan
    found = sweep(p, name, weights, ALL)
    for one, other in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_bits_do_not_change_from_run_to_run(call):
    name, kind = call
    p = problem(20, 67, 9, kind)
    weights = torch.rand(2, 20, generator=torch.Generator().manual_seed(1))
    first, second = (sweep(p, name, weights, ALL) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_without_weights_there_are_sums_only(call):
    name, kind = call
    p = problem(20, 37, 9, kind)
    sums, found = sweep(p, backend=name)
    full, _ = sweep(p, name, torch.ones(2, 20), ALL)
    assert all(gradient is None for gradient in found)
    for one, other in zip(sums, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", range(len(Needs._fields)))
def test_each_gradient_alone(call, k):
    name, kind = call
    p = problem(20, 41, 9, kind, bias=True, offset="rows")
    weights = torch.ones(2, 20)
    _, full = sweep(p, name, weights, ALL)
    needs = Needs(*(place == k for place in range(len(Needs._fields))))
    _, found = sweep(p, name, weights, needs)
    for place, (one, other) in enumerate(zip(found, full, strict=True)):
        assert (one is None) == (place != k or other is None)
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_distances_have_no_kernels_of_cuda():
    for name in ("triton", "cuda"):
        assert choose.computes(name, torch.float32, "pair_sums")
    assert choose.computes("triton", torch.float32, "pair_distances")
    assert not choose.computes("cuda", torch.float32, "pair_distances")
