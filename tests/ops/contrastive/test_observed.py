"""Observed statistics: against their formulas in float64, and the loss is the same as without them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.backends import QUICK, VARIANTS, needs_interpreter, running
from tests.support.oracle import TRUTH, Evaluation, eager_evaluations, op_masks, similarities
from tests.support.pairs import pairs
from tests.support.stats_checks import simple_problem
from tests.support.strategies import StatsProblem, stats_problems
from tests.support.tolerances import accumulation_dtype, check

OBSERVED = ("max_pos", "max_neg", "sum_neg", "entropy")


def formula(arguments: dict[str, Any], how: Evaluation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The statistics, and the size of the terms that cancel in them; with `both` also under "reverse." + name."""
    x = arguments["anchors"].to(how.dtype)
    other = arguments.get("contrasts")
    y = x if other is None else other.to(how.dtype)
    ids = (arguments.get(f"{side}_{kind}") for kind in ("clusters", "ids") for side in ("anchor", "contrast"))
    positive, negative = op_masks(len(x), None if other is None else len(y), *ids)
    normalize = (
        arguments["normalize_anchors"],
        arguments["normalize_anchors" if other is None else "normalize_contrasts"],
    )
    scale = torch.as_tensor(arguments["logit_scale"], dtype=how.dtype)
    found: dict[str, list[Tensor]] = {}
    sizes: dict[str, list[Tensor]] = {}
    for one_scale in scale.reshape(-1):
        s = similarities(x, y, one_scale, *normalize, how)
        if arguments.get("contrast_bias") is not None:
            s = s + arguments["contrast_bias"].to(how.dtype)
        for prefix, t, pos, neg in (("", s, positive, negative), ("reverse.", s.T, positive.T, negative.T)):
            if prefix and not arguments["both"]:
                continue
            entropy = []
            for row, members in zip(t, pos | neg, strict=True):
                p = row[members].softmax(0)
                entropy.append(-torch.special.xlogy(p, p).sum())
            padded = torch.nn.functional.pad(t, (0, 1), value=-torch.inf)
            largest = [
                padded.masked_fill(~torch.nn.functional.pad(of, (0, 1)), -torch.inf).amax(1) for of in (pos, neg)
            ]
            values = (*largest, torch.where(neg, t, 0).sum(1), torch.stack(entropy))
            size = torch.where(pos | neg, t.abs(), 0)
            size = (
                *2 * (torch.zeros(len(t)),),
                torch.where(neg, size, 0).sum(1),
                torch.nn.functional.pad(size, (0, 1)).amax(1),
            )
            for name, value, bound in zip(OBSERVED, values, size, strict=True):
                found.setdefault(prefix + name, []).append(value)
                sizes.setdefault(prefix + name, []).append(bound)
    stack = torch.stack if scale.dim() else lambda values: values[0]
    return {name: stack(v) for name, v in found.items()}, {name: stack(v) for name, v in sizes.items()}


def check_observed(problem: StatsProblem, backends: tuple[str, ...]) -> None:
    arguments = problem.arguments() | {"want": ("lse_all", *OBSERVED)}
    dtypes = [arguments[name].dtype for name in ("anchors", "contrasts") if arguments.get(name) is not None]
    accumulation = accumulation_dtype(*dtypes)
    truth, sizes = formula(arguments, TRUTH)
    draws = [formula(arguments, how)[0] for how in eager_evaluations(accumulation)]
    for backend in backends:
        with running(backend):
            got = fastcl.contrastive_stats(**arguments)
            alone = fastcl.contrastive_stats(**(arguments | {"want": ("lse_all",)}))
        assert torch.equal(got.lse_all, alone.lse_all)
        for name, value in truth.items():
            side = got.reverse if name.startswith("reverse.") else got
            field = getattr(side, name.removeprefix("reverse."))
            assert field.dtype == accumulation
            assert not field.requires_grad
            eager = [draw[name] for draw in draws]
            check(f"{backend} {name}", field, value, eager, accumulation=accumulation, magnitude=sizes[name])


@settings(max_examples=40)
@given(stats_problems())
def test_is_the_formula(problem: StatsProblem) -> None:
    check_observed(problem, QUICK)


@needs_interpreter
@settings(max_examples=8)
@given(stats_problems(interpreted=True))
def test_triton_is_the_formula(problem: StatsProblem) -> None:
    check_observed(problem, ("triton",))


