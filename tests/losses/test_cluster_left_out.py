"""A contrast with a bias of -inf is left out: results are those of a call without it, whatever its row holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.backends import VARIANTS, running
from tests.support.emulated import on
from tests.support.oracle import cluster_infonce as formula
from tests.support.oracle import differentiate
from tests.support.stats_checks import check_stats, simple_problem

INF = torch.inf
OBSERVED = ("max_pos", "max_neg", "sum_neg", "entropy")
ALL = ("lse_all", "lse_pos", "lse_neg", "sum_pos", *OBSERVED)


EVERYWHERE = pytest.mark.parametrize("name", [*VARIANTS, "cuda"])


def some(m: int) -> Tensor:
    """The contrasts that take part, bool [m]."""
    return torch.arange(m) % 3 != 1


# Statistics

CALLS: dict[str, dict[str, Any]] = {
    "two sets, ids": {"n": 17, "m": 40},
    "no clusters, rows as they come": {"n": 21, "m": 50, "pattern": None, "ids": False, "normalize_contrasts": False},
    "low temperature, one way": {"m": 45, "ids": False, "both": False, "scales": (300.0, 1.0)},
    "pairs in many tiles": {"n": 40, "m": 70, "pattern": "pairs", "ids": False},
    "self-contrast": {"n": 43, "m": None, "bias": True},
    "bfloat16": {"n": 33, "m": 45, "dtype": torch.bfloat16, "contrast_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64, "contrast_dtype": torch.float64, "ids": False},
    "no contrast is left": {"m": 4},
}


@EVERYWHERE
@pytest.mark.parametrize("call", CALLS)
def test_statistics_are_the_formula(call, name) -> None:
    problem = simple_problem(**CALLS[call])
    arguments = problem.arguments()
    left = some(len(arguments["contrast_bias"])) & (call != "no contrast is left")
    arguments["contrast_bias"][~left] = -INF
    with on(name) if name == "cuda" else running(name):
        check_stats(arguments, problem.leaves, backends=(name,))


@EVERYWHERE
@pytest.mark.parametrize("ids", [False, True])
def test_as_a_call_without(ids, name) -> None:
    """All fields and gradients; rows that are left out hold NaN. In the other direction their sets are empty."""
    n, m = 19, 61
    problem = simple_problem(n=n, m=m, d=7, ids=ids, scales=(3.0, 40.0))
    arguments = problem.arguments() | {"want": ALL}
    left = some(m)
    without = {
        key: value[left] if key.startswith("contrast") and value is not None else value
        for key, value in arguments.items()
    }
    arguments["contrast_bias"] = torch.where(left, arguments["contrast_bias"], -INF)
    arguments["contrasts"] = torch.where(left[:, None], arguments["contrasts"], torch.nan)

    def evaluate(given: dict[str, Any], kept: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = [given[key].clone().requires_grad_() for key in ("anchors", "contrasts", "contrast_bias")]
        scale = given["logit_scale"].clone().requires_grad_()
        stats = fastcl.contrastive_stats(
            **(given | dict(zip(("anchors", "contrasts", "contrast_bias"), leaves, strict=True)))
            | {"logit_scale": scale}
        )
        fields = {key: getattr(stats, key) for key in (*ALL, "num_pos", "num_neg")}
        reverse = {key: getattr(stats.reverse, key)[..., kept] for key in (*ALL, "num_pos", "num_neg")}
        total = sum(
            torch.where(f.isfinite(), f, 0).sum() * k for k, f in enumerate((*fields.values(), *reverse.values()))
        )
        gradients = torch.autograd.grad(total, [*leaves, scale])
        empty = {key: getattr(stats.reverse, key)[..., ~kept] for key in (*ALL, "num_pos", "num_neg")}
        for key, field in empty.items():
            assert (field == (-INF if key[:3] in ("lse", "max") else 0)).all(), key
        assert not stats.reverse.valid[~kept].any()
        for gradient in gradients[1:3]:
            assert (gradient[~kept] == 0).all()
        pieces = [gradients[0], gradients[1][kept], gradients[2][kept], gradients[3]]
        return fields | {f"reverse {key}": field for key, field in reverse.items()}, pieces

    with on(name):
        found, gradients = evaluate(arguments, left)
        expected, true_gradients = evaluate(without, torch.ones(int(left.sum()), dtype=torch.bool))
    for key, field in found.items():
        torch.testing.assert_close(
            field, expected[key], rtol=2e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    for got, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


# Losses


def rows(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


X, Y, KEYS = rows(14), rows(23, seed=1), rows(14, seed=2)
CLUSTERS, OTHERS = torch.arange(14) % 5, torch.arange(23) % 6
BIAS = torch.where(some(23), rows(23, 1, seed=3)[:, 0], -INF)
LOSSES: dict[str, dict[str, Any]] = {
    "one node": {},
    "symmetric": {"symmetric": True},
    "inside": {"form": "inside", "symmetric": True},
    "negatives": {"denominator": "negatives", "weights": torch.arange(14.0)},
    "margin": {"margin": 0.2, "symmetric": True},
    "a positive of its own": {"positives": KEYS, "symmetric": True},
    "each": {"reduction": "none"},
}


@EVERYWHERE
@pytest.mark.parametrize("call", LOSSES)
def test_losses(call, name) -> None:
    options = {"contrasts": Y, "contrast_clusters": OTHERS, "contrast_bias": BIAS, "temperature": 0.3} | LOSSES[call]
    positives = "positives" in options
    leaves = ("embeddings", "contrasts", "contrast_bias", *["positives"] * positives)
    arguments = {"embeddings": X, "clusters": CLUSTERS, **options}

    def objective(found: dict[str, Tensor]) -> Tensor:
        return (found["loss"] * torch.arange(1, 1 + found["loss"].numel())).sum()

    def evaluate(function: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        found, gradients = differentiate(
            lambda **given: {"loss": function(**given)}, arguments, leaves, objective, dtype
        )
        return found["loss"], gradients

    truth, true_gradients = evaluate(formula, torch.float64)
    with on(name):
        loss, gradients = evaluate(cluster_infonce, torch.float32)
        seen, stats = cluster_infonce(X, CLUSTERS, **options, return_stats=True)
        without = {key: value[some(23)] if key.startswith("contrast") else value for key, value in options.items()}
        _, expected = cluster_infonce(X, CLUSTERS, **without, return_stats=True)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen, loss)
    for key, true in true_gradients.items():
        torch.testing.assert_close(gradients[key].double(), true, rtol=1e-4, atol=1e-5)
    assert (gradients["contrast_bias"][~some(23)] == 0).all()
    for side, other in ((stats, expected), (stats.reverse, expected.reverse)):
        if side is not None:
            torch.testing.assert_close(side[:4], other[:4], rtol=1e-5, atol=1e-6, equal_nan=True)


@EVERYWHERE
def test_self_contrast(name) -> None:
    """A row that is left out as a contrast is still an anchor."""
    z, bias = rows(11, seed=4), torch.where(some(11), 0.5, -INF)
    truth = formula(z.double(), torch.arange(11) % 4, contrast_bias=bias.double(), temperature=0.3, reduction="none")
    left, own = some(11), torch.arange(11)
    with on(name):
        got, stats = cluster_infonce(
            z, own % 4, contrast_bias=bias, temperature=0.3, reduction="none", return_stats=True
        )
        _, expected = cluster_infonce(
            z, own % 4, contrasts=z[left], contrast_clusters=(own % 4)[left], ids=own, contrast_ids=own[left],
            contrast_bias=bias[left], temperature=0.3, reduction="none", return_stats=True,
        )  # fmt: skip
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[:4], expected[:4], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_contrasts(name) -> None:
    queue = fastcl.MemoryQueue(12, 6, clusters=True)
    queue.enqueue(rows(12, seed=5), torch.arange(12) % 5)
    bias = torch.where(some(12 + 23), 0.1, -INF)
    left, others = some(12 + 23), torch.cat([torch.arange(12) % 5, OTHERS])
    kept = torch.cat([queue.embeddings, torch.nn.functional.normalize(Y, dim=1)])[left]
    with on(name):
        got = cluster_infonce(X, CLUSTERS, contrasts=[queue, Y], contrast_clusters=OTHERS, contrast_bias=bias)
        true = cluster_infonce(X, CLUSTERS, contrasts=kept, contrast_clusters=others[left], contrast_bias=bias[left])
    torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("self_contrast", [False, True])
def test_assignments(self_contrast, name) -> None:
    """Weights of contrasts that are left out are in no sum, and these contrasts get no gradient."""
    left, m = some(23), 23
    r, q = (torch.rand(n, 4, generator=torch.Generator().manual_seed(n)) for n in (14, m))
    bias = torch.where(left, 0.3, -INF)
    ids, other_ids = torch.arange(14), torch.arange(m) - 4
    if self_contrast:
        x, r, ids = Y, q, torch.arange(m)
        other_ids = ids
    else:
        x = X

    def evaluate(of: Tensor, hold: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, Y[of], r, q[of], bias[of])]
        given: dict[str, Any] = {"contrasts": leaves[1], "contrast_assignments": leaves[3]}
        given |= {"anchor_ids": ids, "contrast_ids": other_ids[of], "normalize_contrasts": True, "both": True}
        if self_contrast and hold:
            given = {}
        stats = fastcl.contrastive_stats(
            leaves[0], anchor_assignments=leaves[2], contrast_bias=leaves[4], normalize_anchors=True, **given
        )
        fields = [stats.lse_all, stats.sum_pos, stats.num_pos, stats.num_neg]
        total = (stats.lse_all - stats.sum_pos / stats.num_pos).sum()
        if not self_contrast:
            kept = left if hold else torch.ones(int(left.sum()), dtype=torch.bool)
            fields += [field[kept] for field in (stats.reverse.lse_all, stats.reverse.sum_pos, stats.reverse.num_pos)]
            total = total + (stats.reverse.lse_all - stats.reverse.sum_pos / stats.reverse.num_pos)[kept].sum()
            for field in (stats.reverse.sum_pos, stats.reverse.num_pos, stats.reverse.num_neg):
                assert (field[~kept] == 0).all()
        needed = [leaves[0], leaves[2], leaves[4]] if self_contrast else leaves
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        x_gradient, y_gradient, r_gradient, q_gradient, b_gradient = gradients
        if hold:
            assert (b_gradient[~left] == 0).all()
            b_gradient = b_gradient[left]
            if not self_contrast:
                assert (y_gradient[~left] == 0).all()
                assert (q_gradient[~left] == 0).all()
                y_gradient, q_gradient = y_gradient[left], q_gradient[left]
        elif self_contrast:  # self-contrast with a bias runs as two sets
            x_gradient = x_gradient.index_add(0, left.nonzero()[:, 0], y_gradient)
            r_gradient = r_gradient.index_add(0, left.nonzero()[:, 0], q_gradient)
        found = [x_gradient, r_gradient, b_gradient]
        assert len(needed) in (3, 5)
        return [*fields, *found] if self_contrast else [*fields, *found, y_gradient, q_gradient]

    with on(name):
        got, true = evaluate(torch.ones(m, dtype=torch.bool), True), evaluate(left, False)
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


# Large biases, and biases that are not valid


@EVERYWHERE
@pytest.mark.parametrize("bias", [-1e9, 1e9, torch.finfo(torch.float32).min])
def test_similarities_beside_a_large_bias(bias, name) -> None:
    """They are not computed as a logit minus its bias."""
    far = torch.zeros(23)
    far[[3, 20]] = bias
    unit = [torch.nn.functional.normalize(t.double(), dim=1) for t in (X, Y)]
    cosines, positive = unit[0] @ unit[1].T, CLUSTERS[:, None] == OTHERS
    positive[:, [3, 20]] = False  # times log2(e) their bias exceeds the range of float32
    others = torch.where(far == 0, OTHERS, -1)
    with on(name):
        _, stats = cluster_infonce(
            X, CLUSTERS, contrasts=Y, contrast_clusters=others, contrast_bias=far, symmetric=True, return_stats=True
        )
    for side, s, p in ((stats, cosines, positive), (stats.reverse, cosines.T, positive.T)):
        n = ~p
        there = p.any(1)
        expected = ((s * p).sum(1)[there] / p.sum(1)[there]).mean(), ((s * n).sum(1) / n.sum(1)).mean()
        torch.testing.assert_close(side.positive_similarity.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(side.negative_similarity.double(), expected[1], rtol=1e-5, atol=1e-6)


@EVERYWHERE
def test_a_finite_bias_is_never_left_out(name) -> None:
    """Not even if it overflows when it is multiplied by log2(e)."""
    bias = torch.zeros(23)
    bias[2] = torch.finfo(torch.float32).min
    with on(name):
        stats = fastcl.contrastive_stats(X, Y, CLUSTERS, OTHERS, contrast_bias=bias, both=True)
    positive = CLUSTERS[:, None] == OTHERS
    assert torch.equal(stats.num_pos, positive.sum(1).float())
    assert torch.equal(stats.num_neg, (~positive).sum(1).float())
    assert torch.equal(stats.reverse.num_pos, positive.sum(0).float())


@pytest.mark.parametrize("wrong", [torch.nan, INF, 1e300])
def test_what_is_no_bias(wrong) -> None:
    bias = torch.zeros(23, dtype=torch.float64)
    bias[5] = wrong
    for call in (
        lambda: cluster_infonce(X, CLUSTERS, contrasts=Y, contrast_bias=bias),
        lambda: cluster_infonce(X, assignments=torch.ones(14, 2), contrasts=Y, contrast_bias=bias),
        lambda: cluster_infonce(Y, OTHERS, contrast_bias=bias),
        lambda: fastcl.contrastive_stats(X, Y, contrast_bias=bias),
    ):
        with pytest.raises(ValueError, match=f"contrast_bias.*-inf.*{wrong}".replace("+", r"\+")):
            call()


@EVERYWHERE
@pytest.mark.parametrize("wrong", [torch.nan, INF])
def test_where_values_are_not_looked_at(wrong, name, monkeypatch) -> None:
    """As on a GPU or in a compiled graph, where values are not read."""
    monkeypatch.setattr("fastcl.checks.values_visible", lambda tensor: False)
    bias = torch.zeros(23)
    bias[5] = wrong
    with on(name):
        loss = cluster_infonce(X, CLUSTERS, contrasts=Y, contrast_clusters=OTHERS, contrast_bias=bias)
    assert loss.isnan() or loss == INF


def test_compiled() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        return cluster_infonce(x, CLUSTERS, contrasts=y, contrast_clusters=OTHERS, contrast_bias=bias, symmetric=True)

    assert torch.equal(
        loss(X, Y, BIAS),
        cluster_infonce(X, CLUSTERS, contrasts=Y, contrast_clusters=OTHERS, contrast_bias=BIAS, symmetric=True),
    )
    assert loss(X, Y, torch.where(some(23), BIAS, torch.nan)).isnan()
