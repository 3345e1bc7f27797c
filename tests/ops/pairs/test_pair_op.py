"""The operators of pair sums: registration, derivatives, compilation, memory, and the fields of contrastive_stats."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastcl
from fastcl.ops.contrastive.fields import PAIR_FIELDS
from fastcl.ops.pairs.op import pair_sums, pair_total
from fastcl.ops.pairs.records import SOURCES, Gradients, Pairs, flatten
from tests.ops.test_library import allocated
from tests.support.backends import BACKENDS
from tests.support.pair_sums import plain, problem
from tests.support.strategies import generator

OPS = torch.ops.fastcl


def small(kind: str, two: bool, dtype: torch.dtype = torch.float32) -> Pairs:
    return problem(7, 9 if two else None, 4, kind, ids=two, bias=two, offset="rows" if two else "all", dtype=dtype)


def arguments(p: Pairs, backend: str, grad: bool) -> list[Any]:
    given = list(flatten(p, backend))
    if grad:
        given[:SOURCES] = [None if part is None else part.clone().requires_grad_() for part in given[:SOURCES]]
    return given


@pytest.mark.parametrize("kind", ["softplus", "distance"])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(kind, two, grad, backend) -> None:
    given = arguments(small(kind, two), backend, grad)
    needs = [part is not None for part in given[:SOURCES]]
    weights = torch.rand(2, 7, generator=generator(1))
    torch.library.opcheck(OPS.pair_sums_fwd.default, tuple(given))
    torch.library.opcheck(OPS.pair_total_fwd.default, (*given, weights.requires_grad_(grad), needs))


@pytest.mark.parametrize("two", [False, True])
def test_opcheck_of_the_backward(two, backend) -> None:
    given = arguments(small("hinge", two, torch.bfloat16), backend, False)
    needs = [part is not None for part in given[:SOURCES]]
    weights = torch.rand(2, 7, generator=generator(1))
    torch.library.opcheck(OPS.pair_sums_bwd.default, (*given, weights, needs))
    _, values, _, _, *gradients = OPS.pair_total_fwd(*given, weights, needs)
    grad = torch.tensor(0.5)
    torch.library.opcheck(OPS.pair_total_bwd.default, (grad, values, gradients, *given[:SOURCES], [*needs, True]))


@pytest.mark.parametrize("two", [False, True])
def test_both_operators_have_the_same_gradient(two, backend) -> None:
    """Of a total, from one sweep, and of the rows' sums; and the weights' gradient, which is the sums."""
    p = small("softplus", two)
    weights = torch.rand(2, 7, generator=generator(1)).requires_grad_()
    names = [name for name, part in zip(Gradients._fields, flatten(p, ""), strict=False) if part is not None]
    leaves = [part for part in flatten(p, "")[:SOURCES] if part is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    with fastcl.use_backend(backend):
        found = pair_total(p, weights)
        sums = pair_sums(p)
    total = (weights * sums.values).sum()
    torch.testing.assert_close(found.total, total)
    assert not found.values.requires_grad
    right = torch.autograd.grad(total * 3, [*leaves, weights])
    for name, got, expected in zip(
        [*names, "weights"], torch.autograd.grad(found.total * 3, [*leaves, weights]), right, strict=True
    ):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_second_backward_gives_the_same_gradient() -> None:
    p = small("softplus", True)
    x = p.anchors.values.requires_grad_()
    total = pair_total(p, torch.ones(2, 7)).total
    first = torch.autograd.grad(total, x, retain_graph=True)[0].clone()
    again = torch.autograd.grad(total, x, retain_graph=True)[0]
    again.zero_()
    assert torch.equal(torch.autograd.grad(total, x)[0], first)


def test_transforms_of_functions_are_refused() -> None:
    p = small("softplus", False)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return pair_total(replace(p, anchors=p.anchors._replace(values=x)), torch.ones(2, 7)).total

    with pytest.raises(NotImplementedError, match=r"derivatives by torch\.func are not supported"):
        torch.func.grad(loss)(p.anchors.values)


def test_memory_is_linear() -> None:
    """Nothing as large as the logits is allocated, on any backend that need not store them."""
    n, d = 3000, 8
    x = torch.randn(n, d, generator=generator(0)).requires_grad_()
    y = torch.randn(n, d, generator=generator(1)).requires_grad_()

    for backend in BACKENDS:
        if backend in ("reference", "triton"):
            continue

        def run(backend: str = backend) -> None:
            with fastcl.use_backend(backend):
                fastcl.SigLipLoss()(x, y, 2.0, -3.0).backward()

        run()
        largest, _ = allocated(run)
        assert largest < n * n, backend  # a quarter of the float32 logits


# The fields of contrastive_stats.


@pytest.mark.parametrize("both", [False, True])
def test_fields(both, backend) -> None:
    p = problem(9, 11, 5, "hinge", ids=True, bias=True)
    assert p.contrasts is not None
    common = {
        "contrasts": p.contrasts.values, "anchor_clusters": p.anchors.clusters,
        "contrast_clusters": p.contrasts.clusters, "anchor_ids": p.anchors.ids, "contrast_ids": p.contrasts.ids,
        "normalize_anchors": True, "normalize_contrasts": True, "both": both,
    }  # fmt: skip
    logits = {"logit_scale": 3.7, "contrast_bias": p.contrasts.bias, "pos_margin": 0.7, "neg_margin": -0.2}
    wanted = ("softplus_pos", "softplus_neg", "hinge_pos", "hinge_neg", "lse_neg")
    found = fastcl.contrastive_stats(p.anchors.values, **common, **logits, want=wanted)
    one = torch.ones(2, 9)
    for kind in ("softplus", "hinge"):
        expected = plain(replace(p, kind=kind), one, torch.float64)
        for k, name in enumerate((f"{kind}_pos", f"{kind}_neg")):
            torch.testing.assert_close(getattr(found, name).double(), expected.values[k], rtol=1e-5, atol=1e-5)
    assert found.active_neg is not None
    assert found.active_neg.tolist() == expected.active[1].tolist()
    assert found.lse_neg is not None
    assert found.num_pos.tolist() == expected.counts[0].tolist()
    if both:
        assert found.reverse is not None
        assert found.reverse.hinge_pos is not None
        left_out = p.contrasts.bias == -torch.inf
        assert found.reverse.hinge_neg[left_out].abs().max() == 0
        torch.testing.assert_close(found.reverse.hinge_pos.sum(), found.hinge_pos.sum())
        torch.testing.assert_close(found.reverse.softplus_neg.sum(), found.softplus_neg.sum())


def test_fields_of_several_scales_and_alone() -> None:
    x, clusters = torch.randn(8, 4, generator=generator(0)), torch.arange(8) % 3
    scales = torch.tensor([1.0, 4.0])
    found = fastcl.contrastive_stats(x, anchor_clusters=clusters, logit_scale=scales, want=["softplus_neg"])
    assert found.softplus_neg is not None
    assert found.softplus_neg.shape == (2, 8)
    for k, scale in enumerate(scales):
        alone = fastcl.contrastive_stats(x, anchor_clusters=clusters, logit_scale=scale, want=["softplus_neg"])
        assert alone.softplus_neg is not None
        assert torch.equal(found.softplus_neg[k], alone.softplus_neg)
        assert torch.equal(alone.num_neg, found.num_neg)


def test_a_bias_in_self_contrast(backend) -> None:
    x, clusters = torch.randn(8, 4, generator=generator(0)), torch.arange(8) % 3
    bias = torch.randn(8, generator=generator(1))
    bias[2] = -torch.inf
    found = fastcl.contrastive_stats(x, anchor_clusters=clusters, contrast_bias=bias, want=["softplus_neg"])
    s = x @ x.T + bias.masked_fill(bias == -torch.inf, 0)
    members = (clusters[:, None] != clusters) & (bias != -torch.inf)
    expected = torch.where(members, torch.nn.functional.softplus(s), 0).sum(1)
    assert found.softplus_neg is not None
    torch.testing.assert_close(found.softplus_neg, expected)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"pos_margin": float("nan")}, ValueError, "pos_margin: expected a finite number"),
        ({"neg_margin": "one"}, TypeError, "neg_margin: expected a number"),
        ({"want": ["distance_pos"], "logit_scale": 2.0}, ValueError, "logit_scale: expected 1 for sums of distances"),
        ({"want": ["squared_neg"], "contrast_bias": torch.zeros(6)}, ValueError, "contrast_bias: expected None"),
        ({"want": ["softplus"]}, ValueError, "want: expected some of"),
    ],
)
def test_bad_input(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        fastcl.contrastive_stats(torch.randn(6, 3), anchor_clusters=torch.arange(6) % 2, **options)


def test_assignments_have_no_sums_over_pairs() -> None:
    with pytest.raises(ValueError, match="want: expected some of 'lse_all', 'sum_pos' with assignments"):
        fastcl.contrastive_stats(torch.randn(6, 3), anchor_assignments=torch.rand(6, 2), want=PAIR_FIELDS)
