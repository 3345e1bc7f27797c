"""Repeats calls of one kind from a tape: with few rows, preparing a call takes longer than running it on the device.

A function of tensors launches kernels and calls torch's operators on memory that it allocates. The second call with the
same shapes, dtypes, alignments and options is recorded. Later calls replay the tape: one allocation in place of many,
launches with addresses that are sums, and only those of torch's operators that compute something. The function must
not depend on values of tensors: on a GPU, reading one would wait for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from .devices import on_device

ALIGNED = 512  # bytes, as torch's allocator aligns memory on a GPU
MOST_TAPES = 256  # of one function; no more are recorded

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]
_state = threading.local()


class Place(NamedTuple):
    """A tensor, relative to memory that each replay has anew."""

    region: int
    offset: int  # bytes
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Operation(NamedTuple):
    operator: Any
    positional: list[Any]
    named: dict[str, Any]
    moved: list[tuple[bool, Any, Any]]  # arguments with tensors: whether named, which, `Place`s for the tensors
    results: list[tuple[int, int]]  # which output is which region


class Launch(NamedTuple):
    launch: Callable[[list[Any], int], None]  # of values and a stream
    values: list[Any]
    moved: list[tuple[int, Place]]  # values that are tensors
    tensors: bool  # whether the launch takes tensors; else it takes their addresses


def recorder() -> Recorder | None:
    """The recorder of this thread, which launches report to."""
    return getattr(_state, "recorder", None)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, torch's operators are not recorded: Triton's interpreter calls some."""
    if (found := recorder()) is None:
        yield
        return
    found.paused = True
    try:
        yield
    finally:
        found.paused = False


