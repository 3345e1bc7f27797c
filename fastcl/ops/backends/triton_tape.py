"""Repeats calls of one kind from a tape: with few rows, preparing a call takes longer than running it on the device.

A function of tensors launches kernels and calls torch's operators on memory that it allocates. The second call with the
same shapes, dtypes, alignments and options is recorded. Later calls replay the tape: one allocation in place of many,
launches with addresses that are sums, and only those of torch's operators that compute something. The tape is a Python
function that is written and compiled once. The recorded function must not depend on values of tensors: on a GPU,
reading one would wait for the device.
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
    several: bool  # whether it returns a tuple or list
    results: list[tuple[int, int]]  # which output is which region


class Launch(NamedTuple):
    function: Callable[..., None]
    arguments: list[Any]  # with `Place`s for tensors, and `STREAM`
    tensors: bool  # whether the function takes tensors; else it takes their addresses


STREAM: Any = object()  # stands for the stream of a replay


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
            several = isinstance(result, (tuple, list))
            self.failed |= several and len(result) != len(outputs)
            self.steps.append(Operation(func, positional, named, moved, several, results))
        elif tensors and not outputs:  # reads a value
            self.failed = True
        return result

    def launched(self, function: Callable[..., None], arguments: Sequence[Any], tensors: bool) -> None:
        places = [self.place(value) if isinstance(value, Tensor) else value for value in arguments]
        self.steps.append(Launch(function, places, tensors))


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
        places = [None if out is None else found.place(out) for out in outputs]
        owned = []
        for place in places[:own]:
            if place is None:
                continue
            contiguous = torch.empty(place.size, dtype=place.dtype, device="meta")
            if place.region in found.sizes:  # whole allocations are taken out of the block
                whole = found.sizes.pop(place.region) == contiguous.nbytes and place.offset == 0
                found.failed |= not whole or contiguous.stride() != place.stride
                owned.append(place)
            else:  # other outputs are results of operators
                found.failed |= place.region < inputs
        self._device = device
        if not found.failed:
            self._run = _Writer(found, inputs, owned, device).function(places)

    def replay(self, inputs: Sequence[Tensor | None], stream: int) -> Outputs:
        with on_device(self._device):
            return self._run(inputs, stream)


class _Writer:
    """Writes a tape as a Python function without loops and look-ups, which would take longer than the launches."""

    def __init__(self, found: Recorder, inputs: int, owned: Sequence[Place], device: torch.device) -> None:
        self._found = found
        self._names: dict[str, Any] = {"stream": None, "empty": torch.empty, "view": _view}
        self._starts: dict[int, int] = {}  # in the block
        self._addresses: set[int] = set()  # regions with a variable for their address
        self._tensors: dict[Place, str] = {}  # variables for tensors in the block
        self._typed: dict[torch.dtype, str] = {}  # variables for the block as numbers of this dtype
        size = 0
        for region, bytes_ in found.sizes.items():
            self._starts[region] = size
            size += -(-max(bytes_, 1) // ALIGNED) * ALIGNED
        self._lines = [f"{''.join(f'r{region}, ' for region in range(inputs))} = inputs"]
        for place in owned:
            options = f"dtype={self._constant(place.dtype)}, device={self._constant(device)}"
            self._lines.append(f"r{place.region} = empty({place.size}, {options})")
        if self._starts:
            options = f"dtype={self._constant(torch.uint8)}, device={self._constant(device)}"
            self._lines += [f"block = empty({size}, {options})", "start = block.data_ptr()"]

    def function(self, outputs: Sequence[Place | None]) -> Callable[[Sequence[Tensor | None], int], Outputs]:
        for step in self._found.steps:
            if isinstance(step, Launch):
                self._launch(step)
            else:
                self._operation(step)
        result = "".join(f"{self._tensor(place)}, " for place in outputs)  # may write lines
        source = "\n    ".join(["def replay(inputs, stream):", *self._lines, f"return ({result})"])
        exec(compile(source, "<tape>", "exec"), self._names)
        written: Callable[[Sequence[Tensor | None], int], Outputs] = self._names["replay"]
        return written

    def _launch(self, step: Launch) -> None:
        place_of = self._tensor if step.tensors else self._address
        arguments = [place_of(value) if isinstance(value, Place) else self._constant(value) for value in step.arguments]
        self._lines.append(f"{self._constant(step.function)}({', '.join(arguments)})")

    def _operation(self, step: Operation) -> None:
        arguments = {which: self._constant(value) for which, value in enumerate(step.positional)}
        options = {which: self._constant(value) for which, value in step.named.items()}
        for named, which, places in step.moved:
            (options if named else arguments)[which] = self._nested(places)
        given = [*arguments.values(), *(f"{name}={value}" for name, value in options.items())]
        self._lines.append(f"result = {self._constant(step.operator)}({', '.join(given)})")
        for k, region in step.results:
            self._lines.append(f"r{region} = result[{k}]" if step.several else f"r{region} = result")

    def _constant(self, value: Any) -> str:
        if value is STREAM:
            return "stream"
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name

    def _nested(self, places: Any) -> str:
        """A tensor, or a list of tensors and of other values."""
        if isinstance(places, (list, tuple)) and not isinstance(places, Place):
            return f"[{', '.join(map(self._nested, places))}]"
        return self._tensor(places) if isinstance(places, Place) else self._constant(places)

    def _address(self, place: Place) -> str:
        start = self._starts.get(place.region)
        if start is not None:
            return f"start + {start + place.offset}"
        if place.region not in self._addresses:
            self._addresses.add(place.region)
            self._lines.append(f"a{place.region} = r{place.region}.data_ptr()")
        return f"a{place.region} + {place.offset}" if place.offset else f"a{place.region}"

    def _tensor(self, place: Place | None) -> str:
        if place is None:
            return "None"
        region, offset, dtype, size, stride = place
        if region not in self._starts:
            return f"view(r{region}, {self._constant(place)})"
        if place not in self._tensors:
            if dtype not in self._typed:
                self._typed[dtype] = f"typed{len(self._typed)}"
                self._lines.append(f"{self._typed[dtype]} = block.view({self._constant(dtype)})")
            self._tensors[place] = name = f"t{len(self._tensors)}"
            first = (self._starts[region] + offset) // dtype.itemsize
            self._lines.append(f"{name} = {self._typed[dtype]}.as_strided({size}, {stride}, {first})")
        return self._tensors[place]


def _view(holder: Tensor, place: Place) -> Tensor:
    """The tensor at a place in an input or a result."""
    _, offset, dtype, size, stride = place
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
