"""The mean of `cluster_infonce` for few rows, where checks and views would take longer than the sweep.

`loss_of` and `ClipLoss` try `mean_on_cpu` and `small_mean` first. A call for which they return None takes the usual
way: on a GPU also the first two of a kind, on a CPU also each that is refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import scalar_tensor
from ..memory_state import Memory
from ..ops.backends.choose import chooses_cpu
from ..ops.contrastive import replayed, small
from ..ops.contrastive.records import Problem
from ..ops.library import intercepted
from ..ops.pairs.small_infonce import mean_of_pairs
from ..ops.small import PLAIN, are_ids, are_plain, are_rows, in_range, is_number, needs_gradient, places
from ..swept import arguments
from ..tags import are_tags
from .batch import Tensors, batch
from .formulas import infonce
from .options import LossOptions


def small_mean(given: Tensors, options: LossOptions, scale: float | Tensor, name: str) -> Tensor | None:
    """The loss on a GPU, where checks and views are part of what a tape replays; None where it is not replayed.

    options: checked. scale: positive. name: what the scale is: "logit_scale", or "temperature", which is 1 / scale.
    """
    embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, bias, *others = given
    tensors: tuple[Any, ...] = (embeddings, contrasts, bias, positives, clusters, contrast_clusters, ids, contrast_ids)
    if not replayed.takes(*tensors) or any(other is not None and other is not False for other in others):
        return None
    if options.reduction != "mean" or options.gather is not False or not infonce(options).mean_of_differences():
        return None
    # Tags, duplicates, and a positive for several views; what is refused, the usual way refuses.
    if are_tags(clusters) or (positives is not None and positives.shape != embeddings.shape):
        return None
    if contrasts is None and (ids is not None or options.symmetric):
        return None
    inverted = name == "temperature"
    number = isinstance(scale, Tensor)
    scale = 1 / scale if inverted and not number else scale
    scale = scalar_tensor(name, scale, embeddings.device, torch.float32)
    scale = 1 / scale if inverted and number else scale
    own, other, *rest = tensors
    return replayed.mean_loss(_build, options, own, other, scale, *rest)


def _build(options: LossOptions, only_anchors: bool, backend: str, *tensors: Any) -> tuple[Any, ...]:
    """`replayed.Build`, with all checks."""
    embeddings, contrasts, scale, bias, positives, clusters, contrast_clusters, ids, contrast_ids = tensors
    given = Tensors(embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, bias)
    rows = batch(given, options.normalize)
    want = infonce(options).wanted()
    problem = Problem(rows.anchors, rows.contrasts, rows.positives, scale, want, options.symmetric)
    return arguments(problem, list(want), only_anchors, backend)


def mean_on_cpu(
    given: Tensors, options: LossOptions, scale: Any, inverted: bool, weights: Any = None, return_stats: Any = False
) -> Tensor | None:
    """The loss of a valid small call on a CPU, in one call of the engine; None for other calls.

    options: checked. scale: unchecked. inverted: it is the temperature.
    """
    if torch.compiler.is_compiling() or weights is not None or return_stats is not False:
        return None
    if options.gather is not False:  # first, as `_is_mean` would keep a group alive
        return None
    if options.form == "pairs":
        return _pairs_on_cpu(given, options, scale, inverted)
    if not _is_mean(options):
        return None
    if given.positives is not None:
        return None if options.denominator == "negatives" else _queue_on_cpu(given, options, scale, inverted)
    hard = given.hard_negatives
    if hard is not None:
        if not _are_hard(hard, given.embeddings):
            return None
        given = given._replace(hard_negatives=None)
    rows = rows_on_cpu(given, options, scale)
    if rows is None:
        return None
    return small.mean_loss(
        given.embeddings, *rows, scale, inverted=inverted, normalize=options.normalize,
        symmetric=options.symmetric, negatives_only=options.denominator == "negatives", hard_negatives=hard,
    )  # fmt: skip


def _are_hard(value: Any, embeddings: Any) -> bool:
    """Whether it is a contiguous tensor of hard negatives of each embedding, on the CPU, of torch's own types."""
    if type(value) not in PLAIN or not isinstance(embeddings, Tensor) or not value.is_cpu or intercepted(value):
        return False
    shape = *embeddings.shape[:-1], value.shape[-2] if value.dim() > 1 else 0, embeddings.shape[-1]
    return bool(value.shape == shape and value.numel() > 0 and value.is_contiguous())


def _pairs_on_cpu(given: Tensors, options: LossOptions, scale: Any, inverted: bool) -> Tensor | None:
    """The mean over pairs; None for other calls."""
    if options.reduction != "mean" or options.symmetric or given.positives is not None:
        return None
    rows = rows_on_cpu(given, options, scale)
    if rows is None:
        return None
    return mean_of_pairs(
        given.embeddings, *rows, scale, inverted=inverted, normalize=options.normalize, margin=options.margin
    )


