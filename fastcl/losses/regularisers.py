"""Losses that spread embeddings: KoLeo and uniformity on the unit sphere, and local dimensionality."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_count, check_flag, check_option, check_rows, finite_number, plain_number
from ..distributed import Property, World, check_group, tell_others
from ..neighbors import topk_similarity
from ..ops.backends.rows import unit
from ..quality import alignment, uniformity
from . import small_regularisers
from .modules import GroupModule, reduced
from .options import REDUCTIONS
from .sampled import sampled_similarity


def koleo_loss(embeddings: Tensor, *, p: float = 2.0, eps: float = 1e-8, reduction: str = "mean") -> Tensor:
    """The stateless form of :class:`KoLeoLoss`, which describes formula, shapes and errors."""
    loss = small_regularisers.koleo(embeddings, p, eps, reduction, partial(_koleo, p, eps, reduction))
    if loss is not None:
        return loss
    p, eps = _norm(p), plain_number("eps", eps)
    check_option("reduction", reduction, REDUCTIONS)
    check_rows("embeddings", embeddings)
    return _koleo(p, eps, reduction, embeddings)


def _koleo(p: float, eps: float, reduction: str, embeddings: Tensor) -> Tensor:
    x = unit(embeddings)
    if x.shape[0] < 2:
        return reduced(x.sum(1) * 0, reduction, embeddings)
    own = torch.arange(x.shape[0], device=x.device)
    nearest = topk_similarity(x.detach(), x.detach(), 1, query_ids=own, key_ids=own)[1][:, 0]
    # The derivative of the norm of 0 is 0, and the backward of an embedding is deterministic.
    distances = torch.linalg.vector_norm(x - F.embedding(nearest, x), p, dim=1)
    return reduced(-(distances + eps).log(), reduction, embeddings)


def hypersphere_loss(z_a: Tensor, z_b: Tensor, *, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0) -> Tensor:
    """The stateless form of :class:`HypersphereLoss`, which describes formula, shapes and errors."""
    if (loss := small_regularisers.hypersphere(z_a, z_b, t, lam, alpha)) is not None:
        return loss
    t, lam, alpha = plain_number("t", t), finite_number("lam", lam), plain_number("alpha", alpha)
    check_rows("z_a", z_a)
    check_rows("z_b", z_b, like=z_a)
    if z_b.shape != z_a.shape:
        raise ValueError(f"z_b: expected shape {list(z_a.shape)}, as z_a, got {list(z_b.shape)}")
    if z_a.shape[0] == 0:
        return (unit(z_a) * unit(z_b)).sum()
    aligned = alignment(z_a, z_b, alpha)
    if z_a.shape[0] == 1:
        return aligned
    return aligned + lam * (uniformity(z_a, t) + uniformity(z_b, t)) / 2


def ldreg_loss(
    embeddings: Tensor, *, k: int = 64, reduction: str = "mean", gather: bool = False, group: Any = None
) -> Tensor:
    """The stateless form of :class:`LDRegLoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    try:
        k = check_count("k", k, least=2)
        check_option("reduction", reduction, REDUCTIONS)
        check_rows("embeddings", embeddings)
    except Exception as error:
        tell_others(gather, error, embeddings, group=group)
        raise
    # float64, because squared distances are the small differences of squared norms.
    x = embeddings.double()
    reference, first, world = x.detach(), 0, World.of(gather, group)
    if world is not None:
        alike: dict[str, Property] = {"dimension": x.shape[1], "k": k, "reduction": reduction}
        sizes = world.agree("LDRegLoss", {"rows": len(x)}, alike, x.device)[0]
        reference, first = world.all_rows(reference, sizes), sum(sizes[: world.rank])
    n, k = len(reference), min(k, len(reference) - 1)
    if k < 2:
        terms = x.sum(1) * 0
    else:
        middle = reference.mean(0)
        x, reference = x - middle, reference - middle
        terms = -_log_dimension(x, reference, k, first).abs()
    if reduction != "mean" or world is None:
        total = reduced(terms, reduction, embeddings)
        return total if world is None or reduction == "none" else total * world.size
    return reduced(terms, "sum", embeddings) * world.size / max(n, 1)


class KoLeoLoss(nn.Module):
    r"""KoLeo (Sablayrolles et al. 2019; DINOv2): drives each embedding away from its nearest neighbour in the batch.

    .. math:: l_i = -\log( |\hat x_i - \hat x_{n(i)}| + \epsilon ), \qquad
              n(i) = \operatorname{argmax}_{j \neq i} \langle \hat x_i, \hat x_j \rangle

    ``KoLeoLoss()(embeddings)`` is lightly's call. The neighbour is exact (:func:`topk_similarity`), no similarities are
    stored, and both ends of a pair get gradients. The distance is computed from the difference of the rows, so that
    near neighbours keep their digits; at distance 0 the gradient is 0.

    Args:
        p: the norm of the distance, a finite number of at least 1. The neighbour is always the nearest by cosine.
        eps: > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A single embedding has loss 0.

    Shapes of ``forward(embeddings)``: ``[N, D]``; float64, float32, bfloat16 or float16.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``. float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, p: float = 2.0, eps: float = 1e-8, *, reduction: str = "mean") -> None:
        super().__init__()
        self.p, self.eps = _norm(p), plain_number("eps", eps)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return koleo_loss(embeddings, p=self.p, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, eps={self.eps:g}, reduction={self.reduction!r}"


class LDRegLoss(GroupModule):
    r"""LDReg (Huang et al. 2024): raises the local intrinsic dimensionality of embeddings; added to another loss.

    With :math:`d_{i1} \le \dots \le d_{ik}` the Euclidean distances of row i from its k nearest other rows,

    .. math:: l_i = -\left| \log \mathrm{LID}_i \right|, \qquad \mathrm{LID}_i = \frac{m_i}{d_{ik} - m_i}, \qquad
              m_i = \frac{1}{k - 1} \sum_{j < k} d_{ij}

    the estimate by the method of moments. The other rows are a reference without gradient. ``0.01 * LDRegLoss()(h)`` is
    what the paper adds for the representations h of SimCLR. The neighbours are exact (:func:`topk_similarity`), and no
    N x N distances are stored. The numerator and the denominator of a LID are at least the smallest normal number of
    float32, with gradient 0 there: equal rows keep the loss finite.

    Args:
        k: number of neighbours, at least 2; in a smaller batch all other rows. The paper has 64.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Fewer than three rows have loss 0.
        gather: neighbours among the rows of all processes of a group; no effect without a group. Each process returns
            W times its share of the loss of the whole batch.

    Shapes of ``forward(embeddings)``: ``[N, D]``, not normalised; float64, float32, bfloat16 or float16. Computed in
    float64.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``. float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(self, k: int = 64, *, reduction: str = "mean", gather: bool = False, group: Any = None) -> None:
        super().__init__()
        self.k = check_count("k", k, least=2)
        check_option("reduction", reduction, REDUCTIONS)
        check_flag("gather", gather)
        check_group(group, gather)
        self.reduction, self.gather, self.group = reduction, gather, group

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return ldreg_loss(embeddings, k=self.k, reduction=self.reduction, gather=self.gather, group=self.group)

    def extra_repr(self) -> str:
        gather = ", gather=True" if self.gather else ""
        return f"k={self.k}, reduction={self.reduction!r}{gather}"


class HypersphereLoss(nn.Module):
    r"""Alignment and uniformity (Wang and Isola 2020): views of a sample agree, and each view spreads over the sphere.

    .. math:: \operatorname{mean}_i |\hat a_i - \hat b_i|^\alpha + \frac\lambda2 \left( \log
              \operatorname{mean}_{i \neq j} e^{-t |\hat a_i - \hat a_j|^2} + \log \operatorname{mean}_{i \neq j}
              e^{-t |\hat b_i - \hat b_j|^2} \right)

    ``HypersphereLoss()(z_a, z_b)`` is lightly's call; :func:`alignment` and :func:`uniformity` are its parts. Distances
    are not stored, unless those of a view are no more than the numbers in both views.

    Args:
        t: > 0.
        lam: :math:`\lambda`, any finite number.
        alpha: > 0.

    Shapes of ``forward(z_a, z_b)``: ``[N, D]`` both; float64, float32, bfloat16 or float16. A single pair has no
    uniformity, and no pairs have loss 0.

    Returns:
        A scalar, float32, or float64 if one set of rows is. It is no sum over rows and has no ``reduction``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(self, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        self.t, self.lam, self.alpha = plain_number("t", t), finite_number("lam", lam), plain_number("alpha", alpha)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return hypersphere_loss(z_a, z_b, t=self.t, lam=self.lam, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"t={self.t:g}, lam={self.lam:g}, alpha={self.alpha:g}"


def _log_dimension(x: Tensor, reference: Tensor, k: int, first: int) -> Tensor:
    """log LID [N] of rows, which are rows `first` and following of the reference."""
    own, ids = (torch.arange(len(rows), device=x.device) for rows in (x, reference))
    # The nearest rows y have the largest <x, y> - |y|^2 / 2: an inner product with one more column.
    squares = reference.square().sum(1)
    keys = torch.cat([reference, squares[:, None] / -2], 1)
    queries = torch.cat([x.detach(), x.new_ones(len(x), 1)], 1)
    nearest = topk_similarity(queries, keys, k, query_ids=own + first, key_ids=ids)[1]
    squared = x.square().sum(1, keepdim=True) + squares[nearest] - 2 * sampled_similarity(x, reference, nearest)
    tiny = torch.finfo(torch.float32).tiny
    distances = squared.clamp(min=tiny**2).sqrt()
    middle, last = distances[:, :-1].mean(1), distances[:, -1]
    return middle.clamp(min=tiny).log() - (last - middle).clamp(min=tiny).log()


def _norm(p: float) -> float:
    p = finite_number("p", p)
    if p < 1:
        raise ValueError(f"p: expected a number of at least 1, got {p}")
    return p
