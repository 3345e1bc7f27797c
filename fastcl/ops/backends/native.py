"""The native module of ``csrc``: whether it is available, and how tensors are described to it.

It receives addresses, sizes and strides, and does not link torch. The package contains it if a compiler was found when
the package was built.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _load() -> tuple[Any, str]:
    try:  # after torch, whose OpenMP runtime it uses
        return import_module("fastcl._native"), ""
    except ImportError as error:
        if error.name == "fastcl._native":  # a folder with the sources was found before an installed package
            return None, f"nothing is built in {Path(__file__).parents[2]}: pip install -e . builds there"
        return None, str(error)


def _load_failure() -> Any:
    try:
        return import_module("fastcl._build_failure")  # written by setup.py
    except ImportError:
        return None


_native, _failure = _load()
_failed_build = _load_failure()
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as in csrc/problem.h


@cache
def engine() -> tuple[str | None, str]:
    """The name of the engine that is used and why it was chosen, or None and why there is no engine.

    The environment variable ``FASTCL_CPU_ISA``, read once, names the newest instruction set that may be used:
    ``baseline``, ``avx2``, ``avx512`` or ``avx512_bf16`` on x86-64, ``neon`` on ARM.
    """
    if _native is None:
        return None, build_failure() or f"the native module does not load ({_failure})"
    name, reason = _native.choose_engine(os.environ.get("FASTCL_CPU_ISA", ""))
    wrong = name is None and _native.built_engines()
    return name, f"FASTCL_CPU_ISA: {reason}" if wrong else reason


def build_failure() -> str:
    """Why the build of the native module failed; empty if it succeeded or was not tried."""
    return f"not built ({_failed_build.REASON})" if _failed_build else ""


def build_log() -> str:
    """The end of the output of the compiler or CMake when the native module failed to build."""
    log: str = _failed_build.LOG if _failed_build else ""
    return log


def wrong_cap() -> str:
    """What is wrong with FASTCL_CPU_ISA; empty if nothing is, or if no engine was built."""
    name, reason = engine()
    return reason if name is None and _native is not None and _native.built_engines() else ""


def native_module() -> Any:
    """The module of ``csrc``, or None."""
    return _native


# Work of one thread. A smaller call takes a single one: where other programs keep the cores busy, threads wait at each
# barrier until the system runs them all.
PRODUCTS = 1 << 21  # multiplications of the similarities; gradients add more
SCORES = 1 << 15  # scores that Sinkhorn or a cross-entropy against prototypes reads


def threads(work: int, of_one: int, twice: bool = False) -> int:
    """How many threads a call takes: as many as have ``of_one`` of its work each, one at least, at most torch's.

    twice: the call also computes gradients, which are at least as much work again.
    """
    return max(1, min(torch.get_num_threads(), work * (1 + twice) // of_one))


# Descriptions of calls: the numbers in the order in which csrc/bindings reads them.


def address(tensor: Tensor | None, offset: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


def describe_rows(rows: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if rows is None else (DTYPES[rows.dtype], rows.data_ptr(), rows.shape[0], *rows.stride())


# Workspace up to this many bytes stays with its thread: for a small call fresh memory would take longer than many sums.
KEPT_WORKSPACE = 1 << 21
# Of larger ones up to this many bytes the process keeps one. The system maps the pages of a new one at each call: for
# few anchors and a queue of 65,536 rows that takes as long as the products.
SPARE_WORKSPACE = 1 << 27


class _Workspace(threading.local):
    room: Tensor | None = None
    size = address = 0


_workspace = _Workspace()
_spare: list[Tensor] = []  # at most one; a call that runs has taken it


def run(call: Any) -> None:
    size = call.workspace
    if size > KEPT_WORKSPACE:
        workspace = _large(size)  # a variable keeps it alive until the end
        call.run(workspace.data_ptr())
        if len(workspace) <= SPARE_WORKSPACE:
            _spare[:] = [workspace]
        return
    if size > _workspace.size:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        _workspace.room, _workspace.size, _workspace.address = room, size, room.data_ptr()
    call.run(_workspace.address)


def _large(size: int) -> Tensor:
    if size <= SPARE_WORKSPACE:
        try:
            found = _spare.pop()
        except IndexError:  # none yet, or another thread has it
            pass
        else:
            if len(found) >= size:
                return found
    return torch.empty(size, dtype=torch.uint8, device="cpu")
