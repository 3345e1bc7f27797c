"""ArcFace and multi-similarity of few rows on a CPU, around calls of the engine: see `ops.at_once`.

The formulas are those of `metric`. `arcface` and `multi_similarity` return None for a call that takes the usual way:
one that is unusual, large or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..ops.at_once import Gradients, Units, at_once, through_norms, units_of, weight_of
from ..ops.backends.choose import chooses_cpu
from ..ops.contrastive.small_statistics import LogSums
from ..ops.library import intercepted
from ..ops.small import MOST_ROWS, are_floats, are_ids, are_plain, constant, is_small, places, real_of


def arcface(embeddings: Any, labels: Any, prototypes: Any, margin: Any, scale: Any, reduction: Any) -> Tensor | None:
    """margin: in degrees."""
    if prototypes is None or not _are_few(embeddings, labels, prototypes):
        return None
    if not (are_floats(scale, positive=True) and are_floats(margin) and 0 <= margin <= 180):
        return None
    weight, rows, classes = weight_of(reduction, len(embeddings)), units_of(embeddings), units_of(prototypes)
    if weight is None or rows is None or classes is None:
        return None
    try:
        own = _of_own_class(classes, labels)
    except IndexError:  # a label that is no class
        return None
    work = partial(_arcface, [(rows, classes, own)], math.radians(margin), scale, weight)
    return at_once(work, "contrastive_stats", embeddings, prototypes, labels)


def multi_similarity(
    embeddings: Any, labels: Any, contrasts: Any, contrast_labels: Any, alpha: Any, beta: Any, base: Any, reduction: Any
) -> Tensor | None:
    """Without ids."""
    if (contrasts is None) != (contrast_labels is None) or not _are_few(embeddings, labels, contrasts, contrast_labels):
        return None
    weight = weight_of(reduction, len(embeddings))
    if weight is None or not (are_floats(alpha, beta, positive=True) and are_floats(base)):
        return None
    work = partial(_multi_similarity, alpha, beta, base, weight)
    return at_once(work, "contrastive_stats", embeddings, contrasts, labels, contrast_labels)


def _are_few(rows: Any, labels: Any, others: Any, other_labels: Any = None) -> bool:
    """Whether rows and labels, and those of a second set where it has them, are few and plain."""
    if torch.compiler.is_compiling() or not (are_plain(rows) and are_ids(labels, len(rows)) and chooses_cpu()):
        return False
    if others is not None and not (are_plain(others) and others.shape[1] == rows.shape[1]):
        return False
    if other_labels is not None and not are_ids(other_labels, len(others)):
        return False
    return is_small(rows, others) and not intercepted(rows, labels, others, other_labels)


def _of_own_class(classes: Units, labels: Tensor) -> Tensor:
    """[N, D]: the unit vectors of the labels' classes."""
    return classes.rows.index_select(0, labels.to(torch.int64))


def _arcface(
    first: list[tuple[Units, Units, Tensor]],
    margin: float,
    scale: float,
    weight: float,
    needs: Sequence[bool],
    *tensors: Tensor,
) -> tuple[Tensor, Gradients]:
    """first: has what the call has made, until it is used. Another backward makes it again."""
    embeddings, prototypes, labels = tensors
    if first:
        rows, classes, own = first.pop()
    else:
        units = [units for units in (units_of(embeddings), units_of(prototypes)) if units is not None]
        (rows, classes), own = units, _of_own_class(units[1], labels)
    x, y = rows.rows, classes.rows
    labels = labels.to(torch.int64).contiguous()
    # The arccosine loses half the digits near 0 and pi.
    sides = torch.empty((2, *x.shape), dtype=x.dtype, device="cpu")
    torch.sub(x, own, out=sides[0])
    torch.add(x, own, out=sides[1])
    lengths = torch.linalg.vector_norm(sides, dim=2)
    angles = torch.atan2(lengths[0], lengths[1]).mul_(2)
    moved = angles + margin
    easy = None if angles.amax().item() <= math.pi - margin else angles <= math.pi - margin
    cosines = moved.cos()
    if easy is not None:
        cosines = torch.where(easy, cosines, angles.cos().sub_(margin * math.sin(margin)))
        moved = torch.where(easy, moved, angles)
    others, gradients = _other_classes(x, y, labels, scale)
    ratios = others.sub_(cosines, alpha=scale)
    loss = _softplus(ratios).sum().mul_(weight)
    if not (needs[0] or needs[1]):
        return loss, (None, None, None)
    of_ratios = ratios.sigmoid_().mul_(weight)
    of_rows, of_classes = gradients(of_ratios, needs)
    # The derivatives of the angle in the two sides, whose squared lengths add up to 4. At a length of 0 they are 0.
    of_angles = moved.sin_().mul_(of_ratios).mul_(scale / 2)
    slopes = lengths.flip(0).mul_(of_angles).div_(lengths.clamp_(min=torch.finfo(x.dtype).tiny ** 0.5))
    minus, plus = sides.mul_(slopes.unsqueeze_(2)).unbind(0)
    if of_rows is not None:
        of_rows = through_norms(of_rows.add_(minus).sub_(plus), rows)
    if of_classes is not None:
        of_classes = through_norms(of_classes.index_add_(0, labels, plus.add_(minus), alpha=-1), classes)
    return loss, (of_rows, of_classes, None)