class Recorder(TorchDispatchMode):
    """Records what a function does to its inputs."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Operation | Launch] = []
        self.sizes: dict[int, int] = {}  # of regions that the function allocates, in bytes
        self.regions = 0
        self._bases: list[int] = []
        self._regions: dict[int, int] = {}  # by the tensor's id
        self._alive: list[Tensor] = []  # so that no id is used twice
        self.paused = False
        self.failed = False  # the function did something that a tape cannot repeat
        for tensor in inputs:
            self._add(tensor, 0 if tensor is None else tensor.data_ptr())

    def _add(self, tensor: Tensor | None, base: int) -> int:
        """A new region, and its first tensor."""
        self._bases.append(base)
        self.regions += 1
        if tensor is not None:
            self._know(tensor, self.regions - 1)
        return self.regions - 1

    def _know(self, tensor: Tensor, region: int) -> None:
        self._regions[id(tensor)] = region
        self._alive.append(tensor)

    def place(self, tensor: Tensor) -> Place:
        region = self._regions.get(id(tensor))
        if region is None:  # a tensor that no operator has made
            self.failed, region = True, 0
        offset = tensor.data_ptr() - self._bases[region] if tensor.numel() else 0
        self.failed |= not 0 <= offset <= tensor.untyped_storage().nbytes()  # its memory has been replaced
        return Place(region, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        outputs = [out for out in tree_flatten(result)[0] if isinstance(out, Tensor)]
        if func in _ALLOCATIONS:
            (out,) = outputs
            storage = out.untyped_storage()
            self.sizes[self._add(out, storage.data_ptr())] = storage.nbytes()
            return result
        positional, named = list(args), dict(kwargs or {})
        tensors, moved = [], []
        for arguments, places in ((positional, range(len(positional))), (named, list(named))):
            for which in places:
                found = [part for part in tree_flatten(arguments[which])[0] if isinstance(part, Tensor)]
                if found:
                    tensors += found
                    moved.append((arguments is named, which, tree_map_only(Tensor, self.place, arguments[which])))
                    arguments[which] = None  # a tape keeps no tensor alive
        results = []
        for k, out in enumerate(outputs):
            if id(out) in self._regions:
                continue
            owner = next((t for t in tensors if t.untyped_storage()._cdata == out.untyped_storage()._cdata), None)
            if owner is not None:
                self._know(out, self.place(owner).region)
            else:
                results.append((k, self._add(out, out.data_ptr())))
        if results or func._schema.is_mutable:
            self.failed |= isinstance(result, (tuple, list)) and len(result) != len(outputs)
            self.steps.append(Operation(func, positional, named, moved, results))
        elif tensors and not outputs:  # reads a value
            self.failed = True
        return result

    def launched(self, launch: Callable[..., None], values: Sequence[Any], tensors: bool) -> None:
        moved = [(k, self.place(value)) for k, value in enumerate(values) if isinstance(value, Tensor)]
        kept = [None if isinstance(value, Tensor) else value for value in values]
        self.steps.append(Launch(launch, kept, moved, tensors))


@contextmanager
def _recording(inputs: Sequence[Tensor | None]) -> Iterator[Recorder]:
    with Recorder(inputs) as found:
        _state.recorder = found
        try:
            yield found
        finally:
            _state.recorder = None


class Tape:
    """What `Recorder` found, with the places of allocations in one block of memory."""

    def __init__(self, found: Recorder, inputs: int, outputs: Outputs, own: int, device: torch.device) -> None:
        self._device, self._steps, self._count = device, found.steps, found.regions
        self._outputs = [None if out is None else found.place(out) for out in outputs]
        self._own = []
        for place in self._outputs[:own]:
            if place is None:
                continue
            contiguous = torch.empty(place.size, dtype=place.dtype, device="meta")
            if place.region in found.sizes:  # whole allocations are taken out of the block
                whole = found.sizes.pop(place.region) == contiguous.nbytes and place.offset == 0
                found.failed |= not whole or contiguous.stride() != place.stride
                self._own.append(place)
            else:  # other outputs are results of operators
                found.failed |= place.region < inputs
        self._starts: dict[int, int] = {}
        self._size = 0
        for region, size in found.sizes.items():
            self._starts[region] = self._size
            self._size += -(-max(size, 1) // ALIGNED) * ALIGNED

    def replay(self, inputs: Sequence[Tensor | None], stream: int) -> Outputs:
        replayed = _Replay(self._count, self._size, self._starts, inputs, self._device)
        for place in self._own:
            replayed.hold(place.region, torch.empty(place.size, dtype=place.dtype, device=self._device))
        with on_device(self._device):
            for step in self._steps:
                if isinstance(step, Launch):
                    values = step.values.copy()
                    if step.tensors:
                        for k, place in step.moved:
                            values[k] = replayed.tensor(place)
                    else:
                        addresses = replayed.addresses
                        for k, place in step.moved:
                            values[k] = addresses[place.region] + place.offset
                    step.launch(values, stream)
                    continue
                args, kwargs = step.positional.copy(), step.named.copy()
                for named, which, places in step.moved:
                    (kwargs if named else args)[which] = replayed.tensors(places)
                result = step.operator(*args, **kwargs)
                for k, region in step.results:
                    replayed.hold(region, result if isinstance(result, Tensor) else result[k])
        return tuple(None if place is None else replayed.tensor(place) for place in self._outputs)


class _Replay:
    """The memory of one replay."""

    def __init__(
        self, count: int, size: int, starts: dict[int, int], inputs: Sequence[Tensor | None], device: torch.device
    ) -> None:
        self.addresses = [0] * count
        self._holders: list[Tensor | None] = [None] * count
        self._starts = starts
        for region, tensor in enumerate(inputs):
            if tensor is not None:
                self.hold(region, tensor)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        base = self._memory.data_ptr()
        for region, start in starts.items():
            self.addresses[region] = base + start
        self._typed: dict[torch.dtype, Tensor] = {torch.uint8: self._memory}

    def hold(self, region: int, tensor: Tensor) -> None:
        self._holders[region] = tensor
        self.addresses[region] = tensor.data_ptr()

    def tensors(self, places: Any) -> Any:
        """A tensor, or a list of tensors and of other values."""
        if isinstance(places, Place):
            return self.tensor(places)
        return [self.tensors(place) for place in places] if isinstance(places, (list, tuple)) else places

    def tensor(self, place: Place) -> Tensor:
        region, offset, dtype, size, stride = place
        holder = self._holders[region]
        if holder is None:
            holder = self._typed.get(dtype)
            if holder is None:
                holder = self._typed[dtype] = self._memory.view(dtype)
            return holder.as_strided(size, stride, (self._starts[region] + offset) // dtype.itemsize)
        if holder.dtype != dtype:
            holder = holder.view(dtype)
        elif holder.shape == size and holder.stride() == stride and offset == 0:
            return holder
        return holder.as_strided(size, stride, holder.storage_offset() + offset // dtype.itemsize)


class Taped:
    """A function of (options, tensors ...), replayed from a tape from the third call of a kind on.

    own: how many of its first outputs have memory of their own; the others share one block, which lives as long as
        one of them.
    """

    def __init__(self, function: Function, own: int) -> None:
        self.function, self._own = function, own
        self._tapes: dict[Hashable, Tape | bool] = {}  # or whether the next call is to be recorded

    def __call__(self, options: Hashable, setting: Hashable, stream: int, *inputs: Tensor | None) -> Outputs:
        """setting: whatever else the function depends on. stream: that of the launches."""
        kinds = [t if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.device) for t in inputs]
        key = (options, setting, *kinds)
        tape = self._tapes.get(key)
        if isinstance(tape, Tape):
            return tape.replay(inputs, stream)
        if not tape:
            if tape is None and len(self._tapes) < MOST_TAPES:
                self._tapes[key] = True
            return self.function(options, *inputs)
        device = next(t.device for t in inputs if t is not None)
        with _recording(inputs) as found:
            outputs = self.function(options, *inputs)
        tape = Tape(found, len(inputs), outputs, self._own, device)
        self._tapes[key] = False if found.failed else tape
        return outputs
