"""Who is whose positive: the rows of a loss flattened, and cluster ids in which the rules are already settled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.checks import check_ids, check_rows, check_vector

Contrasts = Tensor | Sequence[Tensor]


class Posed(NamedTuple):
    """The rows of a loss, flattened, and who is whose positive. Ids are int64, of which -1 alone equals nothing."""

    anchors: Tensor  # [R, D], R = N or N * V
    contrasts: Tensor | None  # [M, D]
    positives: Tensor | None  # [R, D]
    anchor_clusters: Tensor  # [R]
    contrast_clusters: Tensor | None  # [M]
    anchor_ids: Tensor | None  # [R]
    contrast_ids: Tensor | None  # [M]
    shape: tuple[int, ...]  # [N] or [N, V]
    views: int  # V, 1 without views
    dtype: torch.dtype  # of the loss


def pose(
    embeddings: Tensor,
    clusters: Tensor | None,
    positives: Tensor | None,
    contrasts: Contrasts | None,
    contrast_clusters: Tensor | None,
    ids: Tensor | None,
    contrast_ids: Tensor | None,
    contrast_bias: Tensor | None,
) -> Posed:
    """Checks the tensors of `cluster_infonce`, flattens views and settles the cluster of every row."""
    check_rows("embeddings", embeddings, dims=(2, 3))
    shape, device = tuple(embeddings.shape[:-1]), embeddings.device
    n, views = shape[0], shape[1] if len(shape) == 2 else 1
    if views == 0:
        raise ValueError(f"embeddings: expected at least one view, got shape {list(embeddings.shape)}")
    anchors = embeddings.flatten(0, 1) if len(shape) == 2 else embeddings
    rows = n * views
    if clusters is not None:
        check_ids("clusters", clusters, n, device)
    if positives is not None:
        check_rows("positives", positives, dims=(2, 3), like=embeddings)
        of_samples = (n, embeddings.shape[-1])
        if positives.shape not in (embeddings.shape, of_samples):
            short = f" or {list(of_samples)}" if len(shape) == 2 else ""
            raise ValueError(f"positives: expected shape {list(embeddings.shape)}{short}, got {list(positives.shape)}")
        if len(shape) == 2:
            positives = positives if positives.dim() == 3 else positives[:, None].expand(-1, views, -1)
            positives = positives.flatten(0, 1)
    others = _concatenate(contrasts, embeddings)
    m = rows if others is None else others.shape[0]
    if contrast_bias is not None:
        check_vector("contrast_bias", contrast_bias, m, device)
    if others is None:
        for name, value in (("contrast_clusters", contrast_clusters), ("ids", ids), ("contrast_ids", contrast_ids)):
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if clusters is None and views < 2 and positives is None:
            raise ValueError(
                "clusters: expected cluster ids, embeddings of at least two views [N, V, D], or contrasts: "
                f"a single view {list(embeddings.shape)} has no positives"
            )
    elif contrast_clusters is not None:
        check_ids("contrast_clusters", contrast_clusters, m, device)
    elif m < rows:
        raise ValueError(
            f"contrasts: expected at least {rows} rows, one for each anchor row, or contrast_clusters; got {m} rows"
        )
    if (ids is None) != (contrast_ids is None):
        given, absent = ("ids", "contrast_ids") if contrast_ids is None else ("contrast_ids", "ids")
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if ids is not None and contrast_ids is not None:
        check_ids("ids", ids, n, device)
        check_ids("contrast_ids", contrast_ids, m, device)

    if clusters is None:
        anchor_clusters = per_row(torch.arange(n, device=device), views)
    elif views == 1 and others is None:  # nobody else belongs with a row in no cluster
        anchor_clusters = clusters.to(torch.int64).clamp(min=-1)
    else:  # private clusters -2, -3, ... are unlike any of the user's, who says "no cluster" by a negative number
        wide = clusters.to(torch.int64)
        private = torch.arange(-2, -2 - n, -1, device=device)
        anchor_clusters = per_row(torch.where(wide < 0, private, wide), views)
    other_clusters = None
    if contrast_clusters is not None:
        other_clusters = contrast_clusters.to(torch.int64).clamp(min=-1)
    elif others is not None:
        other_clusters = torch.cat((anchor_clusters, anchor_clusters.new_full((m - rows,), -1)))
    return Posed(
        anchors,
        others,
        positives,
        anchor_clusters,
        other_clusters,
        None if ids is None else per_row(ids.to(torch.int64).clamp(min=-1), views),
        None if contrast_ids is None else contrast_ids.to(torch.int64).clamp(min=-1),
        shape,
        views,
        torch.float64 if embeddings.dtype == torch.float64 else torch.float32,
    )


def _concatenate(contrasts: Contrasts | None, embeddings: Tensor) -> Tensor | None:
    if contrasts is None:
        return None
    if isinstance(contrasts, Tensor):
        check_rows("contrasts", contrasts, like=embeddings)
        return contrasts
    if not isinstance(contrasts, (list, tuple)) or not contrasts:
        raise TypeError(f"contrasts: expected a tensor or a non-empty list of tensors, got {type(contrasts).__name__}")
    for i, part in enumerate(contrasts):
        check_rows(f"contrasts[{i}]", part, like=embeddings)
    dtype = contrasts[0].dtype
    for part in contrasts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in contrasts])


def per_row(values: Tensor, views: int) -> Tensor:
    """[N] -> [N * V], sample-major."""
    return values if views == 1 else values[:, None].expand(-1, views).reshape(-1)
