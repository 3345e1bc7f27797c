"""Who is whose positive: the rows of a loss flattened, and cluster ids in which the rules are already settled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.checks import check_assignments, check_bias, check_ids, check_rows, values_visible
from .kernels.problem import DOWN, FAR, NORM_FLOOR, accumulation_dtype, inverse_norms
from .memory import Memory, Stored

Contrasts = Tensor | Memory | Sequence[Tensor | Memory]


class Posed(NamedTuple):
    """The rows of a loss, flattened, and who is whose positive. Ids are int64, of which -1 alone equals nothing.

    No clusters: nothing is positive but `positives`.
    """

    anchors: Tensor  # [R, D], R = N or N * V
    contrasts: Tensor | None  # [M, D]
    positives: Tensor | None  # [R, D]
    anchor_clusters: Tensor | None  # [R]
    contrast_clusters: Tensor | None  # [M]
    anchor_ids: Tensor | None  # [R]
    contrast_ids: Tensor | None  # [M]
    shape: tuple[int, ...]  # [N] or [N, V]
    views: int  # V, 1 without views
    dtype: torch.dtype  # of the loss
    as_stored: bool  # contrasts are taken as they are, whatever the loss does with its anchors
    anchor_assignments: Tensor | None = None  # [R, C], in place of clusters: weights of positives
    contrast_assignments: Tensor | None = None  # [M, C]
    by_sample: bool = False  # clusters are places of samples, which mean others in another process
    paired: bool = False  # so are the contrasts', those of the anchors' rows one after the other, further ones -1
    parts: tuple[tuple[int, bool], ...] = ()  # of each of the contrasts: how many rows, and whether they are stored


def pose(
    embeddings: Tensor,
    clusters: Tensor | None,
    positives: Tensor | None,
    contrasts: Contrasts | None,
    contrast_clusters: Tensor | None,
    ids: Tensor | None,
    contrast_ids: Tensor | None,
    contrast_bias: Tensor | None,
    normalize: bool = True,
) -> Posed:
    """Checks the tensors of `cluster_infonce`, flattens views and settles the cluster of every row.

    normalize: where stored rows and tensors meet in one set, the tensors are normalised here.
    """
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
    parts = None if contrasts is None else _parts(contrasts, embeddings)
    if parts is None:
        if contrast_bias is not None:
            check_bias(contrast_bias, rows, device)
        for name, value in (("contrast_clusters", contrast_clusters), ("ids", ids), ("contrast_ids", contrast_ids)):
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if clusters is None and views < 2 and positives is None:
            raise ValueError(
                "clusters: expected cluster ids, embeddings of at least two views [N, V, D], or contrasts: "
                f"a single view {list(embeddings.shape)} has no positives"
            )
    else:
        if contrast_bias is not None:
            check_bias(contrast_bias, sum(part.length() for part in parts), device)
        _check_others(parts, rows, clusters, positives, contrast_clusters, ids, contrast_ids)
        if ids is not None:
            check_ids("ids", ids, n, device)

    if clusters is None:
        anchor_clusters = per_row(torch.arange(n, device=device), views)
    elif views == 1 and parts is None:  # nobody else belongs with a row in no cluster
        anchor_clusters = clusters.to(torch.int64).clamp(min=-1)
    else:  # private clusters -2, -3, ... are unlike any of the user's, who says "no cluster" by a negative number
        wide = clusters.to(torch.int64)
        private = torch.arange(-2, -2 - n, -1, device=device)
        anchor_clusters = per_row(torch.where(wide < 0, private, wide), views)
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    if parts is None:
        found = anchors, None, positives, anchor_clusters, None, None, None, shape, views, dtype
        return Posed(*found, as_stored=False, by_sample=clusters is None, paired=clusters is None)
    if contrast_clusters is not None:
        own = contrast_clusters.to(torch.int64).clamp(min=-1)
    else:
        count = sum(part.length() for part in parts if part.stored is None)
        own = torch.cat((anchor_clusters, anchor_clusters.new_full((max(count - rows, 0),), -1)))[:count]
    own_ids = None if contrast_ids is None else contrast_ids.to(torch.int64).clamp(min=-1)
    clustered = clusters is not None or any(part.stored is None for part in parts)
    return Posed(
        anchors,
        _rows(parts, normalize),
        positives,
        anchor_clusters if clustered else None,
        _joined(parts, "clusters" if clusters is not None else None, own) if clustered else None,
        None if ids is None else per_row(ids.to(torch.int64).clamp(min=-1), views),
        None if ids is None else _joined(parts, "ids", own_ids),
        shape,
        views,
        dtype,
        any(part.stored is not None for part in parts),
        by_sample=clusters is None,
        paired=clusters is None and contrast_clusters is None,
        parts=tuple((part.length(), part.stored is not None) for part in parts),
    )


def of_parts(values: Tensor | None, posed: Posed, stored: bool) -> Tensor | None:
    """Of values [M, ...] of all contrasts those of the stored ones, or of the others."""
    if values is None or all(kind == stored for _, kind in posed.parts):
        return values
    pieces = values.split([length for length, _ in posed.parts])
    return torch.cat([piece for piece, (_, kind) in zip(pieces, posed.parts, strict=True) if kind == stored])


def offset(posed: Posed, first: int) -> tuple[Tensor | None, Tensor | None]:
    """Clusters of anchors and of contrasts, where this process's samples are numbered from `first` on."""
    samples = posed.shape[0]

    def moved(ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        if posed.by_sample:  # places that no sample has are nobody's, here as there
            ids = torch.where(ids >= samples, -1, torch.where(ids >= 0, ids + first, ids))
        return torch.where(ids < -1, ids - first, ids)  # private clusters

    return moved(posed.anchor_clusters), moved(posed.contrast_clusters)


def paired_clusters(samples: list[int], views: int, contrasts: list[int], device: torch.device) -> Tensor:
    """Of all processes' contrasts the clusters after `offset`, where they are `Posed.paired`, from numbers of them."""
    found, first = [], 0
    for n, m in zip(samples, contrasts, strict=True):
        places = per_row(torch.arange(first, first + n, device=device), views)
        found.append(torch.cat((places, places.new_full((max(m - len(places), 0),), -1))))
        first += n
    return torch.cat(found)


def pose_assigned(
    embeddings: Tensor,
    assignments: Tensor | None,
    contrasts: Contrasts | None,
    contrast_assignments: Tensor | None,
    ids: Tensor | None,
    contrast_ids: Tensor | None,
    contrast_bias: Tensor | None,
) -> Posed:
    """`pose` with assignments in place of clusters."""
    check_rows("embeddings", embeddings, dims=(2, 3))
    shape, device = tuple(embeddings.shape[:-1]), embeddings.device
    n, views = shape[0], shape[1] if len(shape) == 2 else 1
    if views == 0:
        raise ValueError(f"embeddings: expected at least one view, got shape {list(embeddings.shape)}")
    if assignments is None:
        raise ValueError("assignments: expected a tensor, as contrast_assignments is given, got None")

    def wide(used_twice: Tensor) -> Tensor:  # so that gradients are rounded after they have been added
        return used_twice.to(accumulation_dtype(embeddings, *(part.rows for part in parts)))

    parts = [] if contrasts is None else _parts(contrasts, embeddings)
    by_view = len(shape) == 2 and isinstance(assignments, Tensor) and assignments.dim() == 3
    check_assignments("assignments", assignments, shape if by_view else (n,), device)
    if len(shape) == 2:
        anchors, rows = embeddings.flatten(0, 1), n * views
        own = assignments.flatten(0, 1) if by_view else per_row(wide(assignments), views)
    else:
        anchors, own, rows = embeddings, assignments, n
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    posed = Posed(anchors, None, None, None, None, None, None, shape, views, dtype, False, own)
    if contrasts is None:
        if contrast_bias is not None:
            check_bias(contrast_bias, rows, device)
        for name, value in (
            ("contrast_assignments", contrast_assignments), ("ids", ids), ("contrast_ids", contrast_ids)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        return posed
    if any(part.stored is not None for part in parts):
        raise ValueError("contrasts: expected tensors, as queues and banks store no assignments, got a queue or bank")
    count = sum(part.length() for part in parts)
    if contrast_bias is not None:
        check_bias(contrast_bias, count, device)
    if contrast_assignments is not None:
        check_assignments("contrast_assignments", contrast_assignments, (count,), device, own)
    elif count < rows:
        raise ValueError(
            f"contrasts: expected at least {rows} rows, one for each anchor row, or contrast_assignments; "
            f"got {count} rows"
        )
    else:
        own = wide(own)
        contrast_assignments = own if count == rows else torch.cat((own, own.new_zeros(count - rows, own.shape[1])))
        posed = posed._replace(anchor_assignments=own)
    if (ids is None) != (contrast_ids is None):
        given, absent = ("ids", "contrast_ids") if contrast_ids is None else ("contrast_ids", "ids")
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if ids is not None and contrast_ids is not None:
        check_ids("ids", ids, n, device)
        check_ids("contrast_ids", contrast_ids, count, device)
        posed = posed._replace(
            anchor_ids=per_row(ids.to(torch.int64).clamp(min=-1), views),
            contrast_ids=contrast_ids.to(torch.int64).clamp(min=-1),
        )
    return posed._replace(contrasts=_rows(parts, False), contrast_assignments=contrast_assignments)


class _Part(NamedTuple):
    """One of a list of contrasts: a tensor's rows, or what a memory holds."""

    rows: Tensor
    stored: Stored | None

    def length(self) -> int:
        return self.rows.shape[0]


def _parts(contrasts: Contrasts, embeddings: Tensor) -> list[_Part]:
    alone = isinstance(contrasts, (Tensor, Memory))
    listed: Sequence[Tensor | Memory] = [contrasts] if alone else contrasts  # type: ignore[list-item, assignment]
    expected = "a tensor, a MemoryQueue, a MemoryBank or a non-empty list of these"
    if not isinstance(listed, (list, tuple)):
        raise TypeError(f"contrasts: expected {expected}, got {type(contrasts).__name__}")
    if not listed:
        raise ValueError(f"contrasts: expected {expected}, got an empty {type(contrasts).__name__}")
    parts = []
    for i, part in enumerate(listed):
        name = "contrasts" if alone else f"contrasts[{i}]"
        if isinstance(part, Memory):
            # One memory alone is read in place, unless a backward may look at its rows again.
            stored = part.stored(len(listed) == 1 and torch.is_grad_enabled())
            parts.append(_Part(stored.rows, stored))
        elif isinstance(part, Tensor):
            parts.append(_Part(part, None))
        else:
            raise TypeError(f"{name}: expected a tensor, a MemoryQueue or a MemoryBank, got {type(part).__name__}")
        check_rows(name, parts[-1].rows, like=embeddings)
    return parts


def _check_others(
    parts: list[_Part],
    rows: int,
    clusters: Tensor | None,
    positives: Tensor | None,
    contrast_clusters: Tensor | None,
    ids: Tensor | None,
    contrast_ids: Tensor | None,
) -> None:
    """That contrasts have the clusters and ids that the call needs, and no more."""
    device = parts[0].rows.device
    memories = [part.stored for part in parts if part.stored is not None]
    lengths = [part.length() for part in parts if part.stored is None]
    count = sum(lengths)
    for name, value in (("contrast_clusters", contrast_clusters), ("contrast_ids", contrast_ids)):
        if value is not None and not lengths:
            raise ValueError(f"{name}: expected None, as queues and banks bring their own, got a value")
    if contrast_clusters is not None:
        check_ids("contrast_clusters", contrast_clusters, count, device)
    elif lengths and count < rows:
        raise ValueError(
            f"contrasts: expected at least {rows} rows, one for each anchor row, or contrast_clusters; got {count} rows"
        )
    if clusters is None and any(memory.clustered for memory in memories):
        raise ValueError("clusters: expected a tensor, as a queue or bank of the contrasts stores clusters, got None")
    if not lengths and positives is None and (clusters is None or all(m.clusters is None for m in memories)):
        raise ValueError("positives: expected a tensor, as the stored contrasts are negatives only, got None")
    known = contrast_ids is not None or any(memory.ids is not None for memory in memories)
    if ids is not None and not known:
        raise ValueError("contrast_ids: expected a tensor, as ids is given, got None")
    if ids is None and contrast_ids is not None:
        raise ValueError("ids: expected a tensor, as contrast_ids is given, got None")
    if contrast_ids is not None:
        check_ids("contrast_ids", contrast_ids, count, device)


def _rows(parts: list[_Part], normalize: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0].rows
    mixed = normalize and any(part.stored is not None for part in parts)
    rows = [unit(part.rows) if mixed and part.stored is None else part.rows for part in parts]
    dtype = rows[0].dtype
    for part in rows:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in rows])


