"""The mean of `cluster_infonce` for few rows on a GPU: checks and views are part of what a tape replays.

`loss_of` and `ClipLoss` try it first; every other call, and the first two of a kind, take the usual way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import scalar_tensor
from ..ops.contrastive import replayed
from ..ops.contrastive.records import Problem
from ..swept import arguments
from ..tags import are_tags
from .batch import Tensors, batch
from .formulas import infonce
from .options import LossOptions


def small_mean(given: Tensors, options: LossOptions, scale: float | Tensor, name: str) -> Tensor | None:
    """The loss, or None where it is not replayed.

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