def _other_classes(
    x: Tensor, y: Tensor, labels: Tensor, scale: float
) -> tuple[Tensor, Callable[[Tensor, Sequence[bool]], Sequence[Tensor | None]]]:
    """The log-sum-exp [N] of the logits of all classes but the own one, and a function of its gradient: those of x, y.

    x, y: unit rows.
    """
    n, c = len(x), len(y)
    if n * c > (n + c) * x.shape[1]:
        own = places(c, 1, c) if c <= MOST_ROWS else torch.arange(c, device="cpu")
        sums = LogSums(x, y, labels, own, constant(scale, x.dtype, (1,)), False, ("lse_neg",))
        return sums.fields[0, 0], lambda grad, needs: sums.gradients(grad.view(1, 1, n), needs[:2])
    # No more logits than numbers in x and y: products in plain PyTorch are faster than two calls of the engine.
    terms = torch.addmm(constant(0.0, x.dtype), x, y.T, beta=0, alpha=scale).scatter_(1, labels[:, None], -torch.inf)
    largest = terms.amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    total = terms.sub_(largest).exp_().sum(1)

    def gradients(grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        weights = terms.mul_((grad / total.clamp(min=torch.finfo(x.dtype).tiny)).mul_(scale).unsqueeze_(1))
        return weights @ y if needs[0] else None, weights.T @ x if needs[1] else None

    return total.log().add_(largest.squeeze(1)), gradients


def _multi_similarity(
    alpha: float, beta: float, base: float, weight: float, needs: Sequence[bool], *tensors: Tensor
) -> tuple[Tensor, Gradients]:
    embeddings, contrasts, labels, contrast_labels = tensors
    dtype = real_of(embeddings)
    own, other = (
        None if ids is None else ids.to(torch.int64).clamp(min=-1).contiguous() for ids in (labels, contrast_labels)
    )
    sums = LogSums(embeddings, contrasts, own, other, _two(-alpha, beta, dtype), True, ("lse_pos", "lse_neg"))
    # Of the two fields at the two scales, positives at the first and negatives at the second.
    ratios = torch.stack((sums.fields[0, 0] + alpha * base, sums.fields[1, 1] - beta * base))
    loss = _softplus(ratios).sum(1).div_(_two(alpha, beta, dtype)).sum().mul_(weight)
    if not (needs[0] or needs[1]):
        return loss, (None,) * 4
    of_fields = torch.zeros_like(sums.fields)
    of_ratios = ratios.sigmoid_()
    torch.mul(of_ratios[0], weight / alpha, out=of_fields[0, 0])
    torch.mul(of_ratios[1], weight / beta, out=of_fields[1, 1])
    return loss, (*sums.gradients(of_fields, needs[:2]), None, None)


def _softplus(ratios: Tensor) -> Tensor:
    """`formulas.log1p_exp`."""
    return torch.logaddexp(ratios, constant(0.0, ratios.dtype))


@lru_cache(maxsize=64)
def _two(first: float, second: float, dtype: torch.dtype) -> Tensor:
    """[2]. It is only read."""
    with torch.inference_mode(False):
        return torch.tensor([first, second], dtype=dtype, device="cpu")
