"""Losses of metric learning: against a vector for each class, and over the pairs of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import (
    check_count,
    check_ids,
    check_indices,
    check_option,
    check_rows,
    finite_number,
    plain_number,
    scalar_tensor,
)
from ..ops.backends.rows import accumulation_dtype, unit
from ..statistics import contrastive_stats
from ..swept import ContrastiveStats
from . import small_metric
from .formulas import log1p_exp
from .modules import loss_dtype, reduced
from .options import REDUCTIONS


def arcface_loss(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: float = 28.6,
    scale: float = 64.0,
    reduction: str = "mean",
) -> Tensor:
    """The stateless form of :class:`ArcFaceLoss`, which describes formula, shapes and errors.

    prototypes: ``[C, D]``, the vector of each class; gradients flow into it.
    """
    if (loss := small_metric.arcface(embeddings, labels, prototypes, margin, scale, reduction)) is not None:
        return loss
    margin, scale = _degrees(margin), plain_number("scale", scale)
    check_option("reduction", reduction, REDUCTIONS)
    _check_classes(embeddings, labels, prototypes)
    wide = prototypes.to(accumulation_dtype(prototypes))  # gradients of a class are added before they are rounded
    angles = _angles(embeddings, F.embedding(labels.to(torch.int64), wide))  # whose backward is deterministic
    radians = math.radians(margin)
    cosines = torch.where(
        angles <= math.pi - radians, (angles + radians).cos(), angles.cos() - radians * math.sin(radians)
    )
    stats = _over_classes(embeddings, labels, prototypes, scale, ("lse_neg",))
    return _cross_entropy(stats, scale * cosines, reduction, embeddings)


def cosface_loss(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 64.0,
    reduction: str = "mean",
) -> Tensor:
    """The stateless form of :class:`CosFaceLoss`, which describes formula, shapes and errors.

    prototypes: ``[C, D]``, the vector of each class; gradients flow into it.
    """
    margin, scale = finite_number("margin", margin), plain_number("scale", scale)
    check_option("reduction", reduction, REDUCTIONS)
    _check_classes(embeddings, labels, prototypes)
    stats = _over_classes(embeddings, labels, prototypes, scale, ("lse_neg", "sum_pos"))
    assert stats.sum_pos is not None
    return _cross_entropy(stats, stats.sum_pos - scale * margin, reduction, embeddings)


def proxy_anchor_loss(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    reduction: str = "mean",
) -> Tensor:
    """The stateless form of :class:`ProxyAnchorLoss`, which describes formula, shapes and errors.

    prototypes: ``[C, D]``, the proxy of each class; gradients flow into it.
    """
    margin, alpha = finite_number("margin", margin), plain_number("alpha", alpha)
    check_option("reduction", reduction, REDUCTIONS)
    _check_classes(embeddings, labels, prototypes)
    classes = torch.arange(prototypes.shape[0], device=prototypes.device)
    stats = _pulled_and_pushed(prototypes, embeddings, classes, labels, alpha, alpha)
    pull, push = log1p_exp(stats[0] + alpha * margin), log1p_exp(stats[1] + alpha * margin)
    pull, push = (terms.to(loss_dtype(embeddings)) for terms in (pull, push))
    if reduction == "none":
        return pull + push
    if reduction == "sum":
        return pull.sum() + push.sum()
    return pull.sum() / stats[2].count_nonzero().clamp(min=1) + push.sum() / max(prototypes.shape[0], 1)


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    contrasts: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    reduction: str = "mean",
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
) -> Tensor:
    """The stateless form of :class:`MultiSimilarityLoss`, which describes formula, shapes and errors."""
    if ids is None and contrast_ids is None:
        loss = small_metric.multi_similarity(
            embeddings, labels, contrasts, contrast_labels, alpha, beta, base, reduction
        )
        if loss is not None:
            return loss
    alpha, beta, base = plain_number("alpha", alpha), plain_number("beta", beta), finite_number("base", base)
    check_option("reduction", reduction, REDUCTIONS)
    check_rows("embeddings", embeddings)
    check_ids("labels", labels, embeddings.shape[0], embeddings.device)
    if (contrasts is None) != (contrast_labels is None):
        given, absent = (
            ("contrasts", "contrast_labels") if contrast_labels is None else ("contrast_labels", "contrasts")
        )
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if contrasts is not None:
        check_rows("contrasts", contrasts, like=embeddings)
        check_ids("contrast_labels", contrast_labels, contrasts.shape[0], embeddings.device)
    if (ids is None) != (contrast_ids is None):
        given, absent = ("ids", "contrast_ids") if contrast_ids is None else ("contrast_ids", "ids")
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if ids is not None:
        if contrasts is None:
            raise ValueError("ids: expected None for the pairs of the batch (contrasts=None), got a value")
        check_ids("ids", ids, embeddings.shape[0], embeddings.device)
        check_ids("contrast_ids", contrast_ids, contrasts.shape[0], embeddings.device)
    lse_pos, lse_neg, _ = _pulled_and_pushed(
        embeddings, contrasts, labels, contrast_labels, alpha, beta, ids, contrast_ids
    )
    terms = log1p_exp(lse_pos + alpha * base) / alpha + log1p_exp(lse_neg - beta * base) / beta
    return reduced(terms, reduction, embeddings)


class _ClassLoss(nn.Module):
    """A loss against a vector for each class, which the module has as a parameter."""

    _form: Callable[..., Tensor]  # the stateless form
    _options: tuple[str, ...]  # its options, which are attributes of the module

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes)
        self.embedding_size = check_count("embedding_size", embedding_size)

    def _prototypes(self) -> Tensor:
        """The module's own vectors, [C, D]."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, labels: Tensor, *, prototypes: Tensor | None = None) -> Tensor:
        """The loss. The class describes shapes and errors."""
        if prototypes is None:
            prototypes = self._prototypes()
            check_rows("embeddings", embeddings, like=prototypes)
        options = {name: getattr(self, name) for name in self._options}
        return type(self)._form(embeddings, labels, prototypes, **options)

    def extra_repr(self) -> str:
        names = ("num_classes", "embedding_size", *self._options)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class ArcFaceLoss(_ClassLoss):
    r"""ArcFace (Deng et al. 2019): cross-entropy over classes, with a margin on the angle to the own class.

    With :math:`\theta_{ij}` the angle between embedding i and the vector of class j, y the label and m the margin in
    radians,

    .. math:: l_i = -\log \frac{e^{s\,f(\theta_{iy})}}{e^{s\,f(\theta_{iy})} + \sum_{j \neq y} e^{s\cos\theta_{ij}}},
              \qquad f(\theta) = \begin{cases} \cos(\theta + m) & \theta \le \pi - m \\
              \cos\theta - m \sin m & \text{else} \end{cases}

    ``ArcFaceLoss(num_classes, embedding_size)(embeddings, labels)`` is pytorch-metric-learning's call. The cosines are
    not stored, unless they are fewer than the numbers in both sets of rows, and angles near 0 keep their digits.

    Args:
        num_classes, embedding_size: C and D.
        margin: in degrees, from 0 to 180.
        scale: s > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the embeddings.

    The parameter ``W`` is ``[D, C]``, as in pytorch-metric-learning: drawn from the normal distribution, and with the
    same name in the state. Shapes of ``forward(embeddings, labels, *, prototypes=None)``:

    - embeddings: ``[N, D]``; float64, float32, bfloat16 or float16.
    - labels: ``[N]`` integers from 0 to C - 1.
    - prototypes: ``[C, D]``, used in this call in place of ``W``; of any number of classes.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``. float32, or float64 for float64 embeddings. 0 for no embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Labels are compared with C only on
            the CPU.
        RuntimeError: on a second derivative.
    """

    _form, _options = staticmethod(arcface_loss), ("margin", "scale", "reduction")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64.0,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size)
        self.margin, self.scale = _degrees(margin), plain_number("scale", scale)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self.W = nn.Parameter(torch.empty(self.embedding_size, self.num_classes).normal_())

    def _prototypes(self) -> Tensor:
        return self.W.T


