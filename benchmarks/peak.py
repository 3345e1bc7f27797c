"""The machine's peak in floating-point operations a second, measured in the run whose times it is compared with.

A machine that is shared, or warm, is not as fast in one minute as in the next: so the peak is a step like those of the
providers, and takes its turn among them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import percentiles, timer_for

SOURCE = Path(__file__).with_name("peak.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC")
WINDOWS, STEP_SECONDS = 20, 0.02
_DTYPES = (torch.float32, torch.bfloat16)
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Peak:
    flops_per_second: float  # the best of some tries at the start
    source: str
    step: Callable[[], object] | None = None  # to be timed
    flops: float = 0.0  # of a step


def measure(device: torch.device, threads: int) -> dict[str, Peak]:
    """By the name of the rows' dtype. A dtype that is missing has the peak of float32 to be compared with."""
    if device.type == "cpu":
        compiler = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name
                         and (path := shutil.which(name))), None)  # fmt: skip
        if compiler:
            try:
                return _compiled(compiler, threads)
            except (OSError, subprocess.SubprocessError):
                pass  # a compiler without this machine's headers or flags; the rows name the source of their peak
    return {str(dtype).removeprefix("torch."): _matrix_product(device, dtype) for dtype in _DTYPES}


def _compiled(compiler: str, threads: int) -> dict[str, Peak]:
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file is no longer needed
        built = Path(folder) / "peak.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        library = ctypes.CDLL(str(built))
    library.peak_work.restype = ctypes.c_double
    library.peak_work.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long)
    library.peak_name.restype = ctypes.c_char_p
    timer, peaks = timer_for(torch.device("cpu")), {}
    for bf16, dtype in enumerate(("float32", "bfloat16")):
        name = library.peak_name(bf16).decode()
        if not name:
            continue
        work = partial(library.peak_work, threads, bf16)
        repeats, seconds = 1, 0.0
        while seconds < STEP_SECONDS:
            repeats *= 2
            seconds = timer(partial(work, repeats), 1)
        step = partial(work, repeats)
        flops: float = step()
        best = flops / min(timer(step, 1) for _ in range(WINDOWS))
        peaks[dtype] = Peak(best, f"{name} in C, {threads} threads", step, flops)
    # Where the dot product of bfloat16 is the slower instruction, as on some Xeons, widened rows have the higher peak.
    return {k: p for k, p in peaks.items() if p.flops_per_second >= peaks["float32"].flops_per_second}


def _matrix_product(device: torch.device, dtype: torch.dtype) -> Peak:
    timer, best, at = timer_for(device), 0.0, 0
    step: Callable[[], object] | None = None
    for size in MATRIX_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return a @ b

        product()
        speed = 2 * size**3 / percentiles([timer(product, 3) / 3 for _ in range(5)])[0]
        if speed > best:
            best, at, step = speed, size, product
    return Peak(best, f"torch's best matrix product, {at} x {at}", step, 2.0 * at**3)
