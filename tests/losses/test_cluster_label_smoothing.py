"""Label smoothing of `ClusterInfoNCE` and its presets, and the sum over all contrasts that it uses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.functional import cluster_infonce
from tests.losses.test_cluster import check_loss
from tests.support.backends import VARIANTS, running
from tests.support.oracle import differentiate
from tests.support.strategies import generator, loss_problem

F64 = torch.float64


def cross_entropy(x: Tensor, y: Tensor, scale: float, smoothing: float) -> Tensor:
    """CLIP's loss of rows as given, computed by torch."""
    logits = scale * x @ y.T
    target = torch.arange(len(x))
    rows, columns = (nn.functional.cross_entropy(s, target, label_smoothing=smoothing) for s in (logits, logits.T))
    return (rows + columns) / 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_one_positive_is_cross_entropy_of_torch(variant, kind) -> None:
    g = generator(0)
    x = nn.functional.normalize(torch.randn(33, 12, generator=g, dtype=F64), dim=1)
    y = torch.randn(33, 12, generator=g, dtype=F64)
    y = nn.functional.normalize(y if kind == "random" else x + 1e-4 * y, dim=1)
    loss = fastcl.ClipLoss(label_smoothing=0.1)
    expected = differentiate(cross_entropy, {"x": x, "y": y, "scale": 20.0, "smoothing": 0.1}, ("x", "y"), lambda v: v)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 3e-6)):
        with running(variant):
            arguments = {"image_features": x.to(dtype), "text_features": y.to(dtype), "logit_scale": 20.0}
            value, gradients = differentiate(loss, arguments, ("image_features", "text_features"), lambda v: v)
        torch.testing.assert_close(value, expected[0].to(dtype), rtol=tolerance, atol=0)
        for found, wanted in zip(gradients.values(), expected[1].values(), strict=True):
            assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "negatives", "weights": True, "bias": True},
        {"pattern": None, "reduction": "none", "temperature": 0.5},
        {"contrasts": "paired", "m": 18, "symmetric": True, "ids": True, "bias": True, "positives": True},
        {"contrasts": "clustered", "m": 13, "views": 0, "ids": True, "normalize": False, "reduction": "sum"},
        {"pattern": None, "kind": "converged", "n": 64, "d": 32, "temperature": 0.05},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_formula(options, dtype) -> None:
    problem = loss_problem(label_smoothing=0.3, dtype=dtype, contrast_dtype=dtype, **options)
    check_loss(problem.arguments(), problem.leaves)


def test_contrasts_that_are_left_out() -> None:
    """They are in no mean, whatever their values; in self-contrast they still are anchors."""
    z = torch.randn(9, 5, generator=generator(1), dtype=F64)
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    bias = torch.zeros(9, dtype=F64)
    bias[[1, 5]] = -torch.inf
    kept = [0, 2, 3, 4, 6, 7, 8]
    options = {"temperature": 0.5, "label_smoothing": 0.2, "reduction": "none"}
    found = cluster_infonce(z, clusters, contrast_bias=bias, **options)
    torch.testing.assert_close(found[kept], cluster_infonce(z[kept], clusters[kept], **options))
    two = cluster_infonce(z, clusters, contrasts=z[kept], contrast_clusters=clusters[kept], **options)
    torch.testing.assert_close(found[[1, 5]], two[[1, 5]])
    y = z.clone()
    y[[1, 5]] = torch.nan
    leaves = {"z": z.requires_grad_(), "y": y.requires_grad_()}
    loss = cluster_infonce(leaves["z"], clusters, contrasts=leaves["y"], contrast_bias=bias, label_smoothing=0.2)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert (y.grad[[1, 5]] == 0).all()


def test_no_smoothing_changes_nothing(backend) -> None:
    z = torch.randn(9, 2, 5, generator=generator(2))
    assert torch.equal(cluster_infonce(z), cluster_infonce(z, label_smoothing=0.0))


def test_empty_sets() -> None:
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    loss = cluster_infonce(empty, label_smoothing=0.1)
    loss.backward()
    assert loss == 0
    stats = fastcl.contrastive_stats(torch.ones(3, 4), torch.ones(0, 4), want=["sum_all"], both=True)
    assert torch.equal(stats.sum_all, torch.zeros(3))
    assert not stats.valid.any()
    assert stats.reverse.sum_all.shape == (0,)


def test_refusals() -> None:
    z = torch.randn(4, 2, 3)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing: expected a"):
            fastcl.ClusterInfoNCE(label_smoothing=wrong)
    for options in ({"form": "inside"}, {"denominator": "negatives"}, {"margin": 0.1}):
        with pytest.raises(ValueError, match="label_smoothing: expected 0 unless form='outside'"):
            cluster_infonce(z, label_smoothing=0.1, **options)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0\.0 with assignments, got 0.1"):
        cluster_infonce(z[:, 0], assignments=torch.ones(4, 2), label_smoothing=0.1)
    with pytest.raises(TypeError, match=r"DCLLoss: expected options out of margin, .*; got 'label_smoothing'"):
        fastcl.DCLLoss(label_smoothing=0.1)


def test_presets_take_it() -> None:
    z = torch.randn(6, 2, 4, generator=generator(3))
    labels, expected = torch.arange(6) % 2, cluster_infonce(z, temperature=0.5, label_smoothing=0.2)
    assert torch.equal(fastcl.NTXentLoss(label_smoothing=0.2)(z[:, 0], z[:, 1]), expected)
    supcon = fastcl.SupConLoss(0.5, label_smoothing=0.2)(z, labels)
    assert torch.equal(supcon, cluster_infonce(z, labels, temperature=0.5, label_smoothing=0.2))
    queue = torch.randn(9, 4, generator=generator(4))
    found = fastcl.MoCoLoss(0.5, label_smoothing=0.2)(z[:, 0], z[:, 1], queue)
    x, y, q = (nn.functional.normalize(rows, dim=1) for rows in (z[:, 0], z[:, 1], queue))
    logits = torch.cat(((x * y).sum(1, keepdim=True), x @ q.T), 1) / 0.5
    target = torch.zeros(6, dtype=torch.int64)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, target, label_smoothing=0.2))


def test_module() -> None:
    loss = fastcl.ClusterInfoNCE(0.5, label_smoothing=0.2)
    assert "label_smoothing=0.2" in repr(loss)
    assert "label_smoothing" not in repr(fastcl.ClusterInfoNCE(0.5))
    z = torch.randn(6, 2, 4, generator=generator(5))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(z), loss(z))
    assert torch.equal(loss(z, return_stats=True)[0], loss(z))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z), cluster_infonce(z, temperature=0.5, label_smoothing=0.2))


def test_compiled_in_one_graph(backend) -> None:
    loss = fastcl.ClusterInfoNCE(0.5, label_smoothing=0.2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = torch.randn(6, 2, 4, generator=generator(6)).requires_grad_()
    found, expected = (torch.autograd.grad(function(z), z)[0] for function in (compiled, loss))
    torch.testing.assert_close(found, expected)


def test_second_derivatives_raise() -> None:
    z = torch.randn(6, 2, 4, generator=generator(7)).requires_grad_()
    (first,) = torch.autograd.grad(cluster_infonce(z, label_smoothing=0.2), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        first.sum().backward()
