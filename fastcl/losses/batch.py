"""Flattens the rows of a loss and gives every row a cluster id, so that equal ids mean positives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_assignments, check_bias, check_ids, check_rows
from ..guide import Guide
from ..memory_state import Memory, Stored
from ..ops.backends.rows import accumulation_dtype, unit
from ..ops.contrastive.records import Rows
from ..tags import are_tags

Contrasts = Tensor | Memory | Sequence[Tensor | Memory]


class Batch(NamedTuple):
    """The rows of a loss, views flattened, with the cluster and the id of each.

    If the rows have no clusters, `positives` are the only positives.
    """

    anchors: Rows  # R rows, R = N or N * V
    contrasts: Rows | None  # M rows
    positives: Tensor | None  # [R, D]
    shape: tuple[int, ...]  # [N] or [N, V]
    views: int  # V, or 1 for embeddings without views
    by_sample: bool = False  # clusters are indices of this process's samples
    # by_sample, and contrast i has the cluster of anchor row i; extra contrasts have -1.
    aligned: bool = False
    parts: tuple[tuple[int, bool], ...] = ()  # for each part of the contrasts: number of rows, whether it is stored
    hard_negatives: Tensor | None = None  # [R, H, D]
    # Number and checksum of stored rows of which this process has a share, the same in all processes.
    shared: tuple[int, int] = (0, 0)

    def dtype(self) -> torch.dtype:
        """The dtype of the loss."""
        return torch.float64 if self.anchors.values.dtype == torch.float64 else torch.float32

    def others(self) -> Rows:
        """The rows that are contrasts; in self-contrast the anchors."""
        return self.anchors if self.contrasts is None else self.contrasts


class Tensors(NamedTuple):
    """The unchecked tensors of a call of `cluster_infonce`, which describes their shapes."""

    embeddings: Tensor
    clusters: Tensor | None = None
    positives: Tensor | None = None
    contrasts: Contrasts | None = None
    contrast_clusters: Tensor | None = None
    ids: Tensor | None = None
    contrast_ids: Tensor | None = None
    contrast_bias: Tensor | None = None
    assignments: Tensor | None = None
    contrast_assignments: Tensor | None = None
    groups: Tensor | None = None
    contrast_groups: Tensor | None = None
    guide: Guide | None = None
    hard_negatives: Tensor | None = None
    keep_pairs: bool = False


def batch(given: Tensors, normalize: bool, ruled: bool = False) -> Batch:
    """Checks the tensors of a call without assignments, flattens views and gives every row its cluster.

    normalize: cosine similarity. Stored rows are never normalised.
    ruled: the caller goes on with `rules.ruled`. Only then `clusters` may be tags, and ids may be given in
        self-contrast. The anchors' tags are read there: here each sample is then a cluster, and of the contrasts only
        the stored ones have tags.
    """
    embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias, *_ = given
    tagged = ruled and are_tags(clusters)
    tags_of_contrasts = tagged and contrast_clusters is not None
    if tagged:
        clusters = contrast_clusters = None
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
        others = {"contrast_clusters": given.contrast_clusters, "contrast_ids": contrast_ids}
        for name, value in (others if ruled else {"ids": ids, **others}).items():
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if ids is not None:
            check_ids("ids", ids, n, device)
        if clusters is None and not tagged and views < 2 and positives is None:
            raise ValueError(
                "clusters: expected cluster ids, embeddings of at least two views [N, V, D], or contrasts: "
                f"a single view {list(embeddings.shape)} has no positives"
            )
    else:
        if contrast_bias is not None:
            check_bias(contrast_bias, sum(part.length() for part in parts), device)
        if ids is not None:
            check_ids("ids", ids, n, device)
            if given.keep_pairs is True and contrast_ids is None:
                count = sum(part.length() for part in parts if part.stored is None)
                contrast_ids = of_pairs(per_row(ids.to(torch.int64), views), count)
        _check_others(parts, rows, given, contrast_ids)

    if clusters is None:
        anchor_clusters = per_row(torch.arange(n, device=device), views)
    elif views == 1 and parts is None:  # a row in no cluster has no positive
        anchor_clusters = clusters.to(torch.int64).clamp(min=-1)
    else:  # rows without a cluster get private ones, -2, -3, ...: the user's clusters are not negative
        wide = clusters.to(torch.int64)
        private = torch.arange(-2, -2 - n, -1, device=device)
        anchor_clusters = per_row(torch.where(wide < 0, private, wide), views)
    by_sample = clusters is None
    own_ids = None if ids is None else per_row(ids.to(torch.int64).clamp(min=-1), views)
    if parts is None:
        alone = tagged and views == 1  # clusters of one row make no positives
        own = Rows(anchors, None if alone else anchor_clusters, own_ids, contrast_bias, normalize=normalize)
        return Batch(own, None, positives, shape, views, by_sample, aligned=by_sample and not alone)
    count = sum(part.length() for part in parts if part.stored is None)
    if contrast_clusters is not None:
        of_tensors = contrast_clusters.to(torch.int64).clamp(min=-1)
    elif tags_of_contrasts:
        of_tensors = anchor_clusters.new_full((count,), -1)
    else:
        of_tensors = of_pairs(anchor_clusters, count)
    other_ids = None if contrast_ids is None else contrast_ids.to(torch.int64).clamp(min=-1)
    clustered = clusters is not None or any(part.stored is None for part in parts)
    stored = any(part.stored is not None for part in parts)
    return Batch(
        Rows(
            anchors,
            anchor_clusters if clustered else None,
            own_ids,
            normalize=normalize,
        ),
        Rows(
            _rows(parts, normalize),
            _joined(parts, None if by_sample else "clusters", of_tensors) if clustered else None,
            None if ids is None else _joined(parts, "ids", other_ids),
            contrast_bias,
            tags=_stored_tags(parts) if tagged else None,
            normalize=normalize and not stored,
        ),
        positives,
        shape,
        views,
        by_sample,
        aligned=by_sample and contrast_clusters is None and not tags_of_contrasts,
        parts=tuple((part.length(), part.stored is not None) for part in parts),
    )


def of_parts(values: Tensor | None, rows: Batch, stored: bool) -> Tensor | None:
    """From values [M, ...] of all contrasts, the values of the stored contrasts, or those of the tensors."""
    if values is None or all(kind == stored for _, kind in rows.parts):
        return values
    pieces = values.split([length for length, _ in rows.parts])
    return torch.cat([piece for piece, (_, kind) in zip(pieces, rows.parts, strict=True) if kind == stored])


_TENSORS = tuple(name for name in Rows._fields if name != "normalize")


def with_shared_queue(rows: Batch, rank: int, size: int, reduction: str) -> Batch:
    """The batch with this process's share of the stored contrasts in place of all of them, as rows of a tensor.

    In the contrasts' direction a row of a queue that all processes have counts once, over all processes' anchors.
    """
    if rows.contrasts is None or not any(stored for _, stored in rows.parts):
        return rows
    if reduction == "none":
        raise ValueError("reduction: expected 'mean' or 'sum' for symmetric with a queue or bank, got 'none'")
    compared = (getattr(rows.contrasts, name) for name in ("values", "clusters", "ids", "tags"))
    whole = [of_parts(values, rows, True) for values in compared if values is not None]
    k = sum(length for length, stored in rows.parts if stored)
    first = len(rows.contrasts.values) - k
    mine = slice(k * rank // size, k * (rank + 1) // size)

    def share(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        stored = of_parts(values, rows, True)
        assert stored is not None
        if not first:
            return stored[mine]
        tensors = of_parts(values, rows, False)
        assert tensors is not None
        return torch.cat((tensors, stored[mine]))

    shares = {name: share(getattr(rows.contrasts, name)) for name in _TENSORS}
    contrasts = rows.contrasts._replace(**shares)  # type: ignore[arg-type]
    lengths = (first, False), (mine.stop - mine.start, False)
    return rows._replace(contrasts=contrasts, parts=lengths, shared=(k, _checksum(whole)))


def _checksum(data: Sequence[Tensor | None]) -> int:
    """A number that depends on the bits of rows and their data, [M] or [M, D], and on their order; without copies."""
    found = 0
    for values in data:
        assert values is not None
        bits = values.detach().contiguous()
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        of_rows = bits if bits.dim() == 1 else bits.sum(1, dtype=torch.int64)
        of_rows = of_rows % 2147483629  # a prime: the products below stay in int64's range
        places = torch.arange(len(bits), device=bits.device) % 65521 + 1
        found = (found * 1000003 + int((of_rows * places).sum())) % 2**62
    return found


FIRST = 1 << 40  # the number of the first sample of a process is this times its rank: samples of no other have it


def offset(batch: Batch, anchors: Rows, contrasts: Rows | None, rank: int) -> tuple[Rows, Rows | None]:
    """The rows with clusters, kept pairs and groups that are unique over processes."""
    samples, first = batch.shape[0], FIRST * rank

    def moved(ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        if batch.by_sample:  # an index beyond the samples matches no sample of any process
            ids = torch.where(ids >= samples, -1, torch.where(ids >= 0, ids + first, ids))
        return torch.where(ids < -1, ids - first, ids)  # private clusters

    def unique(rows: Rows) -> Rows:
        groups, pairs = rows.groups, rows.samples
        if groups is not None:
            groups = torch.where(groups < -1, groups - first, groups)
        if pairs is not None:
            pairs = torch.where(pairs >= 0, pairs + first, pairs)
        return rows._replace(clusters=moved(rows.clusters), groups=groups, samples=pairs)

    return unique(anchors), None if contrasts is None else unique(contrasts)


def aligned_clusters(samples: list[int], views: int, contrasts: list[int], device: torch.device) -> Tensor:
    """For an `aligned` batch, the clusters after `offset` of all processes' contrasts, from numbers of rows alone."""
    found = []
    for rank, (n, m) in enumerate(zip(samples, contrasts, strict=True)):
        places = per_row(torch.arange(FIRST * rank, FIRST * rank + n, device=device), views)
        found.append(of_pairs(places, m))
    return torch.cat(found)


