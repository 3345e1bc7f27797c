"""lightly: the example trains as with its own losses; what docs/migration.md says of it."""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl
from tests.support.integrations import example, package, same_training

loss = package("lightly.loss")
knn = package("lightly.utils.benchmarking.knn")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def drawn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def agree(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    results = [(v.detach(), *torch.autograd.grad(v, leaves, allow_unused=True)) for v in (found, expected)]
    torch.testing.assert_close(*results)


def test_the_tutorial_trains_alike() -> None:
    main = example("with_lightly").main
    same_training(main(4), main(4, loss.NTXentLoss(0.1)), 1e-4)


def test_a_queue_is_their_memory_bank_once_it_is_full() -> None:
    theirs, queue = (
        loss.NTXentLoss(0.1, memory_bank_size=(16, 6)).double(),
        fastcl.MemoryQueue(16, 6, dtype=torch.float64),
    )
    for step in range(4):
        query, key = drawn(8, 6, seed=step), drawn(8, 6, seed=step + 9).detach()
        expected = theirs(query, key)
        found = fastcl.MoCoLoss(0.1)(query, key, queue)
        queue.enqueue(key)
        if step >= 2:
            agree(found, expected, [query])
    trained = example("with_lightly").main(4, queue_size=512)
    assert all(value.isfinite().all() for value in trained.parameters())


def test_swav_msn_and_pmsn() -> None:
    scores = [drawn(6, 5, seed=k) for k in range(3)]
    options = {"sinkhorn_epsilon": 0.3}
    found = fastcl.SwAVLoss(0.1, epsilon=0.3)(scores[:2], scores[2:])
    agree(found, loss.SwaVLoss(0.1, **options)(scores[:2], scores[2:]).squeeze(), scores)
    leaves = [drawn(12, 7), drawn(5, 7, seed=2)]
    targets = drawn(6, 7, seed=1).detach()
    agree(fastcl.MSNLoss(0.1)(leaves[0], targets, leaves[1]), loss.MSNLoss(0.1)(leaves[0], targets, leaves[1]), leaves)
    for exponent in (0.25, 0.7):
        prior = partial(fastcl.power_law_prior, exponent=exponent)
        ours = fastcl.PMSNLoss(0.1, prior=prior, n_iters=0, kl="prior_mean")
        theirs = loss.PMSNLoss(0.1, sinkhorn_iterations=0, power_law_exponent=exponent)
        agree(ours(leaves[0], targets, leaves[1]), theirs(leaves[0], targets, leaves[1]), leaves)


def test_msn_of_a_split_batch_regularises_each_part() -> None:
    """As their processes do: the mean over processes is not the whole batch's value."""
    anchors, targets, prototypes = drawn(16, 7), drawn(16, 7, seed=1).detach(), drawn(10, 7, seed=2)
    theirs = loss.MSNLoss(0.1, sinkhorn_iterations=0)
    whole = theirs(anchors, targets, prototypes)
    halves = [theirs(a, t, prototypes) for a, t in zip(anchors.chunk(2), targets.chunk(2), strict=True)]
    off = (sum(halves) / 2 - whole).item()
    assert 0.02 < off < 0.3
    torch.testing.assert_close(fastcl.MSNLoss(0.1, n_iters=0)(anchors, targets, prototypes), whole)


def test_defaults_that_differ() -> None:
    x, y = drawn(9, 5), drawn(9, 5, seed=1)
    agree(fastcl.HypersphereLoss()(x, y), package("lightly.loss.hypersphere_loss").HypersphereLoss()(x, y), [x, y])
    assert fastcl.HypersphereLoss().t == 1
    with torch.no_grad():
        assert fastcl.HypersphereLoss()(x, y) != pytest.approx(fastcl.HypersphereLoss(t=2.0)(x, y).item())
    bank, labels = drawn(40, 5, seed=2).detach(), torch.arange(40) % 4
    queries = x.detach()
    ranking = knn.knn_predict(normalize(queries, dim=1), normalize(bank, dim=1).T, labels, 4, knn_k=20, knn_t=0.1)
    found = fastcl.knn_predict(queries, bank, labels, 20, 0.1, 4).argsort(1, descending=True)
    assert torch.equal(ranking[:, 0], found[:, 0])
    assert inspect.signature(knn.knn_predict).parameters["knn_t"].default == pytest.approx(0.1)
    assert inspect.signature(fastcl.knn_predict).parameters["temperature"].default == pytest.approx(0.07)
