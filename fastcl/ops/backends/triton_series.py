"""Series of launches: what a tape launches without an operator in between, made by one call of the native module.

A launch of a compiled kernel is described once: function, grid, threads, shared memory, and its parameters as numbers
or as offsets from addresses that each replay has anew. Without the native module, and for kernels that need more than
that, a tape calls Triton's launcher for each launch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from .native import native_module

LARGEST_SHARED = 228 << 10  # bytes; beyond it Triton's launcher sets an attribute

_FORMATS = {  # of the types of Triton's signatures, besides pointers
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
_SCRATCH = ((-1, 0), (-1, 0))  # parameters that newer versions of Triton add: global and profile scratch memory
# What a kernel's metadata may ask of Triton's launcher.
_BY_TRITON = (
    "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "instrumentation_mode",
)  # fmt: skip


class Kernel(NamedTuple):
    """A compiled kernel, as the driver launches it."""

    function: int
    threads: int  # of a block
    shared: int  # bytes
    types: tuple[str | None, ...]  # of each argument in Triton's signature; None: it is a constant, no parameter


@cache
def driver() -> Any:
    """The functions of the CUDA driver for the native module; None without it or without a driver."""
    found = getattr(native_module(), "Driver", None)
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    names = ("cuLaunchKernel", "cuMemsetD8Async", "cuCtxGetCurrent", "cuCtxSetCurrent")
    return found and found(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names))


def context(device: torch.device) -> int:
    """The CUDA context that torch and Triton use on `device`: the primary one, which lives as long as the process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    library, number, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    if library.cuDeviceGet(ctypes.byref(number), index) or library.cuDevicePrimaryCtxRetain(
        ctypes.byref(found), number
    ):
        raise RuntimeError(f"fastcl: {device} has no CUDA context")
    return found.value or 0


def described(compiled: Any, names: Sequence[str]) -> Kernel | None:
    """The kernel that Triton compiled, whose arguments have these names; None if it needs Triton's launcher."""
    metadata, source = compiled.metadata, compiled.src
    others = any(getattr(metadata, name, 0) for name in _BY_TRITON) or metadata.num_ctas != 1
    if driver() is None or others or metadata.shared > LARGEST_SHARED or not isinstance(compiled.function, int):
        return None
    constants = {key[0] if isinstance(key, tuple) else key for key in source.constants}
    types = []
    for place, name in enumerate(names):
        kind = source.signature.get(name, "constexpr")
        constant = kind == "constexpr" or place in constants or name in constants
        if not (constant or kind[0] == "*" or kind in _FORMATS):
            return None
        types.append(None if constant else kind)
    return Kernel(compiled.function, 32 * metadata.num_warps, metadata.shared, tuple(types))


def bits(kind: str, value: Any) -> int:
    """A parameter as eight bytes, of which the kernel reads the first."""
    packed = struct.pack("Q" if kind[0] == "*" else _FORMATS[kind], value or 0)
    return int.from_bytes(packed, "little")


def launch_of(kernel: Kernel, grid: Sequence[int], values: Sequence[tuple[int, Any]]) -> tuple[Any, ...]:
    """A launch as `Launches` of the native module takes it.

    values: of the arguments: (-1, number), or (index of an address, offset in bytes).
    """
    parameters = [
        (base, bits("*" if base >= 0 else kind, value))
        for kind, (base, value) in zip(kernel.types, values, strict=True)
        if kind is not None
    ]
    return (kernel.function, *grid, kernel.threads, kernel.shared, (*parameters, *_SCRATCH))


def zeros(base: int, offset: int, size: int) -> tuple[Any, ...]:
    """What fills `size` bytes with zeros, as `Launches` takes it."""
    return (0, 0, 0, 0, 0, 0, ((base, offset), (-1, size)))


def series(launches: Sequence[tuple[Any, ...]], device: torch.device) -> Any:
    """An object whose `run(driver(), stream, *addresses)` makes the launches."""
    return native_module().Launches(context(device), list(launches))
