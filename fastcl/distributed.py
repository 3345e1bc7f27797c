"""Losses over the rows of all processes: agreement on sizes and options, and `torch.distributed`'s collectives.

Each process returns W times its rows' share of the loss of the whole batch. DistributedDataParallel averages gradients
over the W processes, and this average is the gradient of that loss. docs/distributed.md has the details.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import check_tensor
from .ops.library import uncompiled

MODES = (False, True, "ring")
FAILED = -1  # replaces the name of the call: this process raises an error, and its text follows
MOST_NUMBERS = 128  # length of the message between processes: fixed, because processes may call different functions
Property = int | float | str  # of a string, the first 8 characters are compared (ASCII)


def gather_rows(rows: Tensor, *others: Tensor, group: Any = None) -> Any:
    """The rows of all processes in the order of ranks, without gradient: ``[N, ...] -> [sum of N, ...]``.

    A memory that enqueues them holds the same rows in the same order on every process::

        queue.enqueue(*gather_rows(keys, labels))

    Args:
        rows: ``[N, ...]``; N may differ between processes and may be 0. The other dimensions and the dtype must be the
            same.
        others: more tensors ``[N', ...]``, gathered in the same way.
        group: a process group of `torch.distributed`; None: the default group.

    Returns:
        A tensor, or with ``others`` a tuple of tensors. Without a process group the given tensors, detached.

    Every process must call this, with the same number of tensors and the same dtypes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. If processes disagree, all of them
            raise.
    """
    given = (rows, *others)
    check_group(group)
    try:
        _check_gathered(given)
    except Exception as error:
        tell_others(True, error, rows, group=group)
        raise
    found = [tensor.detach() for tensor in given]
    world = World.of(True, group)
    if world is not None:
        lengths, arrived = world.agree_and_gather(
            "gather_rows",
            {f"rows of tensor {k}": len(tensor) for k, tensor in enumerate(given)},
            {f"tensor {k}'s {what}": value for k, tensor in enumerate(given) for what, value in _kind(tensor).items()},
            rows.device,
            {f"rows of tensor {k}": [tensor] for k, tensor in enumerate(found)},
        )
        if arrived is None:
            arrived = [_all_bytes(world, tensor, sizes) for tensor, sizes in zip(found, lengths, strict=True)]
        found = arrived
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
    """Properties that processes compare; the same number of entries for every tensor."""
    lengths = [*tensor.shape[1:5], 1, 1, 1, 1][:4]
    kind: dict[str, Property] = {"dtype": dtype_name(tensor.dtype), "dimensions": tensor.dim()}
    kind |= {f"length {k}": length for k, length in enumerate(lengths, start=1)}
    return kind | {"further lengths (their hash)": zlib.crc32(repr(tuple(tensor.shape[5:])).encode())}


def _all_bytes(world: World, tensor: Tensor, sizes: list[int]) -> Tensor:
    """`World.all_rows` for any dtype, as bytes: collectives do not support all dtypes."""
    if 0 in tensor.shape[1:]:
        return world.all_rows(tensor, sizes)
    return world.all_rows(as_bytes(tensor), sizes).view(tensor.dtype).reshape(-1, *tensor.shape[1:])


def as_bytes(tensor: Tensor) -> Tensor:
    """[m, ...] as its bytes, [m, B]."""
    rows = tensor.detach().resolve_neg().contiguous()
    rows = rows[:, None] if rows.dim() == 1 else rows.flatten(1)
    return rows.view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MOST_TENSORS = 15
_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


class World(NamedTuple):
    """The processes of a group."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, gather: bool | str, group: Any = None) -> World | None:
        """The group, or the default one; None if `gather` is False, or if there is no other process."""
        if gather is False or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if group is None else group
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group, dist.get_rank(group), size)

    def agree(
        self, call: str, sizes: Mapping[str, int], alike: Mapping[str, Property], device: torch.device
    ) -> list[list[int]]:
        """Every process's sizes, [number of sizes][processes]; ValueError on all processes if `alike` or `call` differ.

        call: name of the loss or function. For each call the names and types in `alike` are fixed.

        This is one collective of `MOST_NUMBERS` integers and room for rows. The host waits for it because shapes depend
        on it. It runs before any other collective of the call, and before anything that depends on what it compares. A
        process whose own checks fail calls `tell_others` instead.
        """
        return self.agree_and_gather(call, sizes, alike, device, {})[0]

    def agree_and_gather(
        self,
        call: str,
        sizes: Mapping[str, int],
        alike: Mapping[str, Property],
        device: torch.device,
        rows: Mapping[str, Sequence[Tensor]],
    ) -> tuple[list[list[int]], list[Tensor] | None]:
        """`agree`, and in the same collective `all_rows` of the tensors in `rows`, in their order.

        The tensors are None if they do not fit into the message; the caller then gathers them.

        rows: tensors [m, ...] by the name of the size that is their m. `alike` must hold all that decides about their
            dtypes and widths.
        """
        found: tuple[list[list[int]], list[Tensor] | None] = _agree(self, call, sizes, alike, device, rows)
        return found

    def all_rows(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Rows [m, ...] of this process -> rows [M, ...] of all; `sizes` has every process's m."""
        most = max(sizes)
        if most == 0 or 0 in rows.shape[1:]:
            return rows.new_empty(sum(sizes), *rows.shape[1:])
        everyone = all_gather(self.group, padded(rows, most))
        if min(sizes) == most:
            return everyone
        return torch.cat([everyone[q * most :][:size] for q, size in enumerate(sizes)])

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, differentiable in this process's values."""
        found: Tensor = _Total.apply(self.group, values)
        return found


@uncompiled  # compiled processes might trace different graphs
def _agree(
    world: World,
    call: str,
    sizes: Mapping[str, int],
    alike: Mapping[str, Property],
    device: torch.device,
    rows: Mapping[str, Sequence[Tensor]],
) -> tuple[list[list[int]], list[Tensor] | None]:
    known: dict[str, Property] = {
        "call": call,
        "number of sizes": len(sizes),
        "number of properties": len(alike),
        **alike,
    }
    sent = [(list(sizes).index(name), tensor, as_bytes(tensor)) for name, tensors in rows.items() for tensor in tensors]
    own = [_as_integer(value) for value in (*known.values(), *sizes.values())]
    everyone, room = _exchanged(world, own, device, [piece for *_, piece in sent])
    numbers = everyone[:, :HEADER].contiguous().view(torch.int64).tolist()
    for rank, of_rank in enumerate(numbers):
        if of_rank[0] == FAILED:
            raise ValueError(
                f"gather: expected the same call on all processes, got an error on rank {rank}: {_text(of_rank)}"
            )
    for k, (name, value) in enumerate(known.items()):
        if any(of_rank[k] != own[k] for of_rank in numbers):
            values = [_from_integer(of_rank[k], value) for of_rank in numbers]
            raise ValueError(f"gather: expected the same call on all processes, got {name} = {values}, by rank")
    found = [[of_rank[len(known) + k] for of_rank in numbers] for k in range(len(sizes))]
    places = [HEADER] * world.size  # of the next tensor in each message
    ends: list[list[int]] = []
    for k, _, piece in sent:
        ends.append([place + size * piece.shape[1] for place, size in zip(places, found[k], strict=True)])
        places = [_aligned(end) for end in ends[-1]]
    most = max(places) - HEADER
    _SIZES.setdefault(world.group, deque(maxlen=REMEMBERED)).append(most)
    if most > room:
        return found, None
    arrived = []
    for (k, tensor, piece), stops in zip(sent, ends, strict=True):
        parts = [
            everyone[q, stop - size * piece.shape[1] : stop]
            for q, (stop, size) in enumerate(zip(stops, found[k], strict=True))
        ]
        arrived.append(torch.cat(parts).view(tensor.dtype).reshape(sum(found[k]), *tensor.shape[1:]))
    return found, arrived


# A message of `_agree` has `MOST_NUMBERS` integers and room for rows. Processes must choose the same room before they
# know each other's sizes. They take that of the largest rows in the last calls of the group, which all of them know.

HEADER = 8 * MOST_NUMBERS
REMEMBERED = 8  # calls; a training step may use several losses
MOST_BYTES, MOST_BYTES_OF_ALL = 1 << 20, 1 << 24  # more take a collective of their own
_SIZES: WeakKeyDictionary[Any, deque[int]] = WeakKeyDictionary()  # by group: bytes of the rows of the last calls


def few(world: World, size: int) -> bool:
    """Whether a collective of so many bytes per process takes hardly longer than one of none."""
    return size <= min(MOST_BYTES, MOST_BYTES_OF_ALL // world.size)


def _room(world: World) -> int:
    return max((size for size in _SIZES.get(world.group, ()) if few(world, size)), default=0)


def _aligned(place: int) -> int:
    return -(-place // 16) * 16


def _exchanged(
    world: World, numbers: Sequence[int], device: torch.device, pieces: Sequence[Tensor] = ()
) -> tuple[Tensor, int]:
    """The messages of all processes, bytes [processes, length], and the room for rows in them.

    pieces: bytes [m, B] of this process's rows, left out if they do not fit.
    """
    assert len(numbers) <= MOST_NUMBERS
    room, fit = _room(world), sum(_aligned(piece.numel()) for piece in pieces)
    message = torch.zeros(HEADER + room, dtype=torch.uint8, device=device)
    filled = [*numbers, *[0] * (MOST_NUMBERS - len(numbers))]
    message[:HEADER] = torch.tensor(filled, dtype=torch.int64, device=device).view(torch.uint8)
    place = HEADER
    for piece in pieces if fit <= room else ():
        message[place : place + piece.numel()] = piece.view(-1)
        place += _aligned(piece.numel())
    return all_gather(world.group, message).unflatten(0, (world.size, -1)), room


def check_group(group: Any, gather: Any = True) -> None:
    """Expects a process group that this process belongs to, or None; None where `gather` is False."""
    if group is None:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: expected a torch.distributed process group or None, got {type(group).__name__}")
    if gather is False:
        raise ValueError("group: expected None with gather=False, got a process group")


def tell_others(gather: Any, error: Exception, *arguments: Any, group: Any = None) -> None:
    """Called if this process's own checks fail: makes the other processes raise in `World.agree` instead of waiting.

    error: the error that this process will raise. arguments: the first tensor among them gives the group's device.
    """
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return  # the error is about the group
    world = World.of(gather, group) if gather is True or gather == "ring" else None
    if world is not None:
        listed = (part for value in arguments for part in (value if isinstance(value, (list, tuple)) else [value]))
        device = next((part.device for part in listed if isinstance(part, Tensor)), torch.device("cpu"))
        _tell(world, f"{type(error).__name__}: {error}", device)


@uncompiled
def _tell(world: World, message: str, device: torch.device) -> None:
    text = message.encode()[: 8 * (MOST_NUMBERS - 1)].ljust(8 * (MOST_NUMBERS - 1), b"\0")
    numbers = [FAILED, *struct.unpack(f"<{MOST_NUMBERS - 1}q", text)]
    with suppress(RuntimeError):  # if the group has failed, this process's own error is more useful
        _exchanged(world, numbers, device)


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
    """An all-reduce. The gradient of a process's values is the sum of all processes' gradients: again an all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: Any, values: Tensor) -> Tensor:
        ctx.group = group
        result = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Total.apply(ctx.group, grad)


# Collectives by the names that this torch has: 2.13 introduces shorter names and deprecates the longer ones.


def all_gather(group: Any, values: Tensor) -> Tensor:
    """The values [n, ...] of all processes, one after another; the same n in each."""
    result = values.new_empty(dist.get_world_size(group) * len(values), *values.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(result, values, group=group)
    return result


def reduce_scatter(group: Any, values: Tensor) -> Tensor:
    result = values.new_empty(len(values) // dist.get_world_size(group), *values.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(result, values, group=group)
    return result


def padded(rows: Tensor, length: int) -> Tensor:
    rows = rows.detach().resolve_neg()
    if len(rows) < length:
        rows = torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
    return rows.contiguous()
