"""Losses over the rows of all processes: `torch.distributed`'s collectives, and what each process returns.

The contract and its reasons are in docs/distributed.md: each process returns W times its rows' share of the loss of the
whole batch, so that the mean over W processes, which DistributedDataParallel takes of gradients, is that loss.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .kernels.blocks import BlockStats, Call, Place, Set, Visit, uncompiled
from .kernels.checks import check_tensor
from .kernels.ops import choose_backend
from .kernels.problem import FIELDS, accumulation_dtype
from .kernels.stats import ContrastiveStats, Sweep
from .posing import Posed, of_parts, offset, paired_clusters

MODES = (False, True, "ring")
FAILED = -1  # in place of a call's name: this process has raised an error, whose text follows
MOST_NUMBERS = 128  # that processes tell each other: as many everywhere, also where they call different things
Property = int | float | str  # of a string the first 8 characters, of ASCII


def gather_rows(rows: Tensor, *others: Tensor) -> Any:
    """The rows of all processes, one process after the other, without gradient: ``[N, ...] -> [sum of N, ...]``.

    A memory that is fed with them holds the same rows in the same order on every process::

        queue.enqueue(*gather_rows(keys, labels))

    Args:
        rows: ``[N, ...]``; N may differ between processes and be 0, the rest and the dtype may not.
        others: more tensors ``[N', ...]``, gathered likewise.

    Returns:
        A tensor; with ``others`` a tuple of tensors. Without a process group, the tensors themselves, detached.

    Every process must call this, with as many tensors of the same dtypes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; where processes disagree, on all.
    """
    given = (rows, *others)
    try:
        _check_gathered(given)
    except Exception as error:
        tell_others(True, error, rows)
        raise
    found = [tensor.detach() for tensor in given]
    world = World.of(True)
    if world is not None:
        lengths = world.agree(
            "gather_rows",
            {f"rows of tensor {k}": len(tensor) for k, tensor in enumerate(given)},
            {f"tensor {k}'s {what}": value for k, tensor in enumerate(given) for what, value in _kind(tensor).items()},
            rows.device,
        )
        found = [_all_bytes(world, tensor, sizes) for tensor, sizes in zip(found, lengths, strict=True)]
    return found[0] if not others else tuple(found)


def _check_gathered(given: tuple[Any, ...]) -> None:
    for k, tensor in enumerate(given):
        name = "rows" if k == 0 else f"others[{k - 1}]"
        check_tensor(name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{name}: expected shape [N, ...], got []")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected real numbers, integers or truth values, got {tensor.dtype}")
    if len(given) > MOST_TENSORS:
        raise ValueError(f"others: expected at most {MOST_TENSORS - 1} tensors, got {len(given) - 1}")


def _kind(tensor: Tensor) -> dict[str, Property]:
    """Of as many entries for every tensor."""
    lengths = [*tensor.shape[1:5], 1, 1, 1, 1][:4]
    kind: dict[str, Property] = {"dtype": dtype_name(tensor.dtype), "dimensions": tensor.dim()}
    kind |= {f"length {k}": length for k, length in enumerate(lengths, start=1)}
    return kind | {"further lengths (their hash)": zlib.crc32(repr(tuple(tensor.shape[5:])).encode())}


def _all_bytes(world: World, tensor: Tensor, sizes: list[int]) -> Tensor:
    """`World.all_rows` of any dtype: collectives do not take all of them."""
    if 0 in tensor.shape[1:]:
        return world.all_rows(tensor, sizes)
    rows = tensor.resolve_neg().contiguous()
    rows = rows[:, None] if rows.dim() == 1 else rows.flatten(1)
    return world.all_rows(rows.view(torch.uint8), sizes).view(tensor.dtype).reshape(-1, *tensor.shape[1:])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MOST_TENSORS = 15
_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


class World(NamedTuple):
    """The processes of the default group."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, gather: bool | str) -> World | None:
        """None where there is nobody to gather from, or nobody wants to."""
        if gather is False or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group, dist.get_rank(group), size)

    def agree(
        self, call: str, sizes: Mapping[str, int], alike: Mapping[str, Property], device: torch.device
    ) -> list[list[int]]:
        """Every process's sizes, [number of sizes][processes]; ValueError on all processes where others are not alike.

        call: what this process calls. Of one call, names and the types of values are the same on all processes.

        One collective of a few integers, on which the host waits: shapes depend on them. It comes before any other
        collective of the call, and before anything that depends on what is compared. A process that raises an error of
        its own instead calls `tell_others`.
        """
        found: list[list[int]] = _agree(self, call, sizes, alike, device)
        return found

    def all_rows(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """[m, ...] of this process -> [M, ...] of all, m by process in `sizes`."""
        most = max(sizes)
        if most == 0 or 0 in rows.shape[1:]:
            return rows.new_empty(sum(sizes), *rows.shape[1:])
        everyone = _all_gather(self.group, _padded(rows, most))
        if min(sizes) == most:
            return everyone
        return torch.cat([everyone[q * most :][:size] for q, size in enumerate(sizes)])

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; differentiable, where this process's values are."""
        found: Tensor = _Total.apply(self.group, values)
        return found


@uncompiled  # processes would have to agree upon their graphs
def _agree(
    world: World, call: str, sizes: Mapping[str, int], alike: Mapping[str, Property], device: torch.device
) -> list[list[int]]:
    known: dict[str, Property] = {
        "call": call,
        "number of sizes": len(sizes),
        "number of properties": len(alike),
        **alike,
    }
    own = [_as_integer(value) for value in (*known.values(), *sizes.values())]
    assert len(own) <= MOST_NUMBERS
    mine = torch.tensor(own + [0] * (MOST_NUMBERS - len(own)), dtype=torch.int64, device=device)
    everyone = _all_gather(world.group, mine).unflatten(0, (world.size, -1)).tolist()
    for rank, numbers in enumerate(everyone):
        if numbers[0] == FAILED:
            raise ValueError(
                f"gather: expected the same call on all processes, got an error on rank {rank}: {_text(numbers)}"
            )
    for k, (name, value) in enumerate(known.items()):
        values = [_from_integer(numbers[k], value) for numbers in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"gather: expected the same call on all processes, got {name} = {values}, by rank")
    return [[numbers[len(known) + k] for numbers in everyone] for k in range(len(sizes))]


def tell_others(gather: Any, error: Exception, *arguments: Any) -> None:
    """For a process whose own checks have failed: the others, who are in `World.agree` or get there, raise as well.

    error: what this process is about to raise. arguments: the first tensor among them is on the group's device.
    """
    world = World.of(gather) if gather is True or gather == "ring" else None
    if world is not None:
        listed = (part for value in arguments for part in (value if isinstance(value, (list, tuple)) else [value]))
        device = next((part.device for part in listed if isinstance(part, Tensor)), torch.device("cpu"))
        _tell(world, f"{type(error).__name__}: {error}", device)


@uncompiled
def _tell(world: World, message: str, device: torch.device) -> None:
    text = message.encode()[: 8 * (MOST_NUMBERS - 1)].ljust(8 * (MOST_NUMBERS - 1), b"\0")
    numbers = [FAILED, *struct.unpack(f"<{MOST_NUMBERS - 1}q", text)]
    with suppress(RuntimeError):  # of a group that has failed: this process's own error says more
        _all_gather(world.group, torch.tensor(numbers, dtype=torch.int64, device=device))


def _text(numbers: list[int]) -> str:
    return struct.pack(f"<{MOST_NUMBERS - 1}q", *numbers[1:]).rstrip(b"\0").decode(errors="replace")


def _as_integer(value: Property) -> int:
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    if isinstance(value, str):
        return int.from_bytes(value.encode()[:8].ljust(8, b"\0"), "little", signed=True)
    return int(value)


def _from_integer(number: int, like: Property) -> Property:
    if isinstance(like, float):
        return float(struct.unpack("<d", struct.pack("<q", number))[0])
    if isinstance(like, str):
        return number.to_bytes(8, "little", signed=True).rstrip(b"\0").decode(errors="replace")
    return type(like)(number)


class _Total(torch.autograd.Function):
    """Every process's gradient of the sum is one of each process's values: their sum, which has a derivative too."""

    @staticmethod
    def forward(ctx: Any, group: Any, values: Tensor) -> Tensor:
        ctx.group = group
        result = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Total.apply(ctx.group, grad)


# Collectives under the names of this torch: from 2.13 on the longer ones are deprecated, the shorter ones are new.


def _all_gather(group: Any, values: Tensor) -> Tensor:
    result = values.new_empty(dist.get_world_size(group) * len(values), *values.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(result, values, group=group)
    return result


def _reduce_scatter(group: Any, values: Tensor) -> Tensor:
    result = values.new_empty(len(values) // dist.get_world_size(group), *values.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(result, values, group=group)
    return result


def _padded(rows: Tensor, length: int) -> Tensor:
    rows = rows.detach().resolve_neg()
    if len(rows) < length:
        rows = torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
    return rows.contiguous()


# How contrasts travel.


class Gathered:
    """All contrasts on every process, once: an all-gather of rows, a reduce-scatter of their gradients."""

    def __init__(self, world: World, sizes: list[int]) -> None:
        self.world, self.sizes = world, sizes
        self.total = sum(sizes)
        self.starts = [sum(sizes[:q]) for q in range(len(sizes) + 1)]
        self.own = self.place(world.rank)

    def place(self, q: int) -> Place:
        """Of process q's contrasts."""
        return slice(self.starts[q], self.starts[q + 1])

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> Any:
        everyone = self.world.all_rows(rows, self.sizes)
        for place in self._places(alone):
            visit(place, None if alone and place == self.own else everyone[place])
        return everyone

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        gradients = None if dtype is None else torch.zeros_like(kept, dtype=dtype)
        for place in self._places(alone):
            found = visit(place, None if alone and place == self.own else kept[place])
            if gradients is not None and found is not None:
                gradients[place] = found
        return None if gradients is None else self.summed(gradients)

    def _places(self, alone: bool) -> list[Place]:
        if not alone:
            return [slice(0, self.total)]
        return [slice(0, self.own.start), self.own, slice(self.own.stop, self.total)]

    def spread(self, values: Tensor) -> Tensor:
        return self.world.all_rows(values.movedim(-1, 0), self.sizes).movedim(0, -1).contiguous()

    def collect(self, values: Tensor) -> Tensor:
        k, own = len(values), self.sizes[self.world.rank]
        sent = torch.cat([values[:, self.place(q)].reshape(-1) for q in range(self.world.size)])
        received = values.new_empty(self.world.size * k * own)
        splits = [k * own] * self.world.size
        dist.all_to_all_single(received, sent, splits, [k * size for size in self.sizes], group=self.world.group)
        return received.view(self.world.size, k, own)

    def summed(self, values: Tensor) -> Tensor:
        most = max(self.sizes)
        if values.numel() == 0:
            return values[self.own]
        if min(self.sizes) < most:
            values = torch.cat([_padded(values[self.place(q)], most) for q in range(self.world.size)])
        return _reduce_scatter(self.world.group, values)[: self.sizes[self.world.rank]]


class Ring(Gathered):
    """Each process passes the block that it has to the next one while it computes on it; a process holds two."""

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> None:
        for q, block in self._passing(rows):
            visit(self.place(q), None if alone and q == self.world.rank else block)

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """A block's gradient follows it, a step behind, and comes home after the last."""
        size = self.world.size
        width = rows.shape[1]
        home = None if dtype is None else rows.new_zeros(len(rows), width, dtype=dtype)
        arriving: tuple[Tensor, Callable[[], None]] | None = None
        for step, (q, block) in enumerate(self._passing(rows)):
            found = visit(self.place(q), None if alone and step == 0 else block)
            if home is None or dtype is None:
                continue
            if step == 0:
                if found is not None:
                    home += found
                continue
            gradient = rows.new_zeros(self.sizes[q], width, dtype=dtype) if found is None else found.contiguous()
            if arriving is not None:
                arriving[1]()
                gradient = gradient.add_(arriving[0])
            # Who comes before has worked on the block that comes next here; after the last step, on this process's.
            arriving = self._pass_on(gradient, rows.new_empty(self.sizes[(q - 1) % size], width, dtype=dtype))
        if home is not None and arriving is not None:
            arriving[1]()
            home += arriving[0]
        return home

    def _passing(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rank and rows of each block, this process's own first, then its predecessor's, and so on."""
        rank, size = self.world.rank, self.world.size
        block = rows.detach().resolve_neg().contiguous()
        for step in range(size):
            q = (rank - step) % size
            following = None
            if step + 1 < size:
                following = self._pass_on(block, rows.new_empty(self.sizes[(q - 1) % size], rows.shape[1]))
            yield q, block
            if following is not None:
                following[1]()
                block = following[0]

    def _pass_on(self, sent: Tensor, received: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Sends to the next process and receives from the one before; what is received, and how to wait for it."""
        world = self.world
        transfers = []
        if sent.numel():
            transfers.append(dist.P2POp(dist.isend, sent, self._peer(world.rank + 1), world.group))
        if received.numel():
            transfers.append(dist.P2POp(dist.irecv, received, self._peer(world.rank - 1), world.group))
        pending = dist.batch_isend_irecv(transfers) if transfers else []

        def wait() -> None:
            for transfer in pending:
                transfer.wait()
            transfers.clear()  # until here what is sent must live

        return received, wait

    def _peer(self, rank: int) -> int:
        return dist.get_global_rank(self.world.group, rank % self.world.size)


# What losses do with all of it.


def has_gradient(tensor: Tensor | None) -> bool:
    """Whether a backward of what is computed with it now would want to know its gradient."""
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def statistics(
    world: World, gather: bool | str, sweep: Sweep, posed: Posed, exact: bool, call: str, alike: Mapping[str, Property]
) -> ContrastiveStats:
    """`Sweep.statistics` where tensors of the contrasts, or the anchors in self-contrast, are those of all processes.

    call, alike: what is called, and what else processes have to agree upon.
    """
    anchors, contrasts, bias = sweep.anchors, sweep.contrasts, sweep.contrast_bias
    dtype = accumulation_dtype(anchors, contrasts, sweep.positives)
    stored = any(kind for _, kind in posed.parts)
    nothing_travels = contrasts is not None and stored and all(kind for _, kind in posed.parts)
    rows: Tensor | None = anchors
    if contrasts is not None:
        rows = None if nothing_travels else of_parts(contrasts, posed, False)
    backend = choose_backend(anchors.device, dtype)
    tensors = {
        "anchors": anchors, "contrasts": rows, "positives": sweep.positives, "logit scale": sweep.logit_scale,
        "contrast_bias": bias, "assignments": sweep.anchor_assignments,
        "contrast_assignments": sweep.contrast_assignments,
    }  # fmt: skip
    properties: dict[str, Property] = {
        "gather": str(gather),
        "contrasts": "none" if contrasts is None else "stored" if nothing_travels else "both" if stored else "tensors",
        "views": posed.views,
        "dimension": anchors.shape[1],
        "dtype of anchors": dtype_name(anchors.dtype),
        "dtype of contrasts": "none" if rows is None else dtype_name(rows.dtype),
        "dtype of sums": dtype_name(dtype),
        "symmetric": sweep.both,
        "normalised anchors": sweep.normalize_anchors,
        "normalised contrasts": sweep.normalize_contrasts,
        "backend": backend,
        "clusters given": not posed.by_sample,
        "default clusters of contrasts": posed.paired,
        "ids given": sweep.contrast_ids is not None,
        "positives given": sweep.positives is not None,
        "contrast_bias given": bias is not None,
        "assignments": -1 if sweep.anchor_assignments is None else sweep.anchor_assignments.shape[1],
    }
    # Who needs a gradient of anything takes part in the backward, whose collectives wait for all.
    needs = {name: has_gradient(tensor) for name, tensor in tensors.items()}
    samples, sizes = world.agree(
        call,
        {"samples": posed.shape[0], "contrasts": 0 if rows is None else len(rows)},
        {**alike, **properties, **{f"{name} with a gradient": need for name, need in needs.items()}},
        anchors.device,
    )
    if sweep.anchor_assignments is not None:
        return _assigned(world, [n * posed.views for n in samples], sizes, sweep, sweep.anchor_assignments, exact)
    if rows is None:
        return sweep.statistics(exact)[0]
    if sweep.both and stored:
        raise ValueError("symmetric: expected False for gathered contrasts beside a queue or bank, got True")
    travelling_bias = None if bias is None else of_parts(bias.to(dtype), posed, False)
    order = [field for field in FIELDS if field in sweep.want]
    first = sum(samples[: world.rank])
    clusters, contrast_clusters = offset(posed, first)

    def set_of(of_stored: bool) -> Set:
        if contrasts is None or (of_stored and not stored):
            return Set(None, None, None, None if of_stored else travelling_bias)
        parts = (
            of_parts(values, posed, of_stored) for values in (contrasts, contrast_clusters, sweep.contrast_ids, bias)
        )
        of_rows, of_clusters, of_ids, of_bias = parts
        return Set(of_rows, of_clusters, of_ids, None if of_bias is None else of_bias.to(dtype))

    called = Call(
        exchange=(Ring if gather == "ring" else Gathered)(world, sizes),
        normalize_anchors=sweep.normalize_anchors,
        normalize_contrasts=sweep.normalize_contrasts,
        want=tuple(order),
        both=sweep.both,
        backend=backend,
        exact=exact,
        one_scale=sweep.logit_scale.dim() == 0,
        contrasts_need=needs["contrasts"],
        bias_needs=needs["contrast_bias"],
        clusters=paired_clusters(samples, posed.views, sizes, anchors.device) if posed.paired else None,
    )
    scales = sweep.logit_scale.to(dtype).reshape(-1)
    values = BlockStats.apply(
        called, anchors, sweep.positives, clusters, sweep.anchor_ids, scales, *set_of(False), *set_of(True)
    )
    return sweep.named(values, order)


class _AllRows(torch.autograd.Function):
    """Contrasts' rows, or numbers, of all processes; back comes the sum over processes of their gradients.

    Each is the other's derivative, of any order.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Gathered, rows: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.world.all_rows(rows, exchange.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _SummedRows.apply(ctx.exchange, grad)


class _SummedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Gathered, values: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.summed(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllRows.apply(ctx.exchange, grad)


def _assigned(
    world: World, rows: list[int], sizes: list[int], sweep: Sweep, own: Tensor, exact: bool
) -> ContrastiveStats:
    """`statistics` of assignments: sums of weights, which have derivatives, are not merged but swept over all rows."""
    # In the dtype of the sums, so that gradients are rounded after they have been added.
    dtype = accumulation_dtype(sweep.anchors, sweep.contrasts)
    anchors, own = sweep.anchors.to(dtype), own.to(dtype)
    contrasts = anchors if sweep.contrasts is None else sweep.contrasts.to(dtype)
    theirs = own if sweep.contrast_assignments is None else sweep.contrast_assignments.to(dtype)
    bias = None if sweep.contrast_bias is None else sweep.contrast_bias.to(dtype)
    by_row, by_contrast = Gathered(world, rows), Gathered(world, sizes)

    def everywhere(exchange: Gathered, values: Tensor) -> Tensor:
        found: Tensor = _AllRows.apply(exchange, values)
        return found

    ids, contrast_ids = sweep.anchor_ids, sweep.contrast_ids
    if sweep.contrasts is None:  # every row but itself
        contrast_ids = torch.arange(by_row.total, device=anchors.device)
        ids = contrast_ids[by_row.own]
    elif contrast_ids is not None:
        contrast_ids = by_contrast.spread(contrast_ids)
    found = sweep._replace(
        anchors=anchors,
        contrasts=everywhere(by_contrast, contrasts),
        anchor_assignments=own,
        contrast_assignments=everywhere(by_contrast, theirs),
        contrast_bias=None if bias is None else everywhere(by_contrast, bias),
        anchor_ids=ids,
        contrast_ids=contrast_ids,
        normalize_contrasts=sweep.normalize_anchors,
        both=False,
    ).statistics(exact)[0]
    if not sweep.both:
        return found
    # A contrast's bias is alike in all of its logits, and no loss of assignments sees it.
    reverse = sweep._replace(
        anchors=contrasts,
        contrasts=everywhere(by_row, anchors),
        anchor_assignments=theirs,
        contrast_assignments=everywhere(by_row, own),
        contrast_bias=None,
        anchor_ids=sweep.contrast_ids,
        contrast_ids=None if sweep.anchor_ids is None else by_row.spread(sweep.anchor_ids),
        normalize_anchors=sweep.normalize_contrasts,
        normalize_contrasts=sweep.normalize_anchors,
        both=False,
    )
    return replace(found, reverse=reverse.statistics(exact)[0])