def _joined(parts: list[_Part], name: str | None, own: Tensor | None) -> Tensor:
    """Clusters or ids of all contrasts: those that memories store under `name`, and `own` for the rows of tensors."""
    found, taken = [], 0
    for part in parts:
        values = None if part.stored is None or name is None else getattr(part.stored, name)
        if part.stored is None and own is not None:
            values = own[taken : taken + part.length()]
            taken += part.length()
        if values is None:
            values = torch.full((part.length(),), -1, dtype=torch.int64, device=part.rows.device)
        found.append(values)
    return found[0] if len(found) == 1 else torch.cat(found)


def unit(rows: Tensor) -> Tensor:
    """Rows over their norms, differentiable, in the accumulation dtype; zeros stay zeros and get no gradient."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    inverse = inverse_norms(rows.detach())[:, None]
    near = inverse > 1 / FAR[inverse.dtype]
    if values_visible(rows) and int(near.count_nonzero()) == len(rows):
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / norms.clamp(min=NORM_FLOOR)
    empty = inverse == 0
    rows = torch.where(near | empty, rows, rows * DOWN[inverse.dtype])
    norms = torch.linalg.vector_norm(torch.where(empty, 1, rows), dim=1, keepdim=True)
    return torch.where(empty, rows.detach() * 0, rows / norms.clamp(min=NORM_FLOOR))


def per_row(values: Tensor, views: int) -> Tensor:
    """[N, ...] -> [N * V, ...], sample-major."""
    return values if views == 1 else values[:, None].expand(-1, views, *values.shape[1:]).flatten(0, 1)
