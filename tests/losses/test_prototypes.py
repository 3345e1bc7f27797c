"""SwAV, MSN and PMSN against the papers' formulas in float64, and against lightly where the two agree."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from tests.support.backends import QUICK
from tests.support.pairs import pairs
from tests.support.sinkhorn_oracle import log_domain, swav_loop
from tests.support.strategies import generator


def cosines(n: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = generator(seed)
    rows, prototypes = (F.normalize(torch.randn(size, 8, dtype=torch.float64, generator=g), dim=1) for size in (n, k))
    return (rows @ prototypes.T).to(dtype)


def swav(high: list[Tensor], low: list[Tensor], queue: list[Tensor] | None, prior: Tensor | None) -> Tensor:
    """As in the paper, with temperature 0.1, epsilon 0.05 and three iterations."""
    crops, terms = [*high, *low], []
    for h, crop in enumerate(high):
        rows = crop if queue is None else torch.cat([crop, queue[h]])
        if prior is None:
            target = swav_loop(rows.detach(), 0.05, 3)
        else:
            target = log_domain(rows.detach(), 0.05, prior, torch.ones(len(rows), dtype=rows.dtype), 3).assignments
        terms += [
            -(target[: len(crop)] * (other / 0.1).log_softmax(1)).sum(1).mean()
            for c, other in enumerate(crops)
            if c != h
        ]
    return torch.stack(terms).mean()


@pairs(backend=QUICK, with_queue=[False, True], with_prior=[False, True], low=[0, 3])
def test_swav_is_the_papers(backend: str, with_queue: bool, with_prior: bool, low: int) -> None:
    crops = [cosines(13, 6, seed).requires_grad_() for seed in range(2 + low)]
    queue = [cosines(9, 6, 50 + seed) for seed in range(2)] if with_queue else None
    prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1, 0.0], dtype=torch.float64) if with_prior else None
    got = fastcl.SwAVLoss(0.1, prior=prior)(crops[:2], crops[2:], queue)
    expected = swav(crops[:2], crops[2:], queue, prior)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(got, crops), torch.autograd.grad(expected, crops), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def msn(anchors: Tensor, targets: Tensor, prototypes: Tensor, prior: Tensor, n_iters: int, kl: str) -> Tensor:
    """As in the paper and its code, temperature 0.1 and sharpening 0.25; the prior is used in Sinkhorn too."""

    def probabilities(rows: Tensor) -> Tensor:
        return (F.normalize(rows, dim=1) @ F.normalize(prototypes, dim=1).T / 0.1).softmax(1)

    p = probabilities(anchors)
    with torch.no_grad():
        q = probabilities(targets) ** 4
        q = q / q.sum(1, keepdim=True)
        if n_iters:
            q = log_domain(q.log(), 1.0, prior, torch.ones(len(q), dtype=q.dtype), n_iters).assignments
    cross_entropy = -(q.repeat(len(p) // len(q), 1) * p.log()).sum(1).mean()
    mean, prior = p.mean(0), prior / prior.sum()
    if kl == "mean_prior":
        return cross_entropy + (mean * (mean / prior).log()).sum()
    return cross_entropy + (prior * (prior / mean).log()).sum()


@pairs(backend=QUICK, kind=["msn", "pmsn", "counts"], n_iters=[0, 1, 3], kl=["mean_prior", "prior_mean"])
def test_msn_is_the_papers(backend: str, kind: str, kl: str, n_iters: int) -> None:
    g = generator(0)
    anchors, targets, prototypes = (
        torch.randn(n, 8, dtype=torch.float64, generator=g).requires_grad_() for n in (22, 11, 7)
    )
    power = torch.arange(1, 8, dtype=torch.float64) ** -0.25
    if kind == "msn":
        loss, prior = fastcl.MSNLoss(n_iters=n_iters, kl=kl), torch.ones(7, dtype=torch.float64)
    elif kind == "pmsn":
        loss, prior = fastcl.PMSNLoss(n_iters=n_iters, kl=kl), power
    else:
        prior = torch.tensor([9, 4, 4, 1, 1, 1, 1], dtype=torch.float64)
        loss = fastcl.MSNLoss(prior=fastcl.prior_from_counts(prior), n_iters=n_iters, kl=kl)
    got, expected = loss(anchors, targets, prototypes), msn(anchors, targets, prototypes, prior, n_iters, kl)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    leaves = (anchors, prototypes)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    got = loss(anchors, targets, prototypes)
    assert torch.autograd.grad(got, targets, allow_unused=True) == (None,)


def test_uniform_regulariser_is_the_mean_entropy(backend: str) -> None:
    g = generator(1)
    anchors, prototypes = torch.randn(16, 8, generator=g), torch.randn(5, 8, generator=g)
    with_it, without = (fastcl.MSNLoss(prior_weight=w)(anchors, anchors, prototypes) for w in (1.0, 0.0))
    mean = (F.normalize(anchors, dim=1) @ F.normalize(prototypes, dim=1).T / 0.1).softmax(1).mean(0)
    torch.testing.assert_close(with_it - without, math.log(5) + (mean * mean.log()).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_give_a_float32_loss(backend: str, dtype: torch.dtype) -> None:
    crops = [cosines(16, 6, seed, dtype).requires_grad_() for seed in range(3)]
    loss = fastcl.SwAVLoss()(crops[:2], crops[2:])
    exact = swav([c.double() for c in crops[:2]], [crops[2].double()], None, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.01, atol=0)  # the assignments are rounded to the dtype
    rows, prototypes = (torch.randn(n, 8, generator=generator(n)).to(dtype).requires_grad_() for n in (16, 6))
    msn_loss = fastcl.PMSNLoss()(rows, rows.detach(), prototypes)
    assert msn_loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(msn_loss, prototypes)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_a_prototype_without_mass_is_no_target(backend: str) -> None:
    prior = torch.tensor([0.5, 0.5, 0.0])
    rows, prototypes = torch.randn(8, 4, generator=generator(0)), torch.randn(3, 4, generator=generator(1))
    loss = fastcl.MSNLoss(prior=prior)
    assert (loss.assignments(rows, prototypes)[:, 2] == 0).all()
    for kl in ("mean_prior", "prior_mean"):
        leaf = prototypes.clone().requires_grad_()
        value = fastcl.MSNLoss(prior=prior, kl=kl)(rows, rows, leaf)
        value.backward()
        assert value.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_a_prior_moves_with_its_loss_and_is_no_state() -> None:
    loss = fastcl.MSNLoss(prior=fastcl.power_law_prior(5))
    assert not loss.state_dict()
    assert loss.to("meta").prior.masses.is_meta


def test_under_torch_compile() -> None:
    crops = [cosines(16, 6, seed, torch.float32) for seed in range(3)]
    rows, prototypes = torch.randn(16, 8), torch.randn(6, 8)
    swav_loss, pmsn_loss = fastcl.SwAVLoss(), fastcl.PMSNLoss()

    def both(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return swav_loss([a, b], [c]) + pmsn_loss(rows, rows, prototypes)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(*crops), both(*crops))


def test_lightly_agrees_where_it_follows_the_papers() -> None:
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    crops = [cosines(16, 6, seed, torch.float32) for seed in range(4)]
    queue = [cosines(8, 6, 9, torch.float32), cosines(8, 6, 10, torch.float32)]
    ours = fastcl.SwAVLoss()(crops[:2], crops[2:], queue)
    torch.testing.assert_close(ours, lightly.SwaVLoss()(crops[:2], crops[2:], queue).squeeze())
    g = generator(3)
    anchors, targets, prototypes = (torch.randn(n, 8, generator=g) for n in (32, 16, 6))
    torch.testing.assert_close(
        fastcl.MSNLoss()(anchors, targets, prototypes), lightly.MSNLoss()(anchors, targets, prototypes)
    )
    # With a power law lightly's Sinkhorn stays uniform, and its KL is "prior_mean": without Sinkhorn they agree.
    theirs = lightly.PMSNLoss(sinkhorn_iterations=0)(anchors, targets, prototypes)
    ours = fastcl.PMSNLoss(n_iters=0, kl="prior_mean")(anchors, targets, prototypes)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        fastcl.MSNLoss(n_iters=3, prior_weight=0)(anchors, targets, prototypes),
        lightly.PMSNLoss(sinkhorn_iterations=3, regularization_weight=0)(anchors, targets, prototypes),
    )


SCORES, ROWS = torch.zeros(4, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.SwAVLoss(temperature=0), ValueError, "temperature: expected a positive number"),
        (lambda: fastcl.SwAVLoss(temperature=torch.ones(1)), TypeError, "temperature: expected a number"),
        (lambda: fastcl.SwAVLoss(epsilon=-1), ValueError, "epsilon: expected a positive number"),
        (lambda: fastcl.SwAVLoss(n_iters=-1), ValueError, "n_iters: expected at least"),
        (lambda: fastcl.SwAVLoss(gather=1), TypeError, "gather: expected True or False"),
        (lambda: fastcl.SwAVLoss(prior=3), TypeError, "prior: expected a tensor, a function or None"),
        (lambda: fastcl.SwAVLoss()(SCORES), TypeError, "high_resolution: expected a list of tensors"),
        (lambda: fastcl.SwAVLoss()([SCORES]), ValueError, "high_resolution: expected at least one crop"),
        (lambda: fastcl.SwAVLoss()([SCORES, SCORES[:2]]), ValueError, r"high_resolution\[1\]: expected shape \[4, 3\]"),
        (lambda: fastcl.SwAVLoss()([SCORES], [SCORES], []), ValueError, "queue_scores: expected scores for each of 1"),
        (
            lambda: fastcl.SwAVLoss(prior=torch.ones(2))([SCORES, SCORES]),
            ValueError,
            r"prior: expected a tensor of shape \[3\]",
        ),
        (lambda: fastcl.MSNLoss(kl="both"), ValueError, "kl: expected one of 'mean_prior', 'prior_mean'"),
        (lambda: fastcl.MSNLoss(prior_weight=-1), ValueError, "prior_weight: expected a number >= 0"),
        (lambda: fastcl.MSNLoss(n_iters=True), TypeError, "n_iters: expected an integer"),
        (lambda: fastcl.MSNLoss()(ROWS, ROWS[:3], ROWS), ValueError, "anchors: expected a multiple of the 3 targets"),
        (lambda: fastcl.MSNLoss()(ROWS, ROWS, ROWS[:, :1]), ValueError, "prototypes: expected rows of dimension 2"),
        (lambda: fastcl.MSNLoss()(ROWS, ROWS, ROWS[:0]), ValueError, "prototypes: expected at least one"),
        (
            lambda: fastcl.MSNLoss(prior=-torch.ones(4))(ROWS, ROWS, ROWS),
            ValueError,
            "prior: expected non-negative finite numbers",
        ),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_predictions_that_underflow_leave_a_gradient() -> None:
    torch.manual_seed(1)
    anchors = (torch.randn(64, 8) * 0.3 + 1).requires_grad_()
    prototypes = torch.randn(256, 8).requires_grad_()
    loss = fastcl.MSNLoss(0.01)(anchors, torch.randn(32, 8) * 0.3 + 1, prototypes)
    for gradient in torch.autograd.grad(loss, (anchors, prototypes)):
        assert gradient.isfinite().all()


def test_a_prior_is_moved_but_not_rounded() -> None:
    masses = torch.rand(1000) ** 8 * 1e-4
    loss = fastcl.MSNLoss(prior=masses).half()
    assert torch.equal(loss.prior.masses, masses)
    assert torch.equal(copy.deepcopy(loss).bfloat16().prior.masses, masses)
    assert loss.double().prior.masses.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_priors_do_not_follow_the_default_dtype(dtype: torch.dtype) -> None:
    made = [make(7) for make in (fastcl.uniform_prior, fastcl.power_law_prior)]
    counts = fastcl.prior_from_counts(torch.arange(1, 8))
    torch.set_default_dtype(dtype)
    try:
        again = [make(7) for make in (fastcl.uniform_prior, fastcl.power_law_prior)]
        again.append(fastcl.prior_from_counts(torch.arange(1, 8)))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(again, [*made, counts], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_no_rows_beside_a_queue() -> None:
    scores = torch.randn(0, 5, requires_grad=True)
    loss = fastcl.SwAVLoss()([scores, scores], queue_scores=[torch.randn(4, 5)] * 2)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_get_no_gradient(dtype: torch.dtype) -> None:
    """Similarity 0 and gradient 0, of anchors, targets and prototypes."""
    anchors, targets, prototypes = (
        torch.randn(n, 8, generator=generator(n), dtype=torch.float64).to(dtype) for n in (12, 6, 5)
    )
    anchors[2] = targets[3] = prototypes[1] = 0
    leaves = anchors.requires_grad_(), prototypes.requires_grad_()
    loss = fastcl.MSNLoss(prior_weight=0.5)(anchors, targets, prototypes)
    of_anchors, of_prototypes = torch.autograd.grad(loss, leaves)
    assert not of_anchors[2].any()
    assert not of_prototypes[1].any()
    wide = [t.detach().double() for t in (anchors, targets, prototypes)]
    tiny = torch.tensor(1e-300, dtype=torch.float64)  # far below the floor of the norm: cosines are 0 up to rounding
    expected = fastcl.MSNLoss(prior_weight=0.5)(*(torch.where(t == 0, tiny, t) for t in wide))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient in (of_anchors, of_prototypes):
        assert gradient.abs().max() < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_targets_of_half_precision_scores_are_not_rounded(dtype: torch.dtype) -> None:
    scores = [(torch.randn(200, 40, generator=generator(seed)) * 0.3).to(dtype) for seed in (0, 1)]
    loss = fastcl.SwAVLoss()
    assert loss.assignments(scores[0]).dtype == torch.float32
    assert (loss.assignments(scores[0]).sum(1) - 1).abs().max() < 1e-6
    expected = fastcl.SwAVLoss()([one.double() for one in scores])
    torch.testing.assert_close(loss(scores).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("queue", [False, True])
def test_swav_without_iterations_takes_a_softmax(queue: bool) -> None:
    scores = [torch.randn(30, 7, generator=generator(seed), dtype=torch.float64) for seed in (0, 1)]
    stored = [torch.randn(9, 7, generator=generator(seed), dtype=torch.float64) for seed in (2, 3)] if queue else None
    loss = fastcl.SwAVLoss(0.2, epsilon=0.1, n_iters=0)
    terms = [-((scores[h] / 0.1).softmax(1) * (scores[1 - h] / 0.2).log_softmax(1)).sum(1).mean() for h in range(2)]
    torch.testing.assert_close(loss(scores, queue_scores=stored), (terms[0] + terms[1]) / 2)
    with pytest.raises(ValueError, match=r"prior: expected a tensor of shape \[7\]"):
        fastcl.SwAVLoss(n_iters=0, prior=torch.ones(3))(scores)
