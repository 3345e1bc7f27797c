"""`compile_triton` for Sinkhorn's kernels."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastcl.ops.backends import triton_launch
from fastcl.ops.backends.triton_tiles import Tile
from fastcl.ops.sinkhorn import triton as sinkhorn_triton
from tests.support.compile_triton import ROWS, built

INTEGERS = ("N", "K", "CHUNK", "CHUNKS", "SIZE", "BATCH", "ROW_TERMS", "COLUMN_TERMS")
PASSES = {
    "normalize": (sinkhorn_triton.NORMALIZE, {"GRAD", "W", "LESS", "BY_ROW"}),
    "products": (sinkhorn_triton.PRODUCTS, {"GRAD", "LESS", "MATRIX"}),
    "gradient": (sinkhorn_triton.GRADIENT, {"MASS", "W", "MATRIX"}),
    "column_products": (sinkhorn_triton.COLUMN_PRODUCTS, {"GRAD", "SUM"}),
}


def compiled(job: dict[str, Any]) -> dict[str, Any]:
    """kernel, architecture, dtype, k; `pass` if the kernel has several; `spread`: no stride is known to be 1."""
    name, k = job["kernel"], job["k"]
    which, absent = PASSES[job.get("pass", "normalize")]
    shapes: dict[str, Tile | None] = {
        "sinkhorn_split_kernel": Tile(1, 1024, 0, 0, 4, 1),
        "sinkhorn_whole_rows_kernel": sinkhorn_triton.whole_rows_tile(k, job.get("spread", False), False),
        "sinkhorn_rows_kernel": sinkhorn_triton.part_rows_tile(False),
        "sinkhorn_score_gradient_kernel": sinkhorn_triton.score_gradient_tile(False),
    }
    shape = shapes.get(name) or sinkhorn_triton.columns_tile(False)
    if name == "sinkhorn_score_gradient_kernel":
        absent = set()
    constants = {"PASS": which, "ROWS": shape.block_m, "COLUMNS": shape.block_n, "INTERPRETED": False}
    if not job.get("spread"):
        constants |= {"PER_COLUMN": 1, "GRAD_PER_COLUMN": 1}
    kernel = triton_launch.kernel_named(name)
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in absent:
            signature[argument], constexprs[argument] = "constexpr", constants.get(argument)
        elif argument in INTEGERS or "PER_" in argument:
            signature[argument] = "i32" if argument in INTEGERS else "i64"
        else:
            narrow = argument in ("S", "GRAD", "MATRIX")
            signature[argument] = ROWS[job["dtype"]] if narrow else "*fp64" if argument == "POTENTIAL" else "*fp32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        if k % 16 == 0 and argument in ("K", "PER_ROW", "GRAD_PER_ROW") and argument not in constants:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return built(job, kernel, shape, signature, constexprs, attributes)


if __name__ == "__main__":
    for line in json.loads(sys.argv[1]):
        print(json.dumps(compiled(line)), flush=True)
