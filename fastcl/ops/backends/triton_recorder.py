"""Records what a function does to its inputs: the launches, zeros and operators of a tape (`triton_tape`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from . import triton_series

LEAST_ADDRESS = 1 << 32  # smaller numbers of a description are sizes

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

# Allocations of zeros, and what makes a tensor zero.
_ZEROS = {
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
}
_ZERO = torch.ops.aten.zero_.default
# What depends on nothing is computed once, as is what operators make of it. (`full` may be memory that a kernel fills.)
_CONSTANT = torch.ops.aten.arange.default

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


class Zeros(NamedTuple):
    """Contiguous memory that becomes zero."""

    place: Place
    size: int  # bytes


class Launch(NamedTuple):
    function: Callable[..., None]
    arguments: list[Any]  # with `Place`s for tensors, and `STREAM`; may have tuples of them
    tensors: bool  # whether the function takes tensors; else it takes their addresses
    kernel: triton_series.Kernel | None  # for the native module
    grid: Sequence[int]
    values: list[Any]  # of the kernel's arguments, with `Place`s for tensors


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
        self.steps: list[Operation | Zeros | Launch] = []
        self.sizes: dict[int, int] = {}  # of regions that the function allocates, in bytes
        self.regions = 0
        self.constants: dict[int, Tensor] = {}  # by region
        self._bases: list[int] = []
        self._lengths: list[int] = []  # of regions, in bytes from their base
        self._regions: dict[int, int] = {}  # by the tensor's id
        self._alive: list[Tensor] = []  # so that no id is used twice
        self.paused = False
        self.failed = False  # the function did something that a tape cannot repeat
        for tensor in inputs:
            base, known = (0, True) if tensor is None else (tensor.data_ptr(), id(tensor) in self._regions)
            self._add(tensor, base, 0 if known or tensor is None else _extent(tensor))

    def _add(self, tensor: Tensor | None, base: int, length: int) -> int:
        """A new region, and its first tensor."""
        self._bases.append(base)
        self._lengths.append(length)
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
        if func in _ALLOCATIONS or func in _ZEROS:
            (out,) = outputs
            storage = out.untyped_storage()
            self.sizes[self._add(out, storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        if (func in _ZEROS or (func is _ZERO and args[0].is_contiguous())) and outputs[0].numel():
            self.steps.append(Zeros(self.place(outputs[0]), outputs[0].nbytes))
        if func in _ALLOCATIONS or func in _ZEROS or (func is _ZERO and args[0].is_contiguous()):
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
        constant = func is _CONSTANT or (
            bool(tensors)
            and all(self._regions.get(id(t)) in self.constants for t in tensors)
            and not func._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in func.tags
        )
        for k, out in enumerate(outputs):
            if id(out) in self._regions:
                continue
            owner = next((t for t in tensors if t.untyped_storage()._cdata == out.untyped_storage()._cdata), None)
            if owner is not None:
                self._know(out, self.place(owner).region)
            else:
                results.append((k, self._add(out, out.data_ptr(), _extent(out))))
        if constant:
            self.constants |= {region: outputs[k] for k, region in results}
        elif results or func._schema.is_mutable:
            several = isinstance(result, (tuple, list))
            self.failed |= several and len(result) != len(outputs)
            self.steps.append(Operation(func, positional, named, moved, several, results))
        elif tensors and not outputs:  # reads a value
            self.failed = True
        return result

    def needed(self, outputs: Sequence[Place | None]) -> list[Operation | Zeros | Launch]:
        """The steps without operators whose results are not used."""
        used = {place.region for place in outputs if place is not None}
        kept = []
        for step in reversed(self.steps):
            results = {region for _, region in step.results} if isinstance(step, Operation) else set()
            if isinstance(step, Operation) and not step.operator._schema.is_mutable and not results & used:
                continue
            kept.append(step)
            if isinstance(step, Operation):
                values: list[Any] = [places for _, _, places in step.moved]
            else:
                values = [step.place] if isinstance(step, Zeros) else [*step.arguments, *step.values]
            used |= {value.region for value in _places_in(values)}
        self.constants = {region: tensor for region, tensor in self.constants.items() if region in used}
        return kept[::-1]

    def launched(
        self,
        function: Callable[..., None],
        arguments: Sequence[Any],
        tensors: bool,
        kernel: triton_series.Kernel | None = None,
        grid: Sequence[int] = (),
        values: Sequence[Any] = (),
    ) -> None:
        """A replay calls function(*arguments), with `tensors` or with their addresses; or the native module launches
        the kernel with the values of its arguments."""

        def places(values: Sequence[Any]) -> list[Any]:
            return [self.place(value) if isinstance(value, Tensor) else value for value in values]

        self.steps.append(Launch(function, places(arguments), tensors, kernel, grid, places(values)))

    def called(self, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        """A replay calls function(*arguments) with other addresses: numbers that are addresses in known memory."""
        self.steps.append(Launch(function, [self._located(value) for value in arguments], False, None, (), []))

    def _located(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._located(part) for part in value)
        if type(value) is not int or value < LEAST_ADDRESS:
            return value
        found = [k for k in range(self.regions) if 0 <= value - self._bases[k] < self._lengths[k]]
        if len(found) != 1:  # none, or inputs that share memory
            self.failed = True
            return value
        return Place(found[0], value - self._bases[found[0]], torch.uint8, (), ())


def _extent(tensor: Tensor) -> int:
    """The number of bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _places_in(values: Any) -> Iterator[Place]:
    if isinstance(values, Place):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _places_in(value)


@contextmanager
def recording(inputs: Sequence[Tensor | None]) -> Iterator[Recorder]:
    with Recorder(inputs) as found:
        _state.recorder = found
        try:
            yield found
        finally:
            _state.recorder = None
