"""Losses with the names, defaults and call of pytorch-metric-learning, for its trainers and wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_ids, check_rows
from .losses.cluster import ClusterInfoNCE
from .losses.metric import MultiSimilarityLoss as _MultiSimilarityLoss
from .losses.options import refuses_renamed
from .losses.pair_contrastive import PairContrastiveLoss
from .losses.sigmoid import SigmoidLoss

__all__ = ["ContrastiveLoss", "MetricLearningLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss"]

# The arguments of contrasts and of their labels.
_OTHERS = {
    ClusterInfoNCE: ("contrasts", "contrast_clusters"),
    SigmoidLoss: ("contrasts", "contrast_clusters"),
    PairContrastiveLoss: ("contrasts", "contrast_labels"),
    _MultiSimilarityLoss: ("contrasts", "contrast_labels"),
}


class MetricLearningLoss(nn.Module):
    """A loss with pytorch-metric-learning's call, for its trainers, ``CrossBatchMemory`` and ``SelfSupervisedLoss``.

    Args:
        criterion: a `ClusterInfoNCE`, `SigmoidLoss`, `PairContrastiveLoss` or `MultiSimilarityLoss`.

    Shapes of ``forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)``:

    - embeddings: ``[N, D]``.
    - labels: ``[N]`` integers on any device. Negative ones are classes too, as in pytorch-metric-learning.
    - indices_tuple: None, or the four index tensors of all pairs, less at most one pair of each row and of each
      reference. This is what ``CrossBatchMemory`` passes: all pairs but a row and its own copy. A miner's selection is
      a ValueError: a selection is any set of pairs, so it would need an N x M mask, while a sweep knows its pairs from
      labels and ids of the rows.
    - ref_emb, ref_labels: ``[M, D]`` and ``[M]``, rows to compare with in place of the batch. All pairs count, as in
      pytorch-metric-learning, a row and its copy too unless `indices_tuple` lacks the pair.

    Returns what the criterion returns.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    ``CrossBatchMemory`` and ``SelfSupervisedLoss`` take a loss by the name of its class: :class:`SupConLoss`,
    :class:`NTXentLoss`, :class:`ContrastiveLoss` and :class:`MultiSimilarityLoss` of this module have names that they
    accept. A subclass of this class under one of these names wraps any other criterion.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        if type(criterion) not in _OTHERS:
            names = ", ".join(kind.__name__ for kind in _OTHERS)
            raise TypeError(f"criterion: expected one of {names}, got {type(criterion).__name__}")
        self.criterion = criterion

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss. The class describes shapes and errors."""
        check_rows("embeddings", embeddings)
        own = _classes("labels", labels, embeddings)
        if (ref_emb is None) != (ref_labels is None):
            given, absent = ("ref_emb", "ref_labels") if ref_labels is None else ("ref_labels", "ref_emb")
            raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
        if ref_emb is None or (ref_emb is embeddings and ref_labels is labels):
            if indices_tuple is not None and not bool((_left_out(indices_tuple, own, own)[0] == 1).all()):
                raise ValueError(_selection(indices_tuple))
            return self.criterion(embeddings, own)
        check_rows("ref_emb", ref_emb, like=embeddings)
        others = _classes("ref_labels", ref_labels, ref_emb)
        contrasts, classes = _OTHERS[type(self.criterion)]
        call = {contrasts: ref_emb, classes: others}
        if indices_tuple is not None:
            _, left = _left_out(indices_tuple, own, others)
            row, place = left.nonzero(as_tuple=True)
            copies = torch.full_like(others, -1)
            copies[place] = row
            call.update(ids=torch.arange(own.shape[0], device=own.device), contrast_ids=copies)
        return self.criterion(embeddings, own, **call)


class SupConLoss(MetricLearningLoss):
    """pytorch-metric-learning's ``SupConLoss(temperature=0.1)``: `ClusterInfoNCE` with its call.

    A batch without negatives has the formula's value; theirs has 0.
    """

    @refuses_renamed
    def __init__(self, temperature: float | Tensor = 0.1) -> None:
        super().__init__(ClusterInfoNCE(temperature))


class NTXentLoss(MetricLearningLoss):
    """pytorch-metric-learning's ``NTXentLoss(temperature=0.07)``: `ClusterInfoNCE` over pairs, with its call."""

    @refuses_renamed
    def __init__(self, temperature: float | Tensor = 0.07) -> None:
        super().__init__(ClusterInfoNCE(temperature, form="pairs"))


class ContrastiveLoss(MetricLearningLoss):
    """pytorch-metric-learning's ``ContrastiveLoss(pos_margin=0, neg_margin=1)``: `PairContrastiveLoss` with its call.

    ``distance="cosine"`` stands for their ``distance=CosineSimilarity()``.
    """

    @refuses_renamed
    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0, *, distance: str = "euclidean") -> None:
        super().__init__(PairContrastiveLoss(pos_margin, neg_margin, distance=distance))


class MultiSimilarityLoss(MetricLearningLoss):
    """pytorch-metric-learning's ``MultiSimilarityLoss(alpha=2, beta=50, base=0.5)`` with its call."""

    @refuses_renamed
    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__(_MultiSimilarityLoss(alpha, beta, base))


def _classes(name: str, labels: Tensor | None, rows: Tensor) -> Tensor:
    """Checked labels as numbers that are not negative: the losses read a negative one as "no cluster"."""
    if labels is None:
        raise ValueError(f"{name}: expected a tensor, got None")
    if isinstance(labels, Tensor):
        labels = labels.to(rows.device)
    check_ids(name, labels, rows.shape[0], rows.device)
    wide = labels.to(torch.int64)
    return torch.where(wide < 0, wide + 2**62, wide)


def _left_out(indices: Any, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """How many pairs each row leaves out [N], and which [N, M]; at most one of each row and of each column."""
    good = isinstance(indices, (tuple, list)) and len(indices) == 4 and all(isinstance(one, Tensor) for one in indices)
    if not good:
        raise ValueError(_selection(indices))
    a, p, b, n = (one.to(labels.device) for one in indices)
    equal = labels[:, None] == others
    left = torch.ones_like(equal)
    left[a, p] = left[b, n] = False
    counts = left.sum(1)
    listed_once = a.shape[0] + b.shape[0] + int(counts.sum()) == left.numel()
    alike = bool(equal[a, p].all()) and not bool(equal[b, n].any())
    if not listed_once or not alike or bool((counts > 1).any()) or bool((left.sum(0) > 1).any()):
        raise ValueError(_selection(indices))
    return counts, left


def _selection(indices: Any) -> str:
    got = "a tuple" if isinstance(indices, (tuple, list)) else type(indices).__name__
    if isinstance(indices, (tuple, list)):
        kind = {3: "triplets", 4: "pairs"}.get(len(indices), f"{len(indices)} tensors")
        got = f"a selection of {kind}"
    return (
        f"indices_tuple: expected None, or all pairs but those of a row and its own copy, as CrossBatchMemory passes, "
        f"got {got}. A miner selects any pairs, which would need a mask of N x M; a sweep knows its pairs from labels "
        "and ids of the rows. Without a miner, MultiSimilarityLoss weighs pairs by their hardness, and weights= of "
        "ClusterInfoNCE weighs anchors."
    )
