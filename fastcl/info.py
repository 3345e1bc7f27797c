"""``python -m fastcl.info``: available backends, the one that will be used, and why any is missing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from . import __version__
from .checks import ROW_DTYPES
from .command import Parser, run
from .ops.backends import cuda_runtime, native, triton_launch
from .ops.backends.choose import (
    AVAILABLE,
    FAMILIES,
    FLOAT64,
    MISSING,
    MOST_NEIGHBOURS,
    REPLACEMENTS,
    SECOND_SWEEP,
    choose_backend,
    computes,
    for_neighbours,
)
from .ops.backends.rows import accumulation_dtype

_PROG = "python -m fastcl.info"
_EXAMPLES = """\
  python -m fastcl.info                             this machine, and which backend each operation takes
  FASTCL_BACKEND=chunked python -m fastcl.info      the same, with a backend fixed by name
  FASTCL_CPU_ISA=avx2 python -m fastcl.info         the same, with an older processor's instructions
  python -m fastcl.info --json                      the same for a program: one object in JSON"""

_PURPOSE = {
    "reference": "the specification in code; materialises every logit; by name only",
    "chunked": "plain PyTorch in blocks of rows; any device",
    "cpu": "C++ SIMD, on x86-64 and 64-bit ARM; not yet run on an ARM machine",
    "triton": "Triton kernels, on GPUs; float64 rows go through chunked; not yet measured on a GPU",
    "cuda": "CUDA C++ kernels, on NVIDIA GPUs; by name only: not yet measured on a GPU",
}


def report() -> str:
    """The text that ``python -m fastcl.info`` prints."""
    lines = [
        f"fastcl {__version__}",
        f"  Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch {torch.__version__}, {torch.get_num_threads()} threads, {_instruction_set()}",
        f"  triton {_version('triton') or 'not installed'}",
        *_devices(),
        "",
        "Backends",
        *(f"  {name:<10} available    {_PURPOSE[name]}" for name in AVAILABLE),
        *(f"  {name:<10} missing      {reason}" for name, reason in MISSING.items()),
        "",
        *_native(),
        "",
        "Triton",
        f"  {triton_launch.availability()[1]}",
        "",
        "CUDA C++",
        *(f"  {line}" for line in cuda_runtime.report()),
        "",
        f"Will be used ({_reason()})",
    ]
    try:
        lines += [f"  {what:<18} {device:<5} {dtype:<9} {chosen}" for what, device, dtype, chosen in _choices()]
    except ValueError as error:
        lines.append(f"  nothing: {error}")
    return "\n".join(lines)


def facts() -> dict[str, Any]:
    """What ``python -m fastcl.info --json`` prints: the facts of `report`, for programs."""
    found: dict[str, Any] = {
        "fastcl": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "torch": str(torch.__version__),  # a class of torch's own
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(_cuda_devices())],
        "backends": {name: {"available": True, "reason": _PURPOSE[name]} for name in AVAILABLE}
        | {name: {"available": False, "reason": reason} for name, reason in MISSING.items()},
        "native": None,
        "cuda_kernels": getattr(cuda_runtime.kernels(), "targets", None),
        "asked_for": os.environ.get("FASTCL_BACKEND") or None,
        "choices": [],
        "error": None,
    }
    module = native.native_module()
    engine, reason = native.engine()
    if module is not None:
        found["native"] = {
            "fastcl": module.version,
            "compiler": module.compiler,
            "built": list(module.built_engines()),
            "supported": list(module.supported_engines()),
        }
    found["engine"] = {"name": engine, "reason": reason}
    try:
        names = ("operation", "device", "dtype", "backend")
        found["choices"] = [dict(zip(names, choice, strict=True)) for choice in _choices()]
    except ValueError as error:
        found["error"] = str(error)
    return found


def _native() -> list[str]:
    """The native module's compiler, the instruction sets that this machine supports, and the one that is used."""
    module = native.native_module()
    name, reason = native.engine()
    if module is None:
        return ["Native module", f"  none: {reason}", *(f"    {line}" for line in native.build_log().splitlines())]
    return [
        "Native module",
        f"  built with {module.compiler}, for fastcl {module.version}",
        f"  instruction sets: built {', '.join(module.built_engines()) or 'none'}; "
        f"this machine runs {', '.join(module.supported_engines()) or 'none'}",
        f"  used: {name} ({reason})" if name else f"  used: none ({reason})",
    ]


