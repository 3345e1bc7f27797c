"""The contrastive loss of pairs with margins, of distances or of cosines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_flag, check_ids, check_option, check_rows, finite_number
from ..memory_state import Memory
from ..ops.pairs.small import means_of
from .batch import Batch, Tensors, batch
from .gathered_pairs import Maps
from .options import LossOptions
from .pair_sums import Swept
from .reduce import scalar
from .small import rows_on_cpu

DISTANCES = ("euclidean", "cosine")
REDUCTIONS = ("active", "mean", "sum", "none")


def pair_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    distance: str = "euclidean",
    squared: bool = False,
    reduction: str = "active",
    contrasts: Tensor | Memory | None = None,
    contrast_labels: Tensor | None = None,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
) -> Tensor:
    """The stateless form of :class:`PairContrastiveLoss`, which describes formula, shapes, dtypes and errors.

    By default the mean of ``max(0, d_ij - pos_margin)`` over the positive pairs where it is not 0, plus the mean of
    ``max(0, neg_margin - d_ij)`` over the negative pairs where it is not 0, with d_ij the distance of unit rows. The
    result is a scalar, or ``[N]`` with ``reduction="none"``.
    """
    maps = _maps(pos_margin, neg_margin, distance, squared, reduction)
    given = Tensors(
        embeddings, labels, contrasts=contrasts, contrast_clusters=contrast_labels, ids=ids, contrast_ids=contrast_ids
    )
    if (loss := _small(given, maps, reduction)) is not None:
        return loss
    check_rows("embeddings", embeddings, dims=(2, 3))
    check_ids("labels", labels, embeddings.shape[0], embeddings.device)
    if contrast_labels is not None and contrasts is None:
        raise ValueError("contrast_labels: expected None without contrasts, got a value")
    if isinstance(contrasts, Memory):
        if contrast_labels is not None:
            raise ValueError("contrast_labels: expected None, as a queue or bank brings its own, got a value")
        stored = contrasts.stored(False)
        if not stored.clustered or stored.tags is not None:
            got = "one that does not" if stored.tags is None else "one that stores tags"
            raise ValueError(f"contrasts: expected a queue or bank that stores clusters, got {got}")
    elif contrasts is not None:
        check_rows("contrasts", contrasts, like=embeddings)
        if contrast_labels is None:
            raise ValueError("contrast_labels: expected a tensor, as contrasts is one, got None")
        check_ids("contrast_labels", contrast_labels, contrasts.shape[0], embeddings.device)
    rows = batch(given, not squared)
    return _reduced(rows, maps, reduction)


class PairContrastiveLoss(nn.Module):
    r"""The contrastive loss of pairs: pytorch-metric-learning's ``ContrastiveLoss``, or that of Hadsell et al. 2006.

    For a pair of rows at distance d the loss is

    ================================== ===================================== ====================================
    option                             positive pair                         negative pair
    ================================== ===================================== ====================================
    ``distance="euclidean"``           :math:`\max(0, d - m_+)`              :math:`\max(0, m_- - d)`
    the same, ``squared=True``         :math:`\max(0, d - m_+)^2 / 2`        :math:`\max(0, m_- - d)^2 / 2`
    ``distance="cosine"``, of cosine c :math:`\max(0, m_+ - c)`              :math:`\max(0, c - m_-)`
    ================================== ===================================== ====================================

    Rows are normalised, but with ``squared=True`` they are taken as they are (Hadsell). Small distances keep their
    digits. Distances are never stored: memory is O((N + M) D).

    Args:
        pos_margin, neg_margin: :math:`m_+` and :math:`m_-`, finite numbers. For cosines usually 1 and 0.
        distance: ``"euclidean"`` or ``"cosine"``.
        squared: half the square of the hinge, of Euclidean distances.
        reduction: ``"active"``: the mean over positive pairs whose loss is not 0, plus the mean over such negative
            pairs. ``"mean"``: the mean over all positive pairs plus the mean over all negative pairs. ``"sum"``: over
            all pairs. ``"none"``: for each anchor the sum over its pairs. An empty mean is 0 with gradient 0.

    Shapes of ``forward(embeddings, labels, *, contrasts=None, contrast_labels=None, ids=None,
    contrast_ids=None)``:

    - embeddings: ``[N, D]``, or ``[N, V, D]`` for V views of N samples. float64, float32, bfloat16, float16.
    - labels: ``[N]`` integers. Each ordered pair of different rows counts; a row of negative label has no positive but
      its sample's other views.
    - contrasts: None: the other rows of the batch. ``[M, D]`` with ``contrast_labels`` ``[M]``, or a
      :class:`MemoryQueue` or :class:`MemoryBank` with clusters.
    - ids, contrast_ids: ``[N]`` and, for a tensor, ``[M]`` integers; a pair of equal ids is left out, such as a row and
      its stored copy. Negative: no id.

    Returns:
        A scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"``. float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        *,
        distance: str = "euclidean",
        squared: bool = False,
        reduction: str = "active",
    ) -> None:
        super().__init__()
        maps = _maps(pos_margin, neg_margin, distance, squared, reduction)
        self.pos_margin, self.neg_margin = maps.pos_margin, maps.neg_margin
        self.distance, self.squared, self.reduction = distance, squared, reduction

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        contrasts: Tensor | Memory | None = None,
        contrast_labels: Tensor | None = None,
        ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return pair_contrastive_loss(
            embeddings, labels, pos_margin=self.pos_margin, neg_margin=self.neg_margin, distance=self.distance,
            squared=self.squared, reduction=self.reduction, contrasts=contrasts, contrast_labels=contrast_labels,
            ids=ids, contrast_ids=contrast_ids,
        )  # fmt: skip

    def extra_repr(self) -> str:
        margins = f"pos_margin={self.pos_margin:g}, neg_margin={self.neg_margin:g}"
        return f"{margins}, distance={self.distance!r}, squared={self.squared!r}, reduction={self.reduction!r}"


def _maps(pos_margin: float, neg_margin: float, distance: str, squared: bool, reduction: str) -> Maps:
    check_option("distance", distance, DISTANCES)
    check_flag("squared", squared)
    check_option("reduction", reduction, REDUCTIONS)
    if squared and distance == "cosine":
        raise ValueError("squared: expected False with distance='cosine', got True")
    kind = "hinge" if distance == "cosine" else "squared" if squared else "distance"
    return Maps(kind, finite_number("pos_margin", pos_margin), finite_number("neg_margin", neg_margin))


_OPTIONS = LossOptions()


def _small(given: Tensors, maps: Maps, reduction: str) -> Tensor | None:
    """The means of a valid small call on a CPU, by `means_of`; None for other calls, which are then checked."""
    if torch.compiler.is_compiling() or reduction not in ("active", "mean") or given.clusters is None:
        return None
    if (given.contrasts is None) != (given.contrast_clusters is None):
        return None
    rows = rows_on_cpu(given, _OPTIONS, 1.0)
    if rows is None:
        return None
    return means_of(
        given.embeddings, *rows, normalize=maps.kind != "squared", kind=maps.kind,
        margins=(maps.pos_margin, maps.neg_margin), active=reduction == "active",
    )  # fmt: skip


def _reduced(rows: Batch, maps: Maps, reduction: str) -> Tensor:
    swept, one = Swept(rows), scalar("logit_scale", 1.0, rows)
    if reduction == "none":
        return swept.sums(one, None, maps).values.sum(0).to(rows.dtype()).reshape(rows.shape)
    ones, zeros = one.new_ones(rows.anchors.values.shape[0]), one.new_zeros(rows.anchors.values.shape[0])
    if reduction == "sum":
        return swept.total(one, None, maps, torch.stack((ones, ones)))[0].to(rows.dtype())
    # The divisors are known after the sweep, and positives and negatives have different ones. Positives lie in few
    # tiles, so they have a sweep of their own.
    negative, sums = swept.total(one, None, maps, torch.stack((zeros, ones)))
    alone = Maps(maps.kind, maps.pos_margin, maps.neg_margin, only_positives=True)
    positive, _ = swept.total(one, None, alone, torch.stack((ones, zeros)))
    count = (sums.active if reduction == "active" else sums.counts).double().sum(1).clamp(min=1)
    return (positive / count[0] + negative / count[1]).to(rows.dtype())
