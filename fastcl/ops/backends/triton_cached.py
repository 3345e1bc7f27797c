"""Launches a kernel that Triton has compiled without Triton's own look-up, which takes longer than the launch itself.

At each launch Triton binds and inspects every argument and option. `CachedLauncher` finds what Triton compiled by a key
of its own and calls the launcher of the compiled kernel. The key tells at least as much apart as Triton's does: dtypes
and alignments of tensors, classes of integers, constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from .triton_recorder import STREAM, recorder
from .triton_series import described
from .triton_tiles import Tile

# For each version of Triton, whether the launcher of a compiled kernel takes the constants too.
KNOWN = {(3, 2): False} | {(3, minor): True for minor in range(3, 10)}


class CachedLauncher:
    """The compiled variants of one kernel, whose constants must be its last arguments."""

    def __init__(self, function: Any, version: tuple[int, int]) -> None:
        from triton.runtime import driver

        self._driver, self._runtime = driver, _runtime()
        self._function = function
        names: Sequence[str] = function.arg_names
        count = sum(not parameter.is_constexpr for parameter in function.params)
        self._names, self._constants = names[:count], itemgetter(*names[count:], names[-1])  # always a tuple
        self._passed = len(names) - count if KNOWN[version] else 0  # number of constants that a launch takes
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def launch(self, shape: Tile, grid: Sequence[int], given: dict[str, Any]) -> None:
        constants = self._constants(given)
        active = self._driver.active
        device = active.get_current_device()
        key: list[Any] = [constants, shape.warps, shape.stages, shape.registers, device]
        values: list[Any] = []
        for name in self._names:
            value = given[name]
            if isinstance(value, Tensor):
                key.append(value.dtype)
                value = value.data_ptr()
                key.append(value & 15)
            elif value is None or isinstance(value, bool):
                key.append(value)
            elif isinstance(value, int):  # 1, multiples of 16, and integers of 64 bits are compiled differently
                key.append(value if value == 1 else (value & 15 == 0, value.bit_length() // 32))
            else:
                key.append(type(value))
            values.append(value)
        places = tuple(key)
        compiled = self._compiled.get(places)
        if compiled is None or self.watched():
            found = launched_by_triton(self._function, shape, grid, given)
            compiled = self._compiled.setdefault(places, found)  # the first one is kept, as tapes launch it
        else:
            stream = active.get_current_stream(device)
            compiled.run(*_arguments(compiled, grid, stream, values, constants[: self._passed]))
        if (tape := recorder()) is not None:
            inputs = [given[name] for name in self._names]
            arguments = _arguments(compiled, grid, STREAM, inputs, constants[: self._passed])
            tape.launched(compiled.run, arguments, False, described(compiled, self._names), _three(grid), inputs)

    def stream(self) -> int:
        """The current device's current stream."""
        stream: int = self._driver.active.get_current_stream(self._driver.active.get_current_device())
        return stream

    def watched(self) -> bool:
        """Whether a profiler's hooks are to be called around launches."""
        enter, leave = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def _arguments(
    compiled: Any, grid: Sequence[int], stream: Any, values: Sequence[Any], constants: Sequence[Any]
) -> list[Any]:
    """What `compiled.run` takes; no hooks are called."""
    return [*_three(grid), stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *constants]


def _three(grid: Sequence[int]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def _runtime() -> Any:
    """What holds the hooks around launches."""
    try:
        from triton import knobs  # since Triton 3.4
    except ImportError:
        from triton.compiler import CompiledKernel

        return CompiledKernel
    return knobs.runtime


def launched_by_triton(function: Any, shape: Tile, grid: Sequence[int], given: dict[str, Any]) -> Any:
    """Launches a kernel by Triton's own interface; returns the compiled kernel."""
    arguments = {name: given[name] for name in function.arg_names}
    # Fused multiply-adds would round the same logit differently in different kernels.
    return function[tuple(grid)](**arguments, **shape.options, enable_fp_fusion=False)
