"""Repeats calls of one kind from a tape: with few rows, preparing a call takes longer than running it on the device.

A function of tensors launches kernels and calls torch's operators on memory that it allocates. The second call with the
same shapes, dtypes, alignments and options is recorded. Later calls replay the tape: one allocation in place of many,
launches with addresses that are sums, and only those of torch's operators that compute something. The tape is a Python
function that is written and compiled once; launches without an operator in between are one call of the native module
(`triton_series`). The recorded function must not depend on values of tensors: on a GPU, reading one would wait for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import triton_series
from .devices import on_device
from .triton_recorder import STREAM, Launch, Operation, Place, Recorder, Zeros, recording

ALIGNED = 512  # bytes, as torch's allocator aligns memory on a GPU
MOST_TAPES = 256  # of one function; beyond, kinds that came once are forgotten, and no others are recorded

Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
SEES_HOOKS = _top_hooks is not None  # otherwise every call of a function has to save the same tensors for its backward


def hooks_active() -> bool:
    """Whether hooks pack the tensors that are saved for a backward.

    `torch.utils.checkpoint` requires that a forward and its repetition save the same ones, which tapes do not.
    """
    return _top_hooks is not None and _top_hooks(True) is not None


class Tape:
    """What `Recorder` found, with the places of allocations in one block of memory.

    A replay returns the first `own` outputs, and then the tensors that hold the others: see `outputs`.
    """

    def __init__(
        self, found: Recorder, inputs: int, outputs: Outputs, own: int, device: torch.device, stream: int
    ) -> None:
        places = [None if out is None else found.place(out) for out in outputs]
        found.steps = found.needed(places)
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
        self._device, self._stream = device, stream
        self._constants_there: torch.cuda.Event | None = None  # of the stream on which they are computed
        if found.constants and device.type == "cuda":
            self._constants_there = torch.cuda.Event()
            self._constants_there.record()
        if not found.failed:
            self._run, self._places = _Writer(found, inputs, owned, device).function(places, own)

    def ready(self, stream: int) -> bool:
        """Whether constants are there for launches on this stream. Nothing waits for them."""
        if self._constants_there is None or stream == self._stream:
            return True
        if torch.cuda.is_current_stream_capturing() or not self._constants_there.query():
            return False
        self._constants_there = None
        return True

    def replay(self, inputs: Sequence[Tensor | None], stream: int) -> Outputs:
        with on_device(self._device):
            return self._run(inputs, stream)

    def outputs(self, holders: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The outputs after the first `own`, as views of the tensors that a replay returned in their place."""
        found = []
        for place in self._places:
            holder = None if place is None else holders[place.region]
            found.append(None if place is None or holder is None else _view(holder, place))
        return found


def comparable(found: Sequence[Tensor | None], tape: Tape | None) -> tuple[Sequence[Tensor | None], Tape | None]:
    """What a call saves for its backward: with a tape its `holders`, or, unless `SEES_HOOKS`, what they hold."""
    return (found, tape) if tape is None or SEES_HOOKS else (tape.outputs(found), None)