class CosFaceLoss(_ClassLoss):
    r"""CosFace (Wang et al. 2018): cross-entropy over classes, with a margin on the cosine with the own class.

    .. math:: l_i = -\log \frac{e^{s(\cos\theta_{iy} - m)}}{e^{s(\cos\theta_{iy} - m)} + \sum_{j \neq y}
              e^{s\cos\theta_{ij}}}

    ``CosFaceLoss(num_classes, embedding_size)(embeddings, labels)`` is pytorch-metric-learning's call. The same loss is
    :class:`ClusterInfoNCE` with the class vectors as contrasts.

    Args:
        num_classes, embedding_size: C and D.
        margin: m, any finite number.
        scale: s > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the embeddings.

    The parameter ``W`` ``[D, C]``, shapes of ``forward(embeddings, labels, *, prototypes=None)``, dtypes, result and
    errors are those of :class:`ArcFaceLoss`.
    """

    _form, _options = staticmethod(cosface_loss), ("margin", "scale", "reduction")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64.0,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size)
        self.margin, self.scale = finite_number("margin", margin), plain_number("scale", scale)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self.W = nn.Parameter(torch.empty(self.embedding_size, self.num_classes).normal_())

    def _prototypes(self) -> Tensor:
        return self.W.T


class ProxyAnchorLoss(_ClassLoss):
    r"""Proxy-Anchor (Kim et al. 2020): a proxy for each class, which pulls its embeddings and pushes all others.

    With :math:`s_{ci}` the cosine of proxy c and embedding i, :math:`P_c` the embeddings of class c, and C+ the number
    of classes that occur,

    .. math:: \frac{1}{C^+} \sum_c \log\Big(1 + \sum_{i \in P_c} e^{-\alpha (s_{ci} - m)}\Big)
              + \frac{1}{C} \sum_c \log\Big(1 + \sum_{i \notin P_c} e^{\alpha (s_{ci} + m)}\Big)

    ``ProxyAnchorLoss(num_classes, embedding_size)(embeddings, labels)`` is pytorch-metric-learning's call. The cosines
    are never stored.

    Args:
        num_classes, embedding_size: C and D.
        margin: m, any finite number.
        alpha: > 0.
        reduction: ``"mean"`` as above; ``"sum"``: both sums, undivided; ``"none"``: ``[C]``, both terms of each proxy.

    The parameter ``proxies`` is ``[C, D]``, as in pytorch-metric-learning: initialised by
    ``kaiming_normal_(mode="fan_out")``, and with the same name in the state. Shapes of ``forward(embeddings, labels, *,
    prototypes=None)`` (prototypes replace ``proxies``), dtypes, result and errors are those of :class:`ArcFaceLoss`.
    """

    _form, _options = staticmethod(proxy_anchor_loss), ("margin", "alpha", "reduction")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32.0,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_size)
        self.margin, self.alpha = finite_number("margin", margin), plain_number("alpha", alpha)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self.proxies = nn.Parameter(torch.empty(self.num_classes, self.embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def _prototypes(self) -> Tensor:
        return self.proxies


class MultiSimilarityLoss(nn.Module):
    r"""Multi-similarity (Wang et al. 2019): an anchor's hardest positives and negatives weigh most, softly.

    With :math:`s_{ij}` the cosine of rows i and j, positives P_i and negatives N_i of anchor i,

    .. math:: l_i = \frac1\alpha \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (s_{ij} - b)}\Big)
              + \frac1\beta \log\Big(1 + \sum_{j \in N_i} e^{\beta (s_{ij} - b)}\Big)

    ``MultiSimilarityLoss()(embeddings, labels)`` is pytorch-metric-learning's call, without a miner. Cosines are never
    stored.

    Args:
        alpha, beta: > 0, the weights of positives and of negatives.
        base: b, any finite number.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over all anchors; an empty sum adds 0.

    Shapes of ``forward(embeddings, labels, contrasts=None, contrast_labels=None, *, ids=None, contrast_ids=None)``:

    - embeddings: ``[N, D]``; float64, float32, bfloat16 or float16.
    - labels: ``[N]`` integers. A negative number means no class: all other rows are negatives.
    - contrasts, contrast_labels: None for the pairs of the batch, i != j; or ``[M, D]`` and ``[M]``, a second set, into
      which gradients flow (their ``ref_emb`` and ``ref_labels``).
    - ids, contrast_ids: ``[N]`` and ``[M]`` integers; a pair of equal ids is left out, such as a row and its stored
      copy. Negative: no id.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``. float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha, self.beta = plain_number("alpha", alpha), plain_number("beta", beta)
        self.base = finite_number("base", base)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        contrasts: Tensor | None = None,
        contrast_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return multi_similarity_loss(
            embeddings, labels, contrasts, contrast_labels, alpha=self.alpha, beta=self.beta, base=self.base,
            reduction=self.reduction, ids=ids, contrast_ids=contrast_ids,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, base={self.base:g}, reduction={self.reduction!r}"


def _degrees(margin: float) -> float:
    margin = finite_number("margin", margin)
    if not 0 <= margin <= 180:
        raise ValueError(f"margin: expected degrees from 0 to 180, got {margin}")
    return margin


def _check_classes(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> None:
    check_rows("embeddings", embeddings)
    check_rows("prototypes", prototypes, like=embeddings)
    check_ids("labels", labels, embeddings.shape[0], embeddings.device)
    check_indices("labels", labels, prototypes.shape[0], embeddings.device)


def _angles(x: Tensor, y: Tensor) -> Tensor:
    """The angle [N] between row i of x and row i of y; a right one for a row of zeros.

    The arccosine loses half the digits near 0 and pi, and its derivative is infinite there.
    """
    x, y = unit(x), unit(y)
    apart, along = (torch.linalg.vector_norm(rows, dim=1) for rows in (x - y, x + y))
    none = (apart == 0) & (along == 0)
    return 2 * torch.atan2(torch.where(none, 1, apart), torch.where(none, 1, along))


def _over_classes(
    embeddings: Tensor, labels: Tensor, prototypes: Tensor, scale: float, want: tuple[str, ...]
) -> ContrastiveStats:
    classes = torch.arange(prototypes.shape[0], device=prototypes.device)
    return contrastive_stats(
        embeddings, prototypes, labels, classes, logit_scale=scale,
        normalize_anchors=True, normalize_contrasts=True, want=want,
    )  # fmt: skip


def _pulled_and_pushed(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor,
    contrast_clusters: Tensor | None,
    alpha: float,
    beta: float,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ_P exp(-alpha cos), log Σ_N exp(beta cos) and the number of positives of each anchor, from one sweep."""
    dtype = accumulation_dtype(anchors, contrasts)
    scales = torch.stack([scalar_tensor("scale", scale, anchors.device, dtype) for scale in (-alpha, beta)])
    stats = contrastive_stats(
        anchors, contrasts, clusters, contrast_clusters, logit_scale=scales, normalize_anchors=True,
        normalize_contrasts=contrasts is not None, anchor_ids=ids, contrast_ids=contrast_ids,
        want=("lse_pos", "lse_neg"),
    )  # fmt: skip
    assert stats.lse_pos is not None
    assert stats.lse_neg is not None
    return stats.lse_pos[0], stats.lse_neg[1], stats.num_pos


def _cross_entropy(stats: ContrastiveStats, target: Tensor, reduction: str, embeddings: Tensor) -> Tensor:
    """Of the target's logits, beside those of the other classes. Nothing cancels as the target wins."""
    assert stats.lse_neg is not None
    return reduced(log1p_exp(stats.lse_neg - target), reduction, embeddings)