@pytest.mark.parametrize("m", [None, 290])
def test_more_rows_than_a_block(m, backend) -> None:
    """Several threads, several blocks of rows, and logits far from 0, for which a shift of 0 would fail."""
    if backend == "triton":
        m = m and 70
    n = 67 if backend == "triton" else 431
    problem = simple_problem(n=n, m=m, d=19, bias=True, scales=(100.0, 1.0))
    arguments = problem.arguments()
    arguments["contrast_bias"] = arguments["contrast_bias"] + 300
    arguments["want"] = OBSERVED
    truth, _ = formula(arguments, TRUTH)
    got = fastcl.contrastive_stats(**arguments)
    for name, value in truth.items():
        side = got.reverse if name.startswith("reverse.") else got
        field = getattr(side, name.removeprefix("reverse.")).double()
        torch.testing.assert_close(field, value, rtol=1e-5, atol=2e-4)


# Statistics of a loss


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(-(-n // 2), d, generator=g, dtype=torch.float64).repeat_interleave(2, 0)[:n]
    return (centres + torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)


CLUSTERS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, -1, 4, 4, 5, 5])


def of_rows(logits: Tensor, cosines: Tensor, positive: Tensor, negative: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The values of each row, and which rows have them."""
    largest = [logits.masked_fill(~of, -torch.inf).amax(1) for of in (positive, negative)]
    p = logits.masked_fill(~(positive | negative), -torch.inf).softmax(1)
    return {
        "top1": ((largest[0] > largest[1]).double(), positive.any(1)),
        "positive_similarity": ((cosines * positive).sum(1) / positive.sum(1), positive.any(1)),
        "negative_similarity": ((cosines * negative).sum(1) / negative.sum(1), negative.any(1)),
        "entropy": (-torch.special.xlogy(p, p).sum(1), (positive | negative).any(1)),
    }


def check_summary(stats: fastcl.LossStats, expected: dict[str, tuple[Tensor, Tensor]], each: bool = False) -> None:
    for name, (values, there) in expected.items():
        got = getattr(stats, name)
        assert not got.requires_grad
        if each:
            assert torch.equal(got.isnan(), ~there)
            torch.testing.assert_close(got[there].double(), values[there], rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(got.double(), values[there].mean(), rtol=1e-5, atol=1e-5)


LOSSES = (
    fastcl.ClusterInfoNCE(0.3),
    fastcl.ClusterInfoNCE(0.3, form="inside", margin=0.1),
    fastcl.ClusterInfoNCE(0.3, denominator="negatives"),
    fastcl.HardNegativeLoss(0.3),
    fastcl.DebiasedLoss(0.3),
)


@pairs(loss=LOSSES, backend=VARIANTS, dtype=[torch.float64, torch.float32, torch.bfloat16])
def test_of_self_contrast(loss, dtype, backend) -> None:
    """Loss and gradient are also the same to the bit with and without `return_stats`."""
    x = rows(13, 7, dtype=dtype).requires_grad_()
    value, stats = loss(x, CLUSTERS, return_stats=True)
    alone = loss(x, CLUSTERS)
    assert torch.equal(value, alone)
    assert torch.equal(*(torch.autograd.grad(of, x)[0] for of in (value, alone)))
    unit = torch.nn.functional.normalize(x.detach().double(), dim=1)
    positive, negative = op_masks(13, None, CLUSTERS, None, None, None)
    check_summary(stats, of_rows(unit @ unit.T / 0.3, unit @ unit.T, positive, negative))
    assert stats.reverse is None


@pairs(backend=VARIANTS, symmetric=[False, True], reduction=["mean", "none"], bias=[False, True])
def test_of_two_sets(symmetric, reduction, bias, backend) -> None:
    """Similarities are those of the rows, whatever is added to the logits."""
    x, y = rows(13, 7, 1), rows(13, 7, 2)
    added = torch.linspace(-3, 3, 13) if bias else None
    ids = torch.tensor([0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 10, 11, 12]), torch.arange(13) * 2
    options = {"contrast_clusters": CLUSTERS.flip(0), "contrast_bias": added, "ids": ids[0], "contrast_ids": ids[1]}
    loss = fastcl.ClusterInfoNCE(0.3, symmetric=symmetric, reduction=reduction)
    value, stats = loss(x, CLUSTERS, contrasts=y, return_stats=True, **options)
    assert torch.equal(value, loss(x, CLUSTERS, contrasts=y, **options))
    cosines = torch.nn.functional.normalize(x.double(), dim=1) @ torch.nn.functional.normalize(y.double(), dim=1).T
    logits = cosines / 0.3 + (0 if added is None else added.double())
    positive, negative = op_masks(13, 13, CLUSTERS, CLUSTERS.flip(0), *ids)
    check_summary(stats, of_rows(logits, cosines, positive, negative), reduction == "none")
    if symmetric:
        check_summary(stats.reverse, of_rows(logits.T, cosines.T, positive.T, negative.T), reduction == "none")
    else:
        assert stats.reverse is None


def test_of_an_extra_positive_and_a_queue(backend) -> None:
    query, key, queue = rows(6, 5, 3), rows(6, 5, 4), torch.nn.functional.normalize(rows(9, 5, 5), dim=1)
    query.requires_grad_()
    loss = fastcl.MoCoLoss(0.2)
    value, stats = loss(query, key, queue, return_stats=True)
    alone = loss(query, key, queue)
    assert torch.equal(value, alone)
    assert torch.equal(*(torch.autograd.grad(of, query)[0] for of in (value, alone)))
    q, k = (torch.nn.functional.normalize(t.detach().double(), dim=1) for t in (query, key))
    cosines = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.double().T], 1)
    first = torch.zeros_like(cosines, dtype=torch.bool)
    first[:, 0] = True
    check_summary(stats, of_rows(cosines / 0.2, cosines, first, ~first))


def test_of_the_presets(backend) -> None:
    z0, labels = rows(6, 4, 1), torch.arange(6) // 2
    z1 = z0 + 0.1 * rows(6, 4, 2)
    for loss, inputs in (
        (fastcl.NTXentLoss(), (z0, z1)),
        (fastcl.DCLLoss(), (z0, z1)),
        (fastcl.SupConLoss(), (torch.stack((z0, z1), 1), labels)),
        (fastcl.ClipLoss(), (z0, z1, 3.0)),
    ):
        value, stats = loss(*inputs, return_stats=True)
        assert torch.equal(value, loss(*inputs))
        assert 0 <= stats.top1 <= 1
        assert stats.negative_similarity < stats.positive_similarity
    outputs, stats = fastcl.ClipLoss()(z0, z1, 3.0, output_dict=True, return_stats=True)
    assert set(outputs) == {"contrastive_loss"}
    assert stats.reverse is not None


def test_views_keep_their_shape_and_weights_do_not_enter() -> None:
    z = rows(12, 4).view(6, 2, 4)
    each = cluster_infonce(z, reduction="none", return_stats=True, weights=torch.arange(6.0))[1]
    assert each.top1.shape == each.entropy.shape == (6, 2)
    torch.testing.assert_close(each.entropy.mean(), cluster_infonce(z, return_stats=True)[1].entropy)


def test_collapsed_rows_are_not_accurate() -> None:
    """All contrasts are equally near: the positive does not win by coming first."""
    stats = cluster_infonce(torch.ones(5, 2, 3), return_stats=True)[1]
    assert stats.top1 == 0
    torch.testing.assert_close(stats.entropy, torch.tensor(9.0).log())
    torch.testing.assert_close(stats.negative_similarity, torch.tensor(1.0))


def test_nothing_to_look_at(backend) -> None:
    x = rows(3, 4).requires_grad_()
    loss, stats = cluster_infonce(x, torch.arange(3), return_stats=True)
    assert loss == 0
    assert stats.top1.isnan() and stats.positive_similarity.isnan()  # noqa: PT018
    assert stats.negative_similarity.isfinite() and stats.entropy.isfinite()  # noqa: PT018
    empty = cluster_infonce(x, contrasts=x[:0], contrast_clusters=torch.arange(0), return_stats=True)[1]
    assert all(value.isnan() for value in empty[:4])
    alone = cluster_infonce(x[:1], torch.arange(1), return_stats=True)[1]
    assert all(value.isnan() for value in alone[:4])


def test_compiles() -> None:
    x = rows(13, 7).requires_grad_()
    loss = fastcl.ClusterInfoNCE(0.2)
    compiled = torch.compile(lambda x: loss(x, CLUSTERS, return_stats=True), fullgraph=True, backend="aot_eager")
    (value, stats), (expected, looked_at) = compiled(x), loss(x, CLUSTERS, return_stats=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(stats[:4], looked_at[:4])
    assert not any(each.requires_grad for each in stats[:4])
    torch.testing.assert_close(*(torch.autograd.grad(of, x)[0] for of in (value, expected)))


def test_errors() -> None:
    with pytest.raises(TypeError, match="return_stats"):
        cluster_infonce(rows(4, 3), torch.zeros(4, dtype=torch.long), return_stats="yes")
    with pytest.raises(ValueError, match="return_stats: expected False with assignments"):
        cluster_infonce(rows(4, 3), assignments=torch.ones(4, 2), return_stats=True)
    with pytest.raises(ValueError, match="max_pos"):
        fastcl.contrastive_stats(rows(4, 3), want=("largest",))