class _Writer:
    """Writes a tape as a Python function without loops and look-ups, which would take longer than the launches."""

    def __init__(self, found: Recorder, inputs: int, owned: Sequence[Place], device: torch.device) -> None:
        self._found, self._device = found, device
        self._names: dict[str, Any] = {"stream": None, "empty": torch.empty, "view": _view, "series": triton_series}
        self._names |= {f"r{region}": tensor for region, tensor in found.constants.items()}
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

    def function(
        self, outputs: Sequence[Place | None], own: int
    ) -> tuple[Callable[[Sequence[Tensor | None], int], Outputs], list[Place | None]]:
        """The function, and the places of outputs in the tensors that it returns after the first `own` outputs."""
        native = any(isinstance(step, Launch) and step.kernel for step in self._found.steps)

        def in_series(step: Operation | Zeros | Launch) -> bool:
            return native and (isinstance(step, Zeros) or (isinstance(step, Launch) and step.kernel is not None))

        for several, steps in groupby(self._found.steps, in_series):
            if several:
                self._series([step for step in steps if not isinstance(step, Operation)])
                continue
            for step in steps:
                if isinstance(step, Launch):
                    self._launch(step)
                elif isinstance(step, Zeros):
                    self._lines.append(f"{self._tensor(step.place)}.zero_()")
                else:
                    self._operation(step)
        result = "".join(f"{self._tensor(place)}, " for place in outputs[:own])  # may write lines
        holders: dict[str, int] = {}
        places = []
        for place in outputs[own:]:
            if place is not None:
                start = self._starts.get(place.region)
                holder = holders.setdefault(f"r{place.region}" if start is None else "block", len(holders))
                place = place._replace(region=holder, offset=place.offset + (start or 0))
            places.append(place)
        result += "".join(f"{holder}, " for holder in holders)
        source = "\n    ".join(["def replay(inputs, stream):", *self._lines, f"return ({result})"])
        exec(compile(source, "<tape>", "exec"), self._names)
        written: Callable[[Sequence[Tensor | None], int], Outputs] = self._names["replay"]
        return written, places

    def _launch(self, step: Launch) -> None:
        place_of = self._tensor if step.tensors else self._address

        def written(value: Any) -> str:
            if isinstance(value, Place):
                return place_of(value)
            if type(value) is tuple:
                return f"({''.join(f'{written(part)}, ' for part in value)})"
            return self._constant(value)

        arguments = ", ".join([written(value) for value in step.arguments])  # may write lines
        self._lines.append(f"{self._constant(step.function)}({arguments})")

    def _series(self, steps: Sequence[Launch | Zeros]) -> None:
        bases: dict[str, int] = {}  # variables that hold addresses

        def based(value: Any) -> tuple[int, Any]:
            if not isinstance(value, Place):
                return -1, value
            base, offset = self._base(value)
            return bases.setdefault(base, len(bases)), offset

        launches = []
        for step in steps:
            if isinstance(step, Zeros):
                launches.append(triton_series.zeros(*based(step.place), step.size))
            else:
                assert step.kernel is not None
                launches.append(
                    triton_series.launch_of(step.kernel, step.grid, [based(value) for value in step.values])
                )
        run = self._constant(triton_series.series(launches, self._device).run)
        self._lines.append(f"{run}({', '.join(('series.driver()', 'stream', *bases))})")

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
        base, offset = self._base(place)
        return f"{base} + {offset}" if offset else base

    def _base(self, place: Place) -> tuple[str, int]:
        """The variable that holds an address, and the distance from it."""
        start = self._starts.get(place.region)
        if start is not None:
            return "start", start + place.offset
        if place.region not in self._addresses:
            self._addresses.add(place.region)
            self._lines.append(f"a{place.region} = r{place.region}.data_ptr()")
        return f"a{place.region}", place.offset

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
    """A function of (options, tensors ...), replayed from a tape from the third call of a kind on, or the second.

    own: how many of its first outputs have memory of their own; the others share one block, which lives as long as
        one of them.
    """

    def __init__(self, function: Function, own: int) -> None:
        self.function, self._own = function, own
        self._tapes: dict[Hashable, Tape | bool] = {}  # or whether the next call is to be recorded

    def __call__(
        self, options: Hashable, setting: Hashable, stream: int, *inputs: Tensor | None, at_once: bool = False
    ) -> tuple[Outputs, Tape | None]:
        """The first `own` outputs, then all others, or, with a tape, what `Tape.outputs` makes them of.

        setting: whatever else the function depends on. stream: that of the launches. at_once: record the first call.
        """
        kinds = [t if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.device) for t in inputs]
        first: dict[int, int] = {}
        same = tuple([first.setdefault(id(t), k) for k, t in enumerate(inputs)])  # which inputs are the same tensor
        key = (options, setting, same, *kinds)
        tape = self._tapes.get(key)
        if isinstance(tape, Tape):
            if tape.ready(stream):
                return tape.replay(inputs, stream), tape
            return self.function(options, *inputs), None
        if tape is None and len(self._tapes) >= MOST_TAPES:  # forget the kinds that came once
            self._tapes = {kind: kept for kind, kept in list(self._tapes.items()) if kept is not True}
        if tape is None and len(self._tapes) < MOST_TAPES:
            tape, self._tapes[key] = at_once, True
        if not tape:
            return self.function(options, *inputs), None
        device = next(t.device for t in inputs if t is not None)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # constants would be the graph's
            return self.function(options, *inputs), None
        with recording(inputs) as found:
            outputs = self.function(options, *inputs)
        new = Tape(found, len(inputs), outputs, self._own, device, stream)
        self._tapes[key] = False if found.failed else new
        return outputs, None
