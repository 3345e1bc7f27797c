"""Compiles Triton kernels ahead of time for a GPU that need not exist: ``python compile_triton.py JOBS``, as JSON.

Without JOBS it reads a job from each line of its input. It is a separate process, as the environment must disable the
interpreter before Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcl.ops.backends import triton_launch, triton_tiles
from fastcl.ops.pairs import triton as pairs_triton
from fastcl.ops.prototypes import triton as prototypes_triton
from fastcl.ops.soft import triton as soft_triton
from fastcl.ops.topk import triton as topk_triton

OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < triton_tiles.OLD
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "START": "*i32", "END": "*i32", "ROW_NAMES": "*i32", "COLUMN_NAMES": "*i32", "ORDER": "*i64", "ONE": "*i32",
    "N": "i32", "M": "i32", "WIDTH": "i32",
    "VALUES": "*i64", "SORTED": "*i64", "LABELS": "*i32", "NUMBERS": "*i32",
    "KNOWN": "*i64", "SIZE": "i32", **{f"{side}_{of}STRIDE": "i32" for side in "XY" for of in ("", "COLUMN_")},
    "OTHER_NUMBERS": "*i32", "SOURCE_NAMES": "*i32",
    "STEPS": "i32", "ROW_STRIDE": "i32", "PAIRS": "i32", "COUNT": "i32", "OTHER_COUNT": "i32",
    **{f"{side}_{name}": "*i32" for side in ("ROW", "COLUMN") for name in ("CLUSTERS", "IDS", "SAMPLES")},
    "ROW_TAGS": "*i64", "COLUMN_TAGS": "*i64", "WORDS": "i32",
    "SCALES": "*fp64", "POSITIONS": "i32", "STUDENT_ROW": "i32", "FIRST_ROW": "i32", "SECOND_ROW": "i32",
    "GROUPS": "i32", "HELD": "i32", "PROGRAMS": "i32",
    "BEST": "*i64", "SPAN": "i32", "K": "i32", "POS_MARGIN": "fp32", "NEG_MARGIN": "fp32",
}  # fmt: skip
FLAGS = ("SAME", "SIDES", "ADD", "TWO_SIDES", "CHECKED", "NORMALIZED")  # small numbers at run time
ROWS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
KERNELS = {
    "forward": "statistics_kernel",
    "triangle": "triangle_kernel",
    "remainder": "remainder_kernel",
    "triangle_total": "triangle_total_kernel",
    "running": "running_kernel",
    "two_way": "two_way_kernel",
    "weighted": "weighted_kernel",
    "backward": "gradient_kernel",
    "observation": "observation_kernel",
    "labels": "labels_kernel",
    "rows": "rows_kernel",
    "fields": "fields_kernel",
    "weights": "weights_kernel",
    "side": "side_kernel",
    "finish": "finish_kernel",
    "join": "join_kernel",
    "first": "first_kernel",
    "order": "order_kernel",
    "longest": "longest_kernel",
    "total": "total_kernel",
    "scale": "scale_kernel",
    "mean": "mean_kernel",
    "scaled": "scaled_kernel",
    "positive": "positive_kernel",
    "positive_gradient": "positive_gradient_kernel",
    "topk": "topk_kernel",
    "soft_forward": "soft_statistics_kernel",
    "soft_backward": "soft_gradient_kernel",
    "pairs": "pair_kernel",
    "ruled_forward": "ruled_statistics_kernel",
    "ruled_backward": "ruled_gradient_kernel",
    "ruled_observation": "ruled_observation_kernel",
    "prototype_forward": "prototype_forward_kernel",
    "prototype_backward": "prototype_backward_kernel",
}
WHOLE_ROWS = ("finish", "join", "positive", "positive_gradient")
SCORES = ("STUDENT", "FIRST", "SECOND", "GRADIENT")  # of the kernels of prototypes
PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def compiled(job: dict[str, Any]) -> dict[str, Any]:
    """kind, architecture, dtype, d, precision; `flags`: constants of the kernel; `absent`: arguments that are None."""
    dtype, d, careful = getattr(torch, job["dtype"]), job["d"], job.get("careful", False)
    if "tile" in job:
        shape = triton_tiles.Tile(*job["tile"])
    elif job["kind"] == "rows":
        shape = triton_tiles.arranging_tile(job["architecture"], dtype, d)
    elif job["kind"] in WHOLE_ROWS:
        shape = triton_tiles.row_tile(d)
    elif job["kind"] == "topk":
        shape = topk_triton.shape(job["architecture"], dtype, d, job["flags"]["SLOTS"])
    elif job["kind"].startswith("soft_"):
        shape = soft_triton.tile_for(job["kind"], job["architecture"], dtype, d, job["precision"] == "tf32")
    elif job["kind"] == "pairs":
        distances, weighted = job["flags"]["KIND"] >= 2, "GRADIENT" not in job["absent"]
        tf32 = job["precision"] == "tf32"
        shape = pairs_triton.tile_for(distances, weighted, job["architecture"], dtype, d, tf32)
    elif job["kind"].startswith("prototype_"):
        shape = prototypes_triton.tile_for(d, False)
    elif job["kind"] not in (*triton_tiles.KINDS, *triton_tiles.RULED, "observation"):
        shape = triton_tiles.ROWS_AT_ONCE
    else:
        kind = "ruled_observation" if job["kind"] == "observation" else job["kind"]
        tf32, split = job["precision"] == "tf32", job["precision"] == "tf32x3"
        shape = triton_tiles.tile(kind, job["architecture"], dtype, d, careful, tf32, split=split, old=OLD)
        if job["kind"] == "backward":
            given = {"OWN": True, "OTHERS": True, "ONE_EXPONENTIAL": 1, "GRADIENT": 0, "SIMILARITY_SUMS": 0, "SUMS": 0}
            given |= job.get("flags", {}) | dict.fromkeys(job.get("absent", ()))
            version = tuple(int(part) for part in triton.__version__.split(".")[:2])
            shape = triton_tiles.for_variant(shape, given, version)
    constants = {
        "D": d, "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_K": shape.block_k, "BLOCK_D": shape.block_d,
        "SELF": False, "CLUSTERS": True, "IDS": careful, "NORMED": True, "BIAS": int(careful), "MIXED_ONLY": False,
        "APART": True, "OWN": True, "OTHERS": True, "ONE_EXPONENTIAL": 1, "SOME": False, "SPLIT": False,
        "PRECISION": job.get("precision", "ieee"), "INTERPRETED": False, "BLOCK": shape.block_m, "ALL": 0, "POS": 1,
        "NEG": 2, "SUM": 3, "LOG_SUMS": 3, "NORMALIZE": True, "SCALED": True, "LEAVE_OUT": careful,
        "FLOOR": 1e-12, "LARGEST_INVERSE": 1e12, "AHEAD": shape.stages == 1,
        "RATIO": True, "HALF": True, "CLOSE": 16.0, "COLUMN_STRIDE": 1,
        "COLUMNS": shape.block_n, "STUDENT_COLUMN": 1, "FIRST_COLUMN": 1, "SECOND_COLUMN": 1,
        "CLASSES": 512, "BLOCK_C": soft_triton.assignment_width(getattr(torch, job.get("assignments", "float32"))),
        "GUIDE": 512, "BLOCK_G": triton_tiles.guide_width(getattr(torch, job.get("guide", "float32"))),
        "GUIDE_PRECISION": "ieee" if "guide" in job or job["architecture"] < 90 else "tf32x3",
        "ASSIGNMENT_PRECISION": job.get("precision", "ieee") if "assignments" not in job else "ieee",
    } | job.get("flags", {})  # fmt: skip
    absent = set(job.get("absent", ()))
    if not careful:
        absent |= {"ROW_BIAS", "COLUMN_BIAS", "ROW_NAMES", "COLUMN_NAMES", "LONGEST", "LARGEST_BIAS"}
    kernel = triton_launch.kernel_named(KERNELS[job["kind"]])
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
            continue
        of_rows = name in ("X", "Y", "OUT", "SOURCE", "ROWS", *(SCORES if job["kind"].startswith("prototype_") else ()))
        of_assignments = name in ("R", "Q") and "assignments" in job
        of_guide = name in ("ROW_GUIDE", "COLUMN_GUIDE") and "guide" in job
        dtype_of = job["dtype"] if of_rows else job["assignments"] if of_assignments else None
        if of_guide:
            dtype_of = job["guide"]
        known = "i32" if name in FLAGS else POINTERS.get(name, "*fp32")
        signature[name] = known if dtype_of is None else ROWS[dtype_of]
        if name not in (
            "N",
            "M",
            "WORDS",
            "SPAN",
            "K",
            "POS_MARGIN",
            "NEG_MARGIN",
            "GROUPS",
            "HELD",
            "PROGRAMS",
            *FLAGS,
        ) and not (
            name == "WIDTH" and "PARTIAL_SUMS" in kernel.arg_names
        ):  # as at run time: torch's memory is aligned to 16 bytes
            attributes[(place,)] = [["tt.divisibility", 16]]
    return built(job, kernel, shape, signature, constexprs, attributes)


def source(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], attributes: dict[tuple[int, ...], Any]
) -> ASTSource:
    """signature: the type of each argument, "constexpr" for constants and None. attributes: by the argument's place."""
    if not hasattr(compiler, "AttrsDescriptor"):
        return ASTSource(kernel, signature, constexprs, attributes)
    # Triton 3.2 has a class for attributes, and a signature without the arguments that are declared constant.
    aligned = [place for (place,) in attributes]
    properties = {"tt.divisibility": aligned, "tt.equal_to": []}
    described = compiler.AttrsDescriptor.from_dict({"arg_properties": properties, "cls": "AttrsDescriptor"})
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    types = {name: "*i8" if kind == "constexpr" else kind for name, kind in signature.items() if name not in declared}
    return ASTSource(kernel, types, constexprs, described)


def built(
    job: dict[str, Any],
    kernel: Any,
    shape: triton_tiles.Tile,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    attributes: dict[tuple[int, ...], Any],
) -> dict[str, Any]:
    """The job and its outcome."""
    result = triton.compile(
        source(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", job["architecture"], 32),
        options=shape.options | {"enable_fp_fusion": False},
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return job | {
        "tile": tuple(shape),
        "registers": found["reg"],
        "stack": found["stack"],
        "local": found["local"],
        "shared": result.metadata.shared,
        "products": [name for name in PRODUCTS if name in result.asm["ptx"]],
        "multiply_adds": result.asm["ptx"].count("fma.rn.f32")
        + result.asm["ptx"].count("fma.rn.f32x2"),  # each counts two
        "fusible": len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32", result.asm["ptx"])),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for line in json.loads(sys.argv[1]):
            print(json.dumps(compiled(line)), flush=True)
    else:
        for text in sys.stdin:
            try:
                outcome = compiled(json.loads(text))
            except Exception:
                outcome = {"error": text + traceback.format_exc()[-2000:]}
            print(json.dumps(outcome), flush=True)
