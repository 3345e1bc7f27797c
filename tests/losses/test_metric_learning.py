"""`fastcl.metric_learning`: the call of pytorch-metric-learning. tests/integrations compares with the package."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import metric_learning as ml
from tests.support.strategies import generator

LABELS = torch.tensor([0, 0, 1, 1, -1, -1, 2, 2])  # -1 is a class, as in pytorch-metric-learning


def rows(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 5, generator=generator(seed), dtype=torch.float64)


def all_pairs(labels: Tensor, others: Tensor, left: Tensor) -> tuple[Tensor, ...]:
    """Positive and negative pairs but those in `left`, as their miners and memories pass them."""
    equal = labels[:, None] == others
    return *torch.where(equal & ~left), *torch.where(~equal & ~left)


KINDS = {
    "SupConLoss": (ml.SupConLoss, fastcl.ClusterInfoNCE(0.1)),
    "NTXentLoss": (ml.NTXentLoss, fastcl.ClusterInfoNCE(0.07, form="pairs")),
    "ContrastiveLoss": (ml.ContrastiveLoss, fastcl.PairContrastiveLoss()),
    "MultiSimilarityLoss": (ml.MultiSimilarityLoss, fastcl.MultiSimilarityLoss()),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_batch_alone(name) -> None:
    make, plain = KINDS[name]
    x, loss = rows(), make()
    expected = plain(x, LABELS + 1)
    everything = all_pairs(LABELS, LABELS, torch.eye(8, dtype=torch.bool))
    for call in (loss(x, LABELS), loss(x, LABELS, None), loss(x, LABELS, everything), loss(x, LABELS, None, x, LABELS)):
        assert torch.equal(call, expected)
    assert type(loss).__name__ == name
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, LABELS), expected)
    assert "criterion" in repr(loss)


@pytest.mark.parametrize("name", KINDS)
def test_a_memory_that_holds_copies_of_the_batch(name) -> None:
    """Without a row's own copy a memory is the batch and older rows."""
    make, plain = KINDS[name]
    x, older = rows(), rows(6, 1)
    of_older = torch.tensor([0, 1, -1, 2, 3, 0])
    memory, of_memory = torch.cat([older, x]), torch.cat([of_older, LABELS])
    own = torch.zeros(8, 14, dtype=torch.bool)
    own[torch.arange(8), torch.arange(8) + 6] = True
    found = make()(x, LABELS, all_pairs(LABELS, of_memory, own), memory, of_memory)
    names = ("contrasts", "contrast_clusters" if isinstance(plain, fastcl.ClusterInfoNCE) else "contrast_labels")
    each = []
    for i in range(8):  # one anchor at a time, without its copy
        kept = ~own[i]
        each.append((x[i : i + 1], dict(zip(names, (memory[kept], of_memory[kept] + 1), strict=True))))
    if name in ("SupConLoss", "MultiSimilarityLoss"):
        expected = torch.stack([plain(one, LABELS[i : i + 1] + 1, **others) for i, (one, others) in enumerate(each)])
        torch.testing.assert_close(found, expected.mean())
    without_ids = make()(x, LABELS, None, memory, of_memory)
    if name != "ContrastiveLoss":  # a copy is a positive at distance 0, which is not active
        assert abs(without_ids - found) > 1e-3
    else:
        torch.testing.assert_close(without_ids, found)


def test_ids_of_a_pair_loss_leave_pairs_out() -> None:
    x, y = rows(), rows(seed=1)
    ids = torch.arange(8)
    plain = fastcl.PairContrastiveLoss(2.0, 2.0, reduction="sum")
    whole = plain(x, LABELS + 1, contrasts=y, contrast_labels=LABELS + 1)
    less = plain(x, LABELS + 1, contrasts=y, contrast_labels=LABELS + 1, ids=ids, contrast_ids=ids)
    unit = [torch.nn.functional.normalize(part, dim=1) for part in (x, y)]
    diagonal = (torch.linalg.vector_norm(unit[0] - unit[1], dim=1) - 2).clamp(min=0).sum()
    torch.testing.assert_close(whole - less, diagonal)
    loss = fastcl.MultiSimilarityLoss()
    for wrong in ({"ids": ids}, {"contrast_ids": ids}, {"ids": ids, "contrast_ids": ids, "contrasts": None}):
        call = {"contrasts": y, "contrast_labels": LABELS, **wrong}
        if call["contrasts"] is None:
            call["contrast_labels"] = None
        with pytest.raises(ValueError, match="ids: expected"):
            loss(x, LABELS, **call)


def test_what_a_miner_selects_is_refused() -> None:
    x, loss = rows(), ml.SupConLoss()
    pairs = all_pairs(LABELS, LABELS, torch.eye(8, dtype=torch.bool))
    others = all_pairs(LABELS, LABELS, torch.zeros(8, 8, dtype=torch.bool))
    wrong = [
        tuple(one[1:] for one in pairs),
        pairs[:3],
        tuple(torch.cat((one, one)) for one in pairs),
        (*pairs[2:], *pairs[:2]),
        others,
        "pairs",
        None,
    ]
    for selection in wrong[:-1]:
        with pytest.raises(
            ValueError, match=r"^indices_tuple: expected None, or all pairs .* A miner selects any pairs"
        ):
            loss(x, LABELS, selection)
    with pytest.raises(ValueError, match=r"^indices_tuple"):
        loss(x, LABELS, tuple(one[2:] for one in others), rows(seed=1), LABELS)


def test_bad_input() -> None:
    x = rows()
    for call, kind, message in (
        (lambda: ml.MetricLearningLoss(fastcl.SupConLoss()), TypeError, "^criterion: expected one of ClusterInfoNCE"),
        (lambda: ml.SupConLoss()(x), ValueError, "^labels: expected a tensor, got None"),
        (lambda: ml.SupConLoss()(x, LABELS.float()), TypeError, "^labels: expected integers"),
        (lambda: ml.SupConLoss()(x, LABELS, None, x), ValueError, "^ref_labels: expected a tensor"),
        (lambda: ml.SupConLoss()(x, LABELS, None, None, LABELS), ValueError, "^ref_emb: expected a tensor"),
        (lambda: ml.SupConLoss()(x, LABELS, None, x[:, :3], LABELS), ValueError, "^ref_emb: expected rows"),
    ):
        with pytest.raises(kind, match=message):
            call()
