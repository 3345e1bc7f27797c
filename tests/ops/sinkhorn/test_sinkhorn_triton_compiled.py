"""Sinkhorn's Triton kernels compile without spills for each architecture; no GPU is needed.

By default a few variants; ``FASTCL_COMPILE_ALL=1`` compiles all of them, ``FASTCL_COMPILE_SHARD=K/N`` a part.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcl.ops.backends.triton_tiles import ARCHITECTURES
from fastcl.ops.sinkhorn import triton as sinkhorn_triton
from tests.support.compiling import chosen, environment

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = 99 * 1024  # bytes of shared memory that a block can have on any chip of these families

WHOLE, ROWS, COLUMNS = (f"sinkhorn_{name}_kernel" for name in ("whole_rows", "rows", "columns"))
THREE = ("normalize", "products", "gradient")
ALL: list[dict[str, Any]] = [
    *({"kernel": WHOLE, "k": k, "pass": p} for k in (1, 100, 300, 1000, 2048, 3000, 4096, 8191, 8192) for p in THREE),
    *({"kernel": WHOLE, "k": k, "pass": p, "spread": True} for k in (100, 1000, 2001, 2048) for p in THREE),
    *({"kernel": ROWS, "k": 10**5, "pass": p} for p in (*THREE, "column_products")),
    *({"kernel": COLUMNS, "k": 10**5, "pass": p} for p in THREE),
    *({"kernel": kernel, "k": 99_999, "pass": "gradient", "spread": True} for kernel in (ROWS, COLUMNS)),
    *({"kernel": f"sinkhorn_{name}_kernel", "k": 3000} for name in ("split", "column_sums", "score_gradient")),
    *({"kernel": f"sinkhorn_{name}_kernel", "k": 2999, "spread": True} for name in ("column_sums", "score_gradient")),
]
SOME: list[dict[str, Any]] = [
    {"kernel": WHOLE, "k": 8192, "pass": "products"},
    {"kernel": WHOLE, "k": 2001, "pass": "gradient", "spread": True},
    {"kernel": ROWS, "k": 10**5, "pass": "normalize"},
    {"kernel": COLUMNS, "k": 10**5, "pass": "gradient"},
    *({"kernel": f"sinkhorn_{name}_kernel", "k": 3000} for name in ("split", "column_sums", "score_gradient")),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, tmp_path) -> None:
    of_device = {"architecture": architecture}
    some = [job | of_device | {"dtype": "float32" if architecture == 90 else "bfloat16"} for job in SOME]
    all_ = [job | of_device | {"dtype": dtype} for job in ALL for dtype in ("float32", "bfloat16", "float16")]
    jobs = chosen(some, all_)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, root / "tests" / "support" / "compile_sinkhorn.py", json.dumps(jobs)],
        env=environment(root, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(jobs)
    for result in results:
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED, result
        assert result["multiply_adds"] == 0, (
            result
        )  # a multiply-add would round S + potential differently in different places


def test_tiles_hold_the_columns() -> None:
    for k in range(1, 10_000):
        for spread in (False, True):
            tile = sinkhorn_triton.whole_rows_tile(k, spread, False)
            if k > (sinkhorn_triton.WHOLE_SPREAD if spread else sinkhorn_triton.WHOLE):
                assert tile is None
                continue
            assert tile is not None
            assert tile.block_n >= k
            assert tile.block_n & (tile.block_n - 1) == tile.block_m & (tile.block_m - 1) == 0
            assert tile.block_m <= sinkhorn_triton.LEAST_CHUNK