def _choices() -> list[tuple[str, str, str, str]]:
    """For each operation, kind of device and dtype of the rows, the backend."""
    devices = ("cpu", "cuda") if _cuda_devices() else ("cpu",)
    families = {
        "contrastive_stats": "contrastive_stats",
        "return_stats": "contrastive_stats",
        "soft assignments": "soft_assignments",
        "pair sums": "pair_sums",
        "pair distances": "pair_distances",
        "sinkhorn": "sinkhorn",
        "topk_similarity": "topk",
    }
    found, errors = [], []
    for what, family in families.items():
        for device in devices:
            for dtype in ROW_DTYPES:
                sums = accumulation_dtype(torch.empty(0, dtype=dtype))
                try:
                    chosen = choose_backend(torch.device(device), sums, family)
                except ValueError as error:
                    errors.append(error)
                    chosen = f"nothing: {error}"
                if what == "return_stats" and chosen in SECOND_SWEEP:
                    chosen += f", and a second sweep by {SECOND_SWEEP[chosen]}"
                found.append((what, device, str(dtype)[6:], chosen))
    if len(errors) == len(found):
        raise errors[0]
    return found


def families_table() -> str:
    """The table of docs/internals.md: what each backend computes itself, and what another one computes for it."""
    others = [name for name in FLOAT64 if name not in REPLACEMENTS]
    columns = [*REPLACEMENTS][::-1]

    def cell(name: str, family: str) -> str:
        if not computes(name, torch.float32, family):
            replaced = " or ".join(f"`{other}`" for other in REPLACEMENTS[name])
            return f"by default {replaced}; if `{name}` is named, an error"
        wide = next(other for other in REPLACEMENTS[name] if computes(other, torch.float64, family))
        many = for_neighbours(name, MOST_NEIGHBOURS + 1) if family == "topk" else name
        limit = f"k > {MOST_NEIGHBOURS} or " if many == wide else ""
        return f"own kernels; {limit}float64: `{wide}`"

    rows = [
        [text, "own code, all dtypes", *(cell(name, family) for name in columns)] for family, text in FAMILIES.items()
    ]
    sweeps = ["own kernel" if SECOND_SWEEP[name] == name else f"`{SECOND_SWEEP[name]}`" for name in columns]
    seen = [
        "statistics for `return_stats`",
        "own code, the same sweep",
        *(f"{sweep}, a second sweep" for sweep in sweeps),
    ]
    rows.insert(1, seen)
    head = ["family", ", ".join(f"`{name}`" for name in others), *(f"`{name}`" for name in columns)]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join((lines[0], "|" + "---|" * len(head), *lines[1:]))


def _reason() -> str:
    variable = os.environ.get("FASTCL_BACKEND")
    return f"FASTCL_BACKEND={variable}" if variable else "the fastest available; FASTCL_BACKEND or use_backend fixes it"


def _instruction_set() -> str:
    capability: str = torch.backends.cpu.get_cpu_capability()
    return f"instruction set {capability}"


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _devices() -> list[str]:
    if _cuda_devices():
        return [f"  cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(_cuda_devices())]
    if torch.version.cuda is None:
        return ["  no CUDA device: this torch is built without CUDA"]
    return [f"  no CUDA device: torch is built for CUDA {torch.version.cuda}, but finds no driver or device"]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, exits with 2 on an unknown option."""
    parser = Parser(_PROG, str(__doc__), _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one object in JSON, for programs")
    print(json.dumps(facts(), indent=2) if parser.parse_args(argv).json else report())
    return 0


if __name__ == "__main__":
    run(_PROG, main)
