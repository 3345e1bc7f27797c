"""Whether Triton is available, and how its kernels are launched. The first launch imports Triton."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module, metadata, util
from typing import Any

import torch

from . import triton_interpreter, triton_tuning
from .devices import on_device as on_device
from .rows import tf32_allowed
from .triton_cached import KNOWN, CachedLauncher, launched_by_triton
from .triton_recorder import recorder, unrecorded
from .triton_tape import hooks_active
from .triton_tiles import OLD, Tile

FLOOR = (3, 2)  # the version that torch 2.6 includes
OLDEST_DEVICE = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")

PROGRAMS_INTERPRETED = 2


def triton_version() -> str:
    """The installed version of Triton; PyTorch's own builds are packages with other names."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        packages = metadata.packages_distributions().get("triton", [])
        return metadata.version(packages[0]) if packages else "0.0 (without metadata)"


@cache
def version() -> tuple[int, int]:
    """The first two numbers of Triton's version."""
    major, minor = triton_version().split(".")[:2]
    return int(major), int(minor)


@cache
def is_old() -> bool:
    """Whether Triton takes the tiles of old versions."""
    return version() < OLD


@cache
def availability() -> tuple[bool, str]:
    """Whether the backend is available, and a description or the reason."""
    if util.find_spec("triton") is None:
        return False, "Triton is not installed"
    version = triton_version()
    floor = ".".join(map(str, FLOOR))
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return False, f"Triton {version} is older than {floor}"
    if INTERPRETED:
        return True, f"Triton {version} (at least {floor}), interpreted on the CPU: TRITON_INTERPRET is set"
    if torch.version.cuda is None:
        return False, "this torch is built without CUDA, and TRITON_INTERPRET is not set"
    return True, f"Triton {version} (at least {floor})"


def unsupported_reason(device: torch.device) -> str:
    """Why this backend does not support rows on `device`; empty if it does."""
    if INTERPRETED:
        return "" if device.type == "cpu" else f"is interpreted and takes tensors on the CPU, got tensors on {device}"
    if device.type != "cuda":
        return f"takes tensors on a CUDA device, got tensors on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_DEVICE:
        return "needs a device of compute capability 8.0 or newer, {} has {}.{}".format(
            device, *torch.cuda.get_device_capability(device)
        )
    return ""


MODULES = {
    "statistics_kernel": "contrastive.triton.statistics_kernels",
    "two_way_kernel": "contrastive.triton.statistics_kernels",
    "running_kernel": "contrastive.triton.statistics_kernels",
    "weighted_kernel": "contrastive.triton.statistics_kernels",
    "join_kernel": "contrastive.triton.statistics_kernels",
    "triangle_kernel": "contrastive.triton.triangle_kernels",
    "remainder_kernel": "contrastive.triton.triangle_kernels",
    "triangle_total_kernel": "contrastive.triton.triangle_kernels",
    "gradient_kernel": "contrastive.triton.gradient_kernels",
    "observation_kernel": "contrastive.triton.observation_kernels",
    "ruled_statistics_kernel": "contrastive.triton.ruled_kernels",
    "ruled_gradient_kernel": "contrastive.triton.ruled_kernels",
    "ruled_observation_kernel": "contrastive.triton.ruled_kernels",
    "mean_kernel": "contrastive.triton.mean_kernels",
    "scaled_kernel": "contrastive.triton.mean_kernels",
    "longest_kernel": "contrastive.triton.joining_kernels",
    "total_kernel": "contrastive.triton.joining_kernels",
    "scale_kernel": "contrastive.triton.joining_kernels",
    "positive_kernel": "contrastive.triton.positive_kernels",
    "positive_gradient_kernel": "contrastive.triton.positive_kernels",
    "first_kernel": "contrastive.triton.order_kernels",
    "order_kernel": "contrastive.triton.order_kernels",
    "topk_kernel": "topk.triton_kernels",
    "soft_statistics_kernel": "soft.triton_kernels",
    "soft_gradient_kernel": "soft.triton_kernels",
    "pair_kernel": "pairs.triton_kernels",
    "prototype_forward_kernel": "prototypes.triton_kernels",
    "prototype_backward_kernel": "prototypes.triton_kernels",
}
PER_ROW = "contrastive.triton.per_row_kernels"  # the module of all other kernels


@cache
def kernel_named(name: str) -> Any:
    module = "sinkhorn.triton_kernels" if name.startswith("sinkhorn_") else MODULES.get(name, PER_ROW)
    return getattr(import_module(f"fastcl.ops.{module}"), name)


@cache
def _launcher(name: str) -> CachedLauncher | None:
    """The short way to launch a kernel; None in the interpreter, and for versions of Triton for which it is unknown."""
    if INTERPRETED or version() not in KNOWN:
        return None
    return CachedLauncher(kernel_named(name), version())


def launch(name: str, shape: Tile, grid: Sequence[int], given: dict[str, Any]) -> None:
    """Launches a kernel with those of the `given` values that it takes, by name."""
    launcher = _launcher(name)
    if launcher is not None:
        launcher.launch(shape, grid, given)
        return
    with unrecorded(), _interpreting():
        launched_by_triton(kernel_named(name), shape, grid, given)
    if (tape := recorder()) is not None:
        tape.launched(partial(_relaunch, name, shape, grid, tuple(given)), list(given.values()), True)


def _relaunch(name: str, shape: Tile, grid: Sequence[int], names: Sequence[str], *values: Any) -> None:
    launch(name, shape, grid, dict(zip(names, values, strict=True)))


def tape_setting(device: torch.device) -> tuple[tuple[Hashable, ...], int] | None:
    """What launches on `device` depend on besides their arguments, and its current stream; None: no tape may be used.

    A tape calls none of a profiler's hooks, and its outputs are not what a checkpoint expects.
    """
    launcher = _launcher("rows_kernel")
    if (launcher is not None and launcher.watched()) or hooks_active():
        return None
    with on_device(device):
        return ("triton", tf32_allowed(), triton_tuning.mode()), 0 if launcher is None else launcher.stream()


@contextmanager
def _interpreting() -> Iterator[None]:
    """The interpreter replaces parts of Triton while it runs a kernel, so only one kernel may run at a time."""
    if not INTERPRETED:
        yield
        return
    with _interpreter, triton_interpreter.kernels_run():
        yield


_interpreter = threading.Lock()


@cache
def architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def programs(device: torch.device) -> int:
    """Number of programs of a kernel whose programs each process several row blocks."""
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def precision_of(dtype: torch.dtype) -> str:
    """The `input_precision` for products of rows."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def fast_precision_of(dtype: torch.dtype, architecture: int, masked: bool) -> str:
    """The same, with three products in tf32 in place of float32's, which tensor cores do not have.

    masked: whether kernels mask every tile, by rules, ids or biases. With three products they would spill on sm_80.
    Between sm_80 and sm_90 tensor cores multiply tf32 no faster than the other units multiply float32.
    """
    precision = precision_of(dtype)
    fast = architecture >= 90 or (architecture == 80 and not masked)
    return "tf32x3" if dtype == torch.float32 and precision == "ieee" and fast else precision
