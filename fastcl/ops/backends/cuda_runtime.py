"""Backend ``cuda``: whether the kernels of ``csrc/cuda`` are available, and what all calls of them share.

The native module contains the kernels if a driver and nvcc were found when it was built, or if FASTCL_CUDA=1 was set.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from . import native
from .devices import on_device
from .rows import tf32_allowed
from .triton_recorder import STREAM, recorder
from .triton_tape import hooks_active

OLDEST_DEVICE = (8, 0)

# Pairs (architecture, operator) for which `cuda` is the default: a recorded measurement on that architecture shows that
# these kernels are faster than Triton's, and their GPU tests have passed on it. None has been measured yet.
MEASURED_FASTER: frozenset[tuple[int, str]] = frozenset()


def _failed_build() -> Any:
    try:
        return import_module("fastcl._cuda_failure")  # written by setup.py
    except ImportError:
        return None


def kernels() -> Any:
    """The submodule of the native module with the kernels, or None."""
    return getattr(native.native_module(), "cuda", None)


def availability() -> tuple[bool, str]:
    """Whether the backend is available, and a description or the reason. Does not check for a device or driver."""
    module = native.native_module()
    if module is None:
        return False, native.engine()[1]
    if kernels() is None:
        failure = _failed_build()
        return False, f"not built ({failure.REASON})" if failure else "not part of this build of the native module"
    if kernels().emulated:
        return True, f"built for {kernels().targets}"
    if torch.version.cuda is None:
        return False, f"this torch is built without CUDA (the kernels are there: {kernels().targets})"
    return True, f"built with {kernels().targets}"


def report() -> list[str]:
    """The lines that ``python -m fastcl.info`` prints."""
    lines = [availability()[1]]
    if failure := _failed_build():
        lines += [f"  {line}" for line in failure.LOG.splitlines()]
    if kernels() is not None and not kernels().emulated:
        lines.append(f"CUDA {_number(kernels().runtime_version())} inside; {driver_failure() or _driver()}")
    chosen = ", ".join(f"{op} on sm_{number}" for number, op in sorted(MEASURED_FASTER))
    lines.append(f"chosen by default: {chosen or 'nowhere; not yet measured on a GPU'}; elsewhere by name")
    return lines


def _driver() -> str:
    return f"the driver is for CUDA {_number(kernels().driver_version())}"


def _number(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@cache
def driver_failure() -> str:
    """What is wrong with the driver, or that there is no device; empty if all is well."""
    failure: str = kernels().driver_failure()
    return failure


def unsupported_reason(device: torch.device) -> str:
    """Why this backend does not support rows on `device`; empty if it does."""
    if kernels().emulated:
        return "" if device.type == "cpu" else f"is emulated and takes tensors on the CPU, got tensors on {device}"
    if device.type != "cuda":
        failure = driver_failure()
        return f"takes tensors on a CUDA device, got tensors on {device}" + (f" ({failure})" if failure else "")
    if failure := driver_failure():
        return f"cannot run: {failure}"
    if torch.cuda.get_device_capability(device) < OLDEST_DEVICE:
        return "needs a device of compute capability 8.0 or newer, {} has {}.{}".format(
            device, *torch.cuda.get_device_capability(device)
        )
    return ""


def measured_faster(device: torch.device, op: str) -> bool:
    """Whether the backend is the default for this operator on `device`."""
    return (
        device.type == "cuda" and bool(MEASURED_FASTER) and (architecture(device), op) in MEASURED_FASTER
    ) and not unsupported_reason(device)


@cache
def architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(function: str, device: torch.device, *description: Any) -> None:
    """Calls a function of the module that launches kernels on `device` and its current stream."""
    with on_device(device):
        index, stream = where(device)
        _run(function, index, stream, *description)
    if (tape := recorder()) is not None:
        tape.called(partial(_run, function, index), (STREAM, *description))


def _run(function: str, index: int, stream: int, *description: Any) -> None:
    getattr(kernels(), function)((index, stream), *description)


def tape_setting(device: torch.device) -> tuple[tuple[Hashable, ...], int] | None:
    """As `triton_launch.tape_setting`."""
    if hooks_active():
        return None
    with on_device(device):
        return ("cuda", tf32_allowed()), where(device)[1]


def where(device: torch.device) -> tuple[int, int]:
    """(device, stream) in the form that csrc/bindings reads: the device's index and its current stream."""
    if device.type == "cpu":  # emulated
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream
