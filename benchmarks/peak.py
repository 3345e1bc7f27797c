"""The machine's peak in floating-point operations a second, measured in the run whose times it is compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import percentiles, timer_for

SOURCE = Path(__file__).with_name("peak.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")
WINDOWS, WINDOW_SECONDS = 20, 0.05
_DTYPES = (torch.float32, torch.bfloat16)
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Peak:
    flops_per_second: float
    source: str


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
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        run = {"check": True, "capture_output": True, "text": True, "timeout": 120}
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(program)], **run)  # type: ignore[call-overload]
        arguments = [str(program), str(threads), str(WINDOWS), str(WINDOW_SECONDS)]
        printed: str = subprocess.run(arguments, **run).stdout  # type: ignore[call-overload]
    lines = [line.split("\t") for line in printed.splitlines()]
    peaks = {dtype: Peak(float(speed), f"{name} in C, {threads} threads") for dtype, speed, name in lines}
    # Where the dot product of bfloat16 is the slower instruction, as on some Xeons, widened rows have the higher peak.
    return {k: p for k, p in peaks.items() if p.flops_per_second >= peaks["float32"].flops_per_second}


def _matrix_product(device: torch.device, dtype: torch.dtype) -> Peak:
    timer, best, at = timer_for(device), 0.0, 0
    for size in MATRIX_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return a @ b

        product()
        speed = 2 * size**3 / percentiles([timer(product, 3) / 3 for _ in range(5)])[0]
        if speed > best:
            best, at = speed, size
    return Peak(best, f"torch's best matrix product, {at} x {at}")