def assigned_batch(given: Tensors, normalize: bool) -> Batch:
    """`batch` with assignments in place of clusters."""
    embeddings, _, _, contrasts, _, ids, contrast_ids, contrast_bias, assignments, contrast_assignments, *_ = given
    check_rows("embeddings", embeddings, dims=(2, 3))
    shape, device = tuple(embeddings.shape[:-1]), embeddings.device
    n, views = shape[0], shape[1] if len(shape) == 2 else 1
    if views == 0:
        raise ValueError(f"embeddings: expected at least one view, got shape {list(embeddings.shape)}")
    if assignments is None:
        raise ValueError("assignments: expected a tensor, as contrast_assignments is given, got None")

    def wide(used_twice: Tensor) -> Tensor:  # gradients are then added before they are rounded
        return used_twice.to(accumulation_dtype(embeddings, *(part.rows for part in parts)))

    parts = [] if contrasts is None else _parts(contrasts, embeddings)
    by_view = len(shape) == 2 and isinstance(assignments, Tensor) and assignments.dim() == 3
    check_assignments("assignments", assignments, shape if by_view else (n,), device)
    if len(shape) == 2:
        anchors, rows = embeddings.flatten(0, 1), n * views
        own = assignments.flatten(0, 1) if by_view else per_row(wide(assignments), views)
    else:
        anchors, own, rows = embeddings, assignments, n
    if contrasts is None:
        if contrast_bias is not None:
            check_bias(contrast_bias, rows, device)
        for name, value in (
            ("contrast_assignments", contrast_assignments), ("ids", ids), ("contrast_ids", contrast_ids)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        of_anchors = Rows(anchors, bias=contrast_bias, assignments=own, normalize=normalize)
        return Batch(of_anchors, None, None, shape, views)
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
    if (ids is None) != (contrast_ids is None):
        there, absent = ("ids", "contrast_ids") if contrast_ids is None else ("contrast_ids", "ids")
        raise ValueError(f"{absent}: expected a tensor, as {there} is given, got None")
    if ids is not None and contrast_ids is not None:
        check_ids("ids", ids, n, device)
        check_ids("contrast_ids", contrast_ids, count, device)
        ids = per_row(ids.to(torch.int64).clamp(min=-1), views)
        contrast_ids = contrast_ids.to(torch.int64).clamp(min=-1)
    return Batch(
        Rows(anchors, None, ids, None, own, normalize=normalize),
        Rows(_rows(parts, False), None, contrast_ids, contrast_bias, contrast_assignments, normalize=normalize),
        None,
        shape,
        views,
    )


class _Part(NamedTuple):
    """One element of a list of contrasts: the rows of a tensor, or of a memory."""

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
            # A single memory is read in place, unless a backward may read its rows again.
            stored = part.stored(len(listed) == 1 and torch.is_grad_enabled())
            parts.append(_Part(stored.rows, stored))
        elif isinstance(part, Tensor):
            parts.append(_Part(part, None))
        else:
            raise TypeError(f"{name}: expected a tensor, a MemoryQueue or a MemoryBank, got {type(part).__name__}")
        check_rows(name, parts[-1].rows, like=embeddings)
    return parts


def _check_others(parts: list[_Part], rows: int, given: Tensors, contrast_ids: Tensor | None) -> None:
    """Raises ValueError unless the contrasts have exactly the clusters and ids that the call needs."""
    clusters, positives, contrast_clusters, ids = given.clusters, given.positives, given.contrast_clusters, given.ids
    tagged = are_tags(clusters)
    device = parts[0].rows.device
    memories = [part.stored for part in parts if part.stored is not None]
    lengths = [part.length() for part in parts if part.stored is None]
    count = sum(lengths)
    for name, value in (("contrast_clusters", contrast_clusters), ("contrast_ids", contrast_ids)):
        if value is not None and not lengths:
            raise ValueError(f"{name}: expected None, as queues and banks bring their own, got a value")
    if contrast_clusters is not None:
        if not tagged:
            check_ids("contrast_clusters", contrast_clusters, count, device)
    elif lengths and count < rows:
        raise ValueError(
            f"contrasts: expected at least {rows} rows, one for each anchor row, or contrast_clusters; got {count} rows"
        )
    _check_stored_clusters(clusters, memories)
    if not lengths and positives is None and (clusters is None or all(m.clusters is m.tags is None for m in memories)):
        hint = ", without tags (MemoryQueue(tags=T) stores them)" if tagged else ""
        raise ValueError(f"positives: expected a tensor, as the stored contrasts are negatives only{hint}, got None")
    known = contrast_ids is not None or any(memory.ids is not None for memory in memories)
    if ids is not None and not known:
        raise ValueError("contrast_ids: expected a tensor, as ids is given, got None")
    if ids is None and contrast_ids is not None:
        raise ValueError("ids: expected a tensor, as contrast_ids is given, got None")
    if contrast_ids is not None:
        check_ids("contrast_ids", contrast_ids, count, device)


def _check_stored_clusters(clusters: Tensor | None, memories: list[Stored]) -> None:
    """Raises ValueError unless the anchors have clusters of the kind that the memories store: integers or tags."""
    because = "as a queue or bank of the contrasts stores"
    for memory in memories:
        if clusters is None:
            if memory.clustered:
                raise ValueError(f"clusters: expected a tensor, {because} clusters, got None")
        elif memory.tags is None:
            if memory.clusters is not None and are_tags(clusters):
                raise ValueError(
                    f"clusters: expected integers, {because} integers, got tags (MemoryQueue(tags=T) stores them)"
                )
        elif not are_tags(clusters) or clusters.shape[1] != memory.tag_count:
            got = f"{clusters.dtype} {list(clusters.shape)}"
            raise ValueError(f"clusters: expected torch.bool [N, {memory.tag_count}], {because} tags, got {got}")


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
    """Clusters or ids of all contrasts: memories bring the attribute `name`, and `own` holds those of the tensors.

    Missing ones are -1.
    """
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


def _stored_tags(parts: list[_Part]) -> Tensor | None:
    """The packed tags [M, W] of stored contrasts, none of others; None if no memory stores tags."""
    words = [None if part.stored is None else part.stored.tags for part in parts]
    known = next((tags for tags in words if tags is not None), None)
    if known is None:
        return None
    lengths = (part.length() for part in parts)
    found = [known.new_zeros(m, known.shape[1]) if w is None else w for w, m in zip(words, lengths, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def per_row(values: Tensor, views: int) -> Tensor:
    """[N, ...] -> [N * V, ...], sample-major."""
    return values if views == 1 else values[:, None].expand(-1, views, *values.shape[1:]).flatten(0, 1)


def of_pairs(values: Tensor, count: int, missing: int = -1) -> Tensor:
    """The values [count, ...] of contrasts of which contrast i belongs to anchor row i; `missing` for further ones."""
    rest = values.new_full((max(count - values.shape[0], 0), *values.shape[1:]), missing)
    return torch.cat((values, rest))[:count]