def _queue_on_cpu(given: Tensors, options: LossOptions, scale: Any, inverted: bool) -> Tensor | None:
    """The mean with a positive of each anchor's own and contrasts that are all negatives; None for other calls."""
    embeddings, clusters, positives, contrasts, contrast_clusters, *others = given
    if clusters is not None or options.symmetric or any(other is not None and other is not False for other in others):
        return None
    if positives is None or not same_shape(embeddings, positives) or not (chooses_cpu() and is_number(scale)):
        return None
    stored = isinstance(contrasts, Memory)
    if isinstance(contrasts, Memory):
        found = contrasts.stored(False)
        if contrast_clusters is not None or found.clustered or found.ids is not None:
            return None
        rows = found.rows
    elif isinstance(contrasts, Tensor) and are_ids(contrast_clusters, len(contrasts)):
        rows = contrasts
    else:
        return None
    if not (are_plain(embeddings, positives, rows) and embeddings.shape[1] == rows.shape[1]):
        return None
    if (embeddings.dtype == torch.float64) != (rows.dtype == torch.float64) or needs_gradient(rows):
        return None
    if intercepted(embeddings, positives, rows, contrast_clusters, scale if isinstance(scale, Tensor) else None):
        return None
    if not in_range(scale, positive=True) or (contrast_clusters is not None and int(contrast_clusters.amax()) >= 0):
        return None
    return small.queue_loss(
        embeddings, positives, rows, scale, inverted=inverted, normalize=options.normalize,
        normalize_contrasts=options.normalize and not stored,
    )  # fmt: skip


def same_shape(left: Any, right: Any) -> bool:
    """Whether both are tensors, of the same shape, outside of a compiler."""
    if torch.compiler.is_compiling() or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    return left.shape == right.shape


@lru_cache(maxsize=128)
def _is_mean(options: LossOptions) -> bool:
    return options.reduction == "mean" and infonce(options).mean_of_differences()


def rows_on_cpu(
    given: Tensors, options: LossOptions, scale: Any, offset: Any = 0.0
) -> tuple[Tensor | None, Tensor, Tensor | None] | None:
    """The contrasts, and the clusters of anchors [N * V] and of contrasts [M], of a valid call on a CPU, else None.

    Clusters are int64 and contiguous; in self-contrast negative clusters mean none, of two sets only -1. Only calls of
    tensors whose clusters are cheap to find. Not under a compiler.

    scale, offset: what else the call needs: a positive and a finite number.
    """
    (
        embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, bias,
        assignments, contrast_assignments, groups, contrast_groups, guide, hard_negatives, keep_pairs,
    ) = given  # fmt: skip
    if guide is not None or keep_pairs is not False or not (positives is ids is contrast_ids is bias is None):
        return None
    if not assignments is contrast_assignments is groups is contrast_groups is hard_negatives is None:
        return None
    if not (are_rows(embeddings) and chooses_cpu() and is_number(scale) and is_number(offset)):
        return None
    shape = embeddings.shape
    n, views = shape[0], shape[1] if len(shape) == 3 else 1
    count = rows = n * views
    if contrasts is not None:
        if not isinstance(contrasts, Tensor) or not are_rows(contrasts):
            return None
        if contrasts.dim() != 2 or contrasts.shape[1] != shape[-1]:
            return None
        count = contrasts.shape[0]
    elif contrast_clusters is not None or options.symmetric or (clusters is None and views == 1):
        return None
    if clusters is not None and not are_ids(clusters, n):
        return None
    if contrast_clusters is None:
        if count < rows:
            return None
    elif clusters is None or not are_ids(contrast_clusters, count):
        return None
    numbers = [value for value in (scale, offset) if isinstance(value, Tensor)]
    if intercepted(embeddings, contrasts, clusters, contrast_clusters, *numbers):
        return None
    if not (in_range(scale, positive=True) and in_range(offset, positive=False)):
        return None
    if clusters is None:
        return contrasts, places(n, views, rows), None if contrasts is None else places(n, views, count)
    dense = clusters.dtype == torch.int64 and clusters.is_contiguous()
    own = clusters if dense else clusters.to(torch.int64).contiguous()
    if contrasts is None and views == 1:
        return None, own, None
    if int(own.amin()) < 0:  # a row in no cluster is a positive of its sample's other rows
        return None
    own = own if views == 1 else own.repeat_interleave(views)
    if contrasts is None:
        return None, own, None
    if contrast_clusters is not None:
        return contrasts, own, contrast_clusters.to(torch.int64).clamp(min=-1).contiguous()
    return contrasts, own, own if count == rows else torch.cat((own, own.new_full((count - rows,), -1)))
