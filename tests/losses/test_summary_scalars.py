"""`LossStats.scalars`: what a logger takes."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import fastcl
from tests.support.strategies import generator


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, generator=generator(seed))


def test_scalars_are_the_statistics() -> None:
    stats = fastcl.ClusterInfoNCE(0.1)(rows(8), torch.arange(8) // 2, return_stats=True)[1]
    found = stats.scalars()
    assert list(found) == ["top1", "positive_similarity", "negative_similarity", "entropy"]
    assert all(type(value) is float for value in found.values())
    assert found == {name: getattr(stats, name).item() for name in found}


def test_both_directions_and_a_prefix() -> None:
    image, text = rows(8), rows(8, 1)
    stats = fastcl.ClusterInfoNCE(0.1, symmetric=True)(image, contrasts=text, return_stats=True)[1]
    found = stats.scalars("train/")
    assert len(found) == 8
    assert all(name.startswith("train/") for name in found)
    assert found["train/entropy"] == stats.entropy.item()
    assert found["train/reverse_entropy"] == stats.reverse.entropy.item() != found["train/entropy"]


def test_with_none_the_mean_over_anchors_that_have_the_set() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    each, mean = (
        fastcl.ClusterInfoNCE(0.1, reduction=name)(rows(6), labels, return_stats=True)[1] for name in ("none", "mean")
    )
    assert each.top1.isnan().any()
    assert each.scalars() == pytest.approx(mean.scalars(), rel=1e-6)


def test_without_positives_nan_and_a_wrong_prefix() -> None:
    stats = fastcl.ClusterInfoNCE(0.1)(rows(4), torch.arange(4), return_stats=True)[1]
    assert math.isnan(stats.scalars()["top1"])
    with pytest.raises(TypeError, match=r"^prefix: expected a string, got int"):
        stats.scalars(3)


def test_the_dictionary_of_clip_holds_losses_only() -> None:
    image, text = normalize(rows(8)), normalize(rows(8, 1))
    losses, stats = fastcl.ClipLoss()(image, text, 9.0, output_dict=True, return_stats=True)
    assert list(losses) == ["contrastive_loss"]
    assert torch.equal(sum(losses.values()), fastcl.ClipLoss()(image, text, 9.0))
    assert set(stats.scalars()) >= {"top1", "reverse_top1"}
