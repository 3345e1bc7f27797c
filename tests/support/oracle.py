"""What fastcl computes, written from its contract as plainly as possible: dense masks, dense logits, torch's autograd.

Nothing here is shared with the library. In float64 these formulas are the truth; in float32 the same formulas are
"eager PyTorch", whose own error sets the tolerance (`tolerances`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIELDS = ("lse_all", "lse_pos", "lse_neg", "sum_pos", "sum_all")


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate a formula.

    dtype: of everything. order: seed of a permutation of features and rows in the product (None: as they come).
    scale_first: multiply the anchors by inverse norm and scale before the product, rather than the tile after it.
    part: to measure what cancels. "constant norms": hold norms and the sum of weights constant in the derivative, whose
    part is a projection. "denominator", "positives": also leave only that term of a loss; of a row with one positive,
    whose loss is a function of their difference, hold the other one constant.
    """

    dtype: torch.dtype = torch.float64
    order: int | None = None
    scale_first: bool = False
    part: str | None = None


TRUTH = Evaluation()
CONSTANT_NORMS = Evaluation(part="constant norms")
CANCELLING = (Evaluation(part="denominator"), Evaluation(part="positives"))


def eager_evaluations(dtype: torch.dtype = torch.float32) -> list[Evaluation]:
    """Equivalent evaluations in `dtype` that differ in their roundings."""
    return [
        Evaluation(dtype),
        Evaluation(dtype, scale_first=True),
        Evaluation(dtype, order=1),
        Evaluation(dtype, order=2, scale_first=True),
        Evaluation(dtype, order=3),
    ]


def _inverse_norms(rows: Tensor, constant: bool) -> Tensor:
    """1 / max(|x|, 1e-12), [N]; 0, with gradient 0, for a row of zeros."""
    zero = (rows == 0).all(1, keepdim=True)
    norms = torch.where(zero, 1.0, rows).norm(dim=1).clamp(min=1e-12)
    if constant:
        norms = norms.detach()
    return torch.where(zero[:, 0], 0.0, 1 / norms)


def similarities(
    x: Tensor, y: Tensor, scale: float | Tensor, normalize_x: bool, normalize_y: bool, how: Evaluation
) -> Tensor:
    """scale * a_i * c_j * <x_i, y_j>, [N, M]."""
    a = _inverse_norms(x, how.part is not None) if normalize_x else x.new_ones(len(x))
    c = _inverse_norms(y, how.part is not None) if normalize_y else y.new_ones(len(y))
    if how.order is not None:
        generator = torch.Generator().manual_seed(how.order)
        features = torch.randperm(x.shape[1], generator=generator)
        rows = torch.randperm(len(x), generator=generator)
        columns = torch.randperm(len(y), generator=generator)
        x, a = x[rows][:, features], a[rows]
        y, c = y[columns][:, features], c[columns]
    s = (x * (a * scale)[:, None]) @ (y * c[:, None]).T if how.scale_first else (x @ y.T) * a[:, None] * c * scale
    return s if how.order is None else s[rows.argsort()][:, columns.argsort()]


def _lse(s: Tensor, mask: Tensor) -> Tensor:
    """Logsumexp of each row of s over its mask; -inf, with gradient 0, where the mask is empty."""
    some = mask.any(1)
    safe = torch.where(mask, s, float("-inf"))
    safe = torch.where(some[:, None], safe, 0.0)
    if s.shape[1] == 0:
        return s.sum(1) - torch.inf
    return torch.where(some, safe.logsumexp(1), float("-inf"))


def _sum(s: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, s, 0.0).sum(1)


# The op


