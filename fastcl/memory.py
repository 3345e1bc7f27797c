"""Rows stored across steps: a queue of the latest rows, and a bank with one row per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import ROW_DTYPES, check_count, check_flag, check_ids, check_indices, finite_number, shown
from .memory_state import ADDRESS_SPACE, Memory, Stored, buffer_state, unchanged
from .neighbors import topk_similarity
from .ops.backends.rows import inverse_norms, unit_rows
from .tags import unpacked


class MemoryQueue(Memory):
    """The latest ``size`` rows, first in, first out (MoCo's and SwAV's queue, cross-batch memory, NNCLR's support set).

    ``ClusterInfoNCE()(query, positives=key, contrasts=queue)`` is MoCo. With ``clusters=True`` the stored rows in an
    anchor's cluster are its positives, and ``ClusterInfoNCE()(z, labels, contrasts=queue)`` is a cross-batch memory.
    With ``tags=T`` each row has tags, of T, and those that share one with an anchor are its positives. With
    ``ids=True``, and ``ids=`` of the loss, an anchor is not contrasted against stale copies of itself.

    Rows are detached, normalised in float32 and then rounded to ``dtype``. Of a batch larger than the queue only the
    last ``size`` rows are stored. A backward uses the rows of its forward, so ``enqueue`` may be called between them.
    Rows, position and number of rows are buffers, and in ``state_dict``. Each process has its own queue: inside a
    ``DistributedDataParallel`` module, pass ``broadcast_buffers=False`` to that module.

    Args:
        size: maximum number of rows, >= 1.
        dim: D, the dimension of a row.
        dtype: dtype of the stored rows: float64, float32, bfloat16 or float16.
        clusters: whether every row comes with a cluster id.
        ids: whether every row comes with a sample id.
        tags: T, the number of tags that every row may come with; None: no tags. In place of clusters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: He et al. 2020 (MoCo), Wang et al. 2020 (cross-batch memory), Dwibedi et al. 2021 (NNCLR).
    """

    sample_ids: Tensor
    enqueued: Tensor  # number of rows enqueued so far; modulo size, the slot of the next row
    counter = "enqueued"
    former_counters = 2  # next slot and number of rows

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, clusters: bool = False, ids: bool = False,
        tags: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_dtype(dtype)
        size, dim = _check_sizes("size", size, dim, dtype)
        check_flag("clusters", clusters)
        check_flag("ids", ids)
        if clusters and tags is not None:
            raise ValueError(f"tags: expected None with clusters=True, got {shown(tags)}")
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        self._store_clusters(size, clusters, tags)
        self.register_buffer("sample_ids", torch.full((size,), -1, dtype=torch.int64) if ids else None)
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64))
        self._next, self._count = 0, 0  # slot of the next row, number of rows

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def __len__(self) -> int:
        self._refresh()
        return self._count

    def __bool__(self) -> bool:  # `if queue` asks whether there is one, not whether it has rows
        return True

    @property
    def embeddings(self) -> Tensor:
        """``[len, dim]``, oldest first; a copy."""
        return self._in_order(self.rows)

    @property
    def clusters(self) -> Tensor | None:
        """int64 ``[len]``, oldest first; negative: none. Bool ``[len, T]`` for tags. None if the queue stores none."""
        if self.tag_words is not None:
            return unpacked(self._in_order(self.tag_words), self.tag_count)
        return None if self.cluster_ids is None else self._in_order(self.cluster_ids)

    @property
    def ids(self) -> Tensor | None:
        """int64 ``[len]``, oldest first; negative: none. None if the queue stores none."""
        return None if self.sample_ids is None else self._in_order(self.sample_ids)

    def _in_order(self, values: Tensor) -> Tensor:
        self._refresh()
        if self._count < self.size:  # no row has been overwritten yet, so the first row is the oldest
            return values[: self._count].clone()
        return values.roll(-self._next, 0)

    def stored(self, kept: bool) -> Stored:
        self._refresh()
        count, buffers = self._count, self._buffers  # nn.Module's __getattr__ takes as long as a small operation
        rows, clusters, ids, tags = (buffers[name] for name in ("rows", "cluster_ids", "sample_ids", "tag_words"))
        assert rows is not None
        if count < rows.shape[0]:
            rows = rows[:count]
            clusters, ids, tags = (None if values is None else values[:count] for values in (clusters, ids, tags))
        return Stored(
            rows.clone() if kept else rows,
            None if clusters is None else clusters.clone(),
            None if ids is None else ids.clone(),
            clusters is not None or tags is not None,
            None if tags is None else tags.clone(),
            self.tag_count,
        )

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, clusters: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Appends rows ``[N, dim]``, overwriting the oldest rows of a full queue.

        clusters, ids: ``[N]`` integers; negative means none. Required if the queue stores them, else not allowed. A
        queue with tags takes bool ``[N, T]`` as clusters.
        """
        self._check_embeddings(embeddings)
        n, cluster_place = len(embeddings), self._cluster_place
        for name, value, place in (("clusters", clusters, cluster_place), ("ids", ids, self.sample_ids)):
            if (value is None) != (place is None):
                kind = "a bool tensor of tags" if place is self.tag_words else "a tensor of integers"
                wanted = f"None, as the queue was made without {name}" if place is None else kind
                raise ValueError(f"{name}: expected {wanted}, got {'None' if value is None else 'a value'}")
        stored = None if clusters is None else self._clusters_of(clusters, n)
        if ids is not None:
            check_ids("ids", ids, n, self.rows.device)
            ids = ids.to(torch.int64).clamp(min=-1)
        count = min(n, self.size)
        new = unit_rows(embeddings[n - count :], self.rows.dtype)
        parts = [(self.rows, new.to(self.rows.dtype))]
        for value, place in ((stored, cluster_place), (ids, self.sample_ids)):
            if value is not None and place is not None:
                parts.append((place, value[n - count :]))
        with self._alone():
            self._refresh()
            before_end = min(count, self.size - self._next)
            for place, values in parts:
                place[self._next : self._next + before_end] = values[:before_end]
                if before_end < count:
                    place[: count - before_end] = values[before_end:]
            self._next = (self._next + count) % self.size
            self._count = min(self._count + count, self.size)
            self._count_on(count)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the queue: sets all rows to zero and removes all clusters and ids."""
        with self._alone():
            self.rows.zero_()
            self._remove_clusters()
            if self.sample_ids is not None:
                self.sample_ids.fill_(-1)
            self._count_from_zero()

    def nearest(self, embeddings: Tensor) -> Tensor:
        """For each of the embeddings ``[N, dim]``, a copy of the stored row with the largest cosine similarity (NNCLR).

        Ties go to the row in the lowest slot: the oldest one until the queue is full for the first time, after that an
        arbitrary one. ValueError if the queue is empty.
        """
        self._check_embeddings(embeddings)
        self._refresh()
        if self._count == 0:
            raise ValueError("nearest: expected at least one row in the queue, got none")
        rows = self.rows[: self._count]
        _, indices = topk_similarity(embeddings, rows, 1)  # the norm of a query does not change its nearest row
        return rows[indices[:, 0]]

    def _take(self, value: int) -> None:
        super()._take(value)
        value = max(value, 0)
        self._next, self._count = value % self.size, min(value, self.size)

    def _valid(self, value: int) -> bool:
        return value >= 0

    def _of_former(self, counters: list[int]) -> int | None:
        place, count = counters
        if not (0 <= place < self.size and (count == self.size or place == count) and count >= 0):
            return None
        return count if count < self.size else count + place

    def extra_repr(self) -> str:
        stored = "".join(
            f", {name}=True"
            for name, place in (("clusters", self.cluster_ids), ("ids", self.sample_ids))
            if place is not None
        )
        return f"{self.size}, {self.dim}, dtype={self.rows.dtype}{stored}{self._shown_tags()}, len={len(self)}"


class MemoryBank(Memory):
    """One row per sample of a data set: a running mean of its embeddings (instance discrimination, PIRL).

    ``update`` sets row i to ``normalize(momentum * row_i + (1 - momentum) * normalize(embedding))``; the first update
    of a row stores the normalised embedding. ``bank[indices]`` returns rows, zeros for rows not yet updated.

    As ``contrasts=`` of a loss, a bank gives the rows that have been updated. Their sample ids are their indices:
    ``ids=indices`` excludes an anchor's own stale row. Their clusters are those passed to ``update``, or the indices if
    the bank never received clusters: ``ClusterInfoNCE(0.07)(z, indices, contrasts=bank)`` is then instance
    discrimination, with an anchor's own row as its positive. A bank with ``tags=T`` takes bool ``[N, T]`` as clusters;
    a row whose update never had any has no tag.

    Rows are stored in ``dtype`` and updated in float32 (float64 rows or embeddings: in float64). All state is in
    buffers, and in ``state_dict``.

    Args:
        num_samples: number of rows, >= 1.
        dim: D, the dimension of a row.
        momentum: weight of the old row in an update, in [0, 1).
        dtype: dtype of the stored rows: float64, float32, bfloat16 or float16.
        tags: T, the number of tags that every row may have; None: integers are clusters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: Wu et al. 2018 (instance discrimination), Misra and van der Maaten 2020 (PIRL).
    """

    filled: Tensor
    clustered: Tensor  # 1 if an update has passed clusters, else 0
    _filled_seen: tuple[Tensor, int, int] | None = None  # the state of `filled` when every row was last found filled
    counter = "clustered"
    former_counters = 1

    def __init__(
        self, num_samples: int, dim: int, *, momentum: float = 0.5, dtype: torch.dtype = torch.float32,
        tags: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_dtype(dtype)
        num_samples, dim = _check_sizes("num_samples", num_samples, dim, dtype)
        self.momentum = finite_number("momentum", momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number of at least 0 and below 1, got {momentum}")
        self.register_buffer("rows", torch.zeros(num_samples, dim, dtype=dtype))
        self._store_clusters(num_samples, True, tags)
        self.register_buffer("filled", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("clustered", torch.zeros((), dtype=torch.int64))
        self._clustered = False  # whether an update has passed clusters
        self._full = False  # whether every row is known to be filled

    @property
    def num_samples(self) -> int:
        return self.rows.shape[0]

    def __len__(self) -> int:
        """Number of rows that have been updated."""
        self._refresh()
        if self._full:
            return self.num_samples
        count = int(self.filled.sum())
        self._found_full(count == self.num_samples)
        return count

    def __bool__(self) -> bool:
        return True

    __iter__ = None  # Python would try bank[0], bank[1], ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The rows ``[..., dim]`` at integer indices ``[...]``; a copy."""
        self._check_indices(indices)
        return self.rows[indices.to(torch.int64)]

    @property
    def embeddings(self) -> Tensor:
        """``[len, dim]``: the rows that have been updated, in the order of their indices; a copy."""
        return self.stored(kept=True).rows

    @property
    def clusters(self) -> Tensor:
        """int64 ``[len]``: clusters of those rows; their indices if no update has passed clusters.

        Bool ``[len, T]`` for a bank with tags.
        """
        _, clusters, _, _, tags, count = self.stored(kept=False)
        if tags is not None:
            return unpacked(tags, count)
        assert clusters is not None
        return clusters

    @property
    def ids(self) -> Tensor:
        """int64 ``[len]``: indices of those rows."""
        ids = self.stored(kept=False).ids
        assert ids is not None
        return ids

    def stored(self, kept: bool) -> Stored:
        self._refresh()
        indices = self._filled_rows()
        whole = len(indices) == self.num_samples

        def chosen(values: Tensor) -> Tensor:
            return values.clone() if whole else values[indices]

        rows = self.rows if whole and not kept else chosen(self.rows)
        if self.cluster_ids is None:
            assert self.tag_words is not None
            return Stored(rows, None, indices, True, chosen(self.tag_words), self.tag_count)
        clusters = chosen(self.cluster_ids) if self._clustered else indices
        return Stored(rows, clusters, indices, self._clustered)

    def _filled_rows(self) -> Tensor:
        if self._full:
            return torch.arange(self.num_samples, device=self.rows.device)
        indices = self.filled.nonzero()[:, 0]
        self._found_full(len(indices) == self.num_samples)
        return indices

    def _found_full(self, full: bool) -> None:
        self._full = full
        if not torch.compiler.is_compiling():
            self._filled_seen = buffer_state(self.filled) if full else None

    def _refresh(self) -> None:
        super()._refresh()
        if not self._full or torch.compiler.is_compiling():
            return
        if not unchanged(self.filled, self._filled_seen):
            self._found_full(bool(self.filled.all()))

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor, clusters: Tensor | None = None) -> None:
        """Moves the rows at ``indices`` ``[N]`` towards embeddings ``[N, dim]``, in the order of the batch.

        If an index occurs twice, both updates apply in order. clusters: ``[N]`` integers, negative means none; or bool
        ``[N, T]`` for a bank with tags. Without them rows keep their clusters.
        """
        self._check_embeddings(embeddings)
        self._check_indices(indices, len(embeddings))
        stored = None if clusters is None else self._clusters_of(clusters, len(embeddings))
        if len(embeddings) == 0:
            return
        # Everything that can fail runs before the first change, so that an error leaves the bank unchanged.
        indices = indices.to(torch.int64)
        cluster_place = self._cluster_place
        new = unit_rows(embeddings, self.rows.dtype)
        indices, order = torch.sort(indices, stable=True)
        # The position of each update among the updates of the same row.
        turn = torch.arange(len(indices), device=indices.device) - torch.searchsorted(indices, indices)
        with self._alone():
            self._refresh()
            for k in range(int(turn.max()) + 1):
                chosen = turn == k
                place, update = indices[chosen], new[order[chosen]]
                mixed = self.momentum * self.rows[place].to(update.dtype) + (1 - self.momentum) * update
                mixed = torch.where(self.filled[place][:, None], mixed * inverse_norms(mixed)[:, None], update)
                self.rows[place] = mixed.to(self.rows.dtype)
                self.filled[place] = True
                if stored is not None and cluster_place is not None:
                    cluster_place[place] = stored[order[chosen]]
            self._found_full(self._full)
            if stored is not None and not self._clustered:
                self._clustered = True
                self._count_on(1)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the bank: sets all rows to zero, not updated, without clusters."""
        with self._alone():
            self.rows.zero_()
            self._remove_clusters()
            self.filled.zero_()
            self._found_full(False)
            self._count_from_zero()

    def _check_indices(self, indices: Any, length: int | None = None) -> None:
        if length is not None:
            check_ids("indices", indices, length, self.rows.device)
        check_indices("indices", indices, self.num_samples, self.rows.device)

    def _take(self, value: int) -> None:
        super()._take(value)
        self._clustered = value != 0

    def _valid(self, value: int) -> bool:
        return value in (0, 1)

    def _of_former(self, counters: list[int]) -> int | None:
        return counters[0] if counters[0] in (0, 1) else None

    def extra_repr(self) -> str:
        kind = f"dtype={self.rows.dtype}{self._shown_tags()}"
        return f"{self.num_samples}, {self.dim}, momentum={self.momentum:g}, {kind}"


def _check_sizes(name: str, rows: Any, dim: Any, dtype: torch.dtype) -> tuple[int, int]:
    """The checked number of rows (the argument `name`) and `dim`; their product must fit the address space."""
    dim = check_count("dim", dim)
    return check_count(name, rows, most=ADDRESS_SPACE // (dim * dtype.itemsize)), dim


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {shown(dtype)}")
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
