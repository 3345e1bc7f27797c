"""pytorch-metric-learning: our losses in its trainer, CrossBatchMemory and SelfSupervisedLoss, equal to its own."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl
from fastcl import metric_learning as ml
from tests.support.integrations import example, package, same_training

losses = package("pytorch_metric_learning.losses")
miners = package("pytorch_metric_learning.miners")
distances = package("pytorch_metric_learning.distances")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

PAIRS = {
    "SupConLoss": lambda: (ml.SupConLoss(), losses.SupConLoss()),
    "NTXentLoss": lambda: (ml.NTXentLoss(), losses.NTXentLoss()),
    "ContrastiveLoss": lambda: (ml.ContrastiveLoss(), losses.ContrastiveLoss()),
    "ContrastiveLoss of cosines": lambda: (
        ml.ContrastiveLoss(1, 0, distance="cosine"),
        losses.ContrastiveLoss(1, 0, distance=distances.CosineSimilarity()),
    ),
    "MultiSimilarityLoss": lambda: (ml.MultiSimilarityLoss(), losses.MultiSimilarityLoss()),
}


def drawn(seed: int, n: int = 14) -> tuple[Tensor, Tensor]:
    """Labels of which some are negative: classes in both libraries' calls."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(-2, 3, (n,), generator=g)


def agree(found: Tensor, expected: Tensor, x: Tensor) -> None:
    results = [(value.detach(), torch.autograd.grad(value, x)[0]) for value in (found, expected)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", PAIRS)
def test_the_call(name) -> None:
    ours, theirs = PAIRS[name]()
    x, labels = drawn(0)
    y, of_y = drawn(1, 9)
    agree(ours(x, labels), theirs(x, labels), x)
    agree(ours(x, labels, None, y.detach(), of_y), theirs(x, labels, None, y.detach(), of_y), x)
    agree(ours(x, labels=labels, ref_emb=y, ref_labels=of_y), theirs(x, labels=labels, ref_emb=y, ref_labels=of_y), x)


@pytest.mark.parametrize("name", PAIRS)
def test_cross_batch_memory(name) -> None:
    """Also after the memory has wrapped."""
    ours, theirs = (losses.CrossBatchMemory(loss, 6, memory_size=40).double() for loss in PAIRS[name]())
    for step in range(5):
        x, labels = drawn(step)
        agree(ours(x, labels), theirs(x, labels), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_self_supervised_loss(name, symmetric) -> None:
    ours, theirs = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in PAIRS[name]())
    x, y = drawn(0)[0], drawn(1)[0].detach()
    agree(ours(x, y), theirs(x, y), x)


def test_our_queue_beside_their_memory() -> None:
    queue = example("with_metric_learning").Queued(0.1, 6, 40).double()
    memory = losses.CrossBatchMemory(losses.SupConLoss(0.1), 6, memory_size=40).double()
    for step in range(5):
        x, labels = drawn(step)
        x, labels = (
            normalize(x, dim=1).detach().requires_grad_(),
            labels + 2,
        )  # a queue keeps unit rows, and real labels
        agree(queue(x, labels), memory(x, labels), x)


@pytest.mark.parametrize("miner", ["MultiSimilarityMiner", "TripletMarginMiner", "BatchHardMiner"])
def test_miners_are_refused_in_words(miner) -> None:
    x, labels = drawn(0)
    selected = getattr(miners, miner)()(x, labels)
    with pytest.raises(ValueError, match=r"^indices_tuple: expected None, .*A miner selects any pairs"):
        ml.SupConLoss()(x, labels, selected)
    memory = losses.CrossBatchMemory(ml.SupConLoss(), 6, memory_size=40, miner=getattr(miners, miner)()).double()
    with pytest.raises(ValueError, match=r"^indices_tuple"):
        memory(x, labels)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("batch", lambda: losses.SupConLoss(0.1)),
        ("memory", lambda: losses.CrossBatchMemory(losses.SupConLoss(0.1), 32, memory_size=1024)),
    ],
)
def test_the_trainer(name, theirs) -> None:
    main = example("with_metric_learning").main
    same_training(main(name, epochs=1), main(loss=theirs(), epochs=1), 2e-4)


@pytest.mark.parametrize("name", ["queue", "sigmoid"])
def test_the_trainer_with_losses_that_it_lacks(name) -> None:
    trained = example("with_metric_learning").main(name, epochs=1)
    assert all(value.isfinite().all() for value in trained.parameters())


def test_negative_labels_are_no_cluster_but_classes_there() -> None:
    """The first thing that docs/migration.md tells. Labels {-1, 1}: our loss leaves one class out."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(16) % 2 * 2 - 1
    theirs = losses.SupConLoss(0.1)(x, labels)
    torch.testing.assert_close(ml.SupConLoss(0.1)(x, labels), theirs)
    torch.testing.assert_close(fastcl.SupConLoss(0.1)(x, labels - labels.min()), theirs)
    each = fastcl.ClusterInfoNCE(0.1, reduction="none")(x, labels - labels.min())
    torch.testing.assert_close(fastcl.SupConLoss(0.1)(x, labels), each[labels == 1].mean())
    assert abs(fastcl.SupConLoss(0.1)(x, labels) - theirs) > 1e-2


def test_the_defaults_that_differ() -> None:
    x, labels = drawn(0)
    agree(fastcl.SupConLoss(0.1)(x, labels + 2), losses.SupConLoss()(x, labels), x)
    assert abs(fastcl.SupConLoss()(x, labels + 2) - losses.SupConLoss()(x, labels)) > 1e-2