def op_masks(
    n: int,
    m: int | None,
    anchor_clusters: Tensor | None,
    contrast_clusters: Tensor | None,
    anchor_ids: Tensor | None,
    contrast_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masks of positives and of negatives, [N, M] each. m = None: self-contrast."""
    if m is None:
        admissible = ~torch.eye(n, dtype=torch.bool)
        contrast_clusters = anchor_clusters
    else:
        admissible = torch.ones(n, m, dtype=torch.bool)
        if anchor_ids is not None:
            a, c = anchor_ids.long()[:, None], contrast_ids.long()[None, :]
            admissible &= ~((a == c) & (a >= 0))
    if anchor_clusters is None:
        return torch.zeros_like(admissible), admissible
    a, c = anchor_clusters.long()[:, None], contrast_clusters.long()[None, :]
    same = (a == c) & (a >= 0)
    return admissible & same, admissible & ~same


def contrastive_stats(
    anchors: Tensor,
    contrasts: Tensor | None = None,
    anchor_clusters: Tensor | None = None,
    contrast_clusters: Tensor | None = None,
    *,
    logit_scale: float | Tensor = 1.0,
    normalize_anchors: bool = False,
    normalize_contrasts: bool = False,
    contrast_bias: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    want: Sequence[str] = FIELDS,
    both: bool = False,
    how: Evaluation = TRUTH,
) -> dict[str, Tensor]:
    """Every field of `want` plus "num_pos" and "num_neg"; with `both` also under "reverse." + name."""
    x = anchors.to(how.dtype)
    y = x if contrasts is None else contrasts.to(how.dtype)
    if contrasts is None:
        normalize_contrasts = normalize_anchors
    positive, negative = op_masks(
        len(x), None if contrasts is None else len(y), anchor_clusters, contrast_clusters, anchor_ids, contrast_ids
    )
    if contrast_bias is not None:  # -inf leaves a contrast out
        positive, negative = (mask & (contrast_bias != -torch.inf) for mask in (positive, negative))
    scale = torch.as_tensor(logit_scale, dtype=how.dtype)
    result: dict[str, list[Tensor]] = {}
    for one_scale in scale.reshape(-1).unbind():
        s = similarities(x, y, one_scale, normalize_anchors, normalize_contrasts, how)
        if contrast_bias is not None:
            s = s + contrast_bias.to(how.dtype)[None, :]
        for prefix, t, pos, neg in (("", s, positive, negative), ("reverse.", s.T, positive.T, negative.T)):
            if prefix and not both:
                continue
            everything = {
                "lse_all": _lse(t, pos | neg),
                "lse_pos": _lse(t, pos),
                "lse_neg": _lse(t, neg),
                "sum_pos": _sum(t, pos),
                "sum_all": _sum(t, pos | neg),
            }
            for name in want:
                result.setdefault(prefix + name, []).append(everything[name])
    fields = {k: torch.stack(v) if scale.dim() == 1 else v[0] for k, v in result.items()}
    for prefix, pos, neg in (("", positive, negative), ("reverse.", positive.T, negative.T)):
        if not prefix or both:
            fields[prefix + "num_pos"] = pos.sum(1).to(how.dtype)
            fields[prefix + "num_neg"] = neg.sum(1).to(how.dtype)
    return fields


# The losses


@functools.lru_cache(maxsize=16)
def loss_masks(
    samples: int,
    views: int,
    clusters: tuple[int, ...] | None,
    m: int | None,
    contrast_clusters: tuple[int, ...] | None,
    ids: tuple[int, ...] | None,
    contrast_ids: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Masks of positives and of negatives for the flattened rows, pair by pair. m = None: self-contrast."""
    rows = samples * views
    sample_of = [row // views for row in range(rows)]
    cluster_of = [sample if clusters is None else clusters[sample] for sample in sample_of]

    def admissible(i: int, j: int) -> bool:
        if m is None:
            return i != j
        if ids is None:
            return True
        return ids[sample_of[i]] < 0 or ids[sample_of[i]] != contrast_ids[j]

    def belongs(i: int, j: int) -> bool:
        if m is None:
            if sample_of[i] == sample_of[j]:
                return True
            other = cluster_of[j]
        elif contrast_clusters is None:
            if j >= rows:
                return False
            if sample_of[i] == sample_of[j]:
                return True
            if clusters is None:
                return False
            other = cluster_of[j]
        else:
            other = contrast_clusters[j]
        return cluster_of[i] >= 0 and cluster_of[i] == other

    columns = rows if m is None else m
    positive = torch.zeros(rows, columns, dtype=torch.bool)
    negative = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            if admissible(i, j):
                (positive if belongs(i, j) else negative)[i, j] = True
    return positive, negative


def loss_rows(
    s: Tensor,
    positive: Tensor,
    negative: Tensor,
    form: str,
    denominator: str,
    part: str | None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, 0 where it does not count, and which rows count, from logits that have their margin already.

    With one positive the difference of log-sums is log(1 + neg / pos), which cancels nothing in any dtype.
    """
    counts = positive.any(1) & (negative.any(1) if denominator == "negatives" else positive.any(1))
    s, positive, negative = s[counts], positive[counts], negative[counts]
    size = positive.sum(1).to(s.dtype)
    bottom = _lse(s, negative if denominator == "negatives" else positive | negative)
    top = _sum(s, positive) / size if form == "outside" else _lse(s, positive) - size.log()
    if label_smoothing:
        everything = positive | negative
        top = (1 - label_smoothing) * top + label_smoothing * _sum(s, everything) / everything.sum(1)
    rows = {"denominator": bottom, "positives": top}.get(part, bottom - top)
    if denominator == "all" and not label_smoothing:
        of_negatives, of_positive = _lse(s, negative), _sum(s, positive)
        if part == "denominator":
            of_positive = of_positive.detach()
        elif part == "positives":
            of_negatives = of_negatives.detach()
        log_ratio = of_negatives - of_positive
        rows = torch.where(size == 1, torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)), rows)
    return s.new_zeros(len(counts)).masked_scatter(counts, rows), counts


def pair_rows(
    s: Tensor, positive: Tensor, negative: Tensor, form: str, part: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the sum of its pairs' losses, whether it counts, and the number of pairs that a mean divides by.

    "pairs": of each positive against the negatives. "sigmoid": of every pair by itself; a mean is over rows.
    """
    if form == "sigmoid":
        zero = torch.zeros_like(s)
        each = torch.where(positive, torch.logaddexp(zero, -s), 0) + torch.where(negative, torch.logaddexp(zero, s), 0)
        counts = (positive | negative).any(1)
        return each.sum(1), counts, torch.ones_like(s[:, 0]) if s.shape[1] else s.new_ones(len(s))
    counts = positive.any(1)
    of_negatives = _lse(s, negative)
    if part == "positives":
        of_negatives = of_negatives.detach()
    log_ratio = of_negatives[:, None] - (s.detach() if part == "denominator" else s)
    log_ratio = torch.where(positive, log_ratio, -torch.inf)
    far = log_ratio == -torch.inf
    each = torch.where(far, 0, torch.logaddexp(torch.where(far, 0, log_ratio), torch.zeros_like(s)))
    return each.sum(1), counts, positive.sum(1).to(s.dtype)


def cluster_infonce(
    embeddings: Tensor,
    clusters: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    form: str = "outside",
    denominator: str = "all",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    positives: Tensor | None = None,
    contrasts: Tensor | list[Tensor] | None = None,
    contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
    bias: float | Tensor = 0.0,
    how: Evaluation = TRUTH,
) -> Tensor:
    """bias: added to all logits."""
    shape = embeddings.shape[:-1]
    samples, views = shape[0], 1 if embeddings.dim() == 2 else shape[1]
    if isinstance(contrasts, list):
        contrasts = torch.cat([part.to(how.dtype) for part in contrasts])
    x = embeddings.to(how.dtype).reshape(samples * views, -1)
    y = x if contrasts is None else contrasts.to(how.dtype)
    temperature = torch.as_tensor(temperature, dtype=how.dtype)

    as_list = [None if t is None else tuple(t.tolist()) for t in (clusters, contrast_clusters, ids, contrast_ids)]
    positive, negative = loss_masks(
        samples, views, as_list[0], None if contrasts is None else len(y), as_list[1], as_list[2], as_list[3]
    )
    s = similarities(x, y, 1 / temperature, normalize, normalize, how)
    bias = torch.as_tensor(bias, dtype=how.dtype)
    s = s - positive.to(how.dtype) * margin / temperature + bias
    if contrast_bias is not None:
        s = s + contrast_bias.to(how.dtype)[None, :]
        positive, negative = (mask & (contrast_bias != -torch.inf) for mask in (positive, negative))

    forward_s, forward_positive, forward_negative = s, positive, negative
    if positives is not None:
        p = positives.to(how.dtype).reshape(samples * views, -1)
        cosines = x * p
        if normalize:
            a, c = _inverse_norms(x, how.part is not None), _inverse_norms(p, how.part is not None)
            cosines = cosines * a[:, None] * c[:, None]
        extra = (cosines.sum(1) - margin) / temperature + bias
        forward_s = torch.cat([s, extra[:, None]], 1)
        forward_positive = torch.cat([positive, torch.ones(len(x), 1, dtype=torch.bool)], 1)
        forward_negative = torch.cat([negative, torch.zeros(len(x), 1, dtype=torch.bool)], 1)

    def loss(s: Tensor, positive: Tensor, negative: Tensor, w: Tensor) -> Tensor:
        if form in ("pairs", "sigmoid"):
            found, counts, sizes = pair_rows(s, positive, negative, form, how.part)
            if reduction == "none":
                return found / sizes.clamp(min=1) * w
            total, weight = (found * w).sum(), (w * sizes)[counts].sum()
            if how.part is not None:
                weight = weight.detach()
            return total if reduction == "sum" else total / weight if weight > 0 else total * 0
        found, counts = loss_rows(s, positive, negative, form, denominator, how.part, label_smoothing)
        return _reduce(found, counts, w, reduction, how.part)

    w = torch.ones(samples) if weights is None else weights
    result = loss(forward_s, forward_positive, forward_negative, w.to(how.dtype).repeat_interleave(views))
    if symmetric:
        result = (result + loss(s.T, positive.T, negative.T, s.new_ones(s.shape[1]))) / 2
    return result.reshape(shape) if reduction == "none" else result


def _reduce(rows: Tensor, counts: Tensor, w: Tensor, reduction: str, part: str | None) -> Tensor:
    if reduction == "none":
        return rows * w
    total = (rows * w).sum()
    if reduction == "sum":
        return total
    weight = w[counts].sum()
    if part is not None:
        weight = weight.detach()
    return total / weight if weight > 0 else total * 0


def sigmoid_loss(embeddings: Tensor, clusters: Tensor | None = None, **options: Any) -> Tensor:
    return cluster_infonce(embeddings, clusters, form="sigmoid", **options)


# Derivatives


def differentiate(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    leaves: Sequence[str],
    objective: Callable[[Any], Tensor],
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """The result of `function(**arguments, **options)`, and the gradient of `objective(result)` in each of `leaves`.

    dtype: of the leaves; None: as they are stored.
    """
    inputs = {name: arguments[name].detach().to(dtype or arguments[name].dtype).requires_grad_() for name in leaves}
    result = function(**{**arguments, **inputs}, **options)
    gradients = torch.autograd.grad(objective(result), list(inputs.values()), materialize_grads=True)
    return result, dict(zip(leaves, gradients, strict=True))
