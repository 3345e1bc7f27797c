"""The machine's peak in floating-point operations per second, measured in the same run as the providers.

The speed of a shared or hot machine changes from minute to minute, so the peak is timed like a provider and takes turns
with them.
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
    flops_per_second: float  # best of several measurements at the start
    source: str
    step: Callable[[], object] | None = None  # the step that takes turns with the providers
    flops: float = 0.0  # operations of a step


def measure(device: torch.device, threads: int) -> dict[str, Peak]:
    """Peaks by name of the rows' dtype. For a dtype that is missing use the peak of float32."""
    if device.type == "cpu":
        compiler = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name
                         and (path := shutil.which(name))), None)  # fmt: skip
        if compiler:
            try:
                return _compiled(compiler, threads)
            except (OSError, subprocess.SubprocessError):
                pass  # the compiler lacks headers or flags; the rows record the source of their peak
    return {str(dtype).removeprefix("torch."): _matrix_product(device, dtype) for dtype in _DTYPES}


def _compiled(compiler: str, threads: int) -> dict[str, Peak]:
    with tempfile.TemporaryDirectory() as folder:  # the file is not needed after loading
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
    # If the bfloat16 dot product is slower than FMA, as on some Xeons, rows converted to float32 have the higher peak.
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
