"""Every entry of the Triton kernels' table of tiles compiles for its architecture: no spills, within shared memory,
with the tensor cores' instructions. No GPU is needed.

By default a few entries; ``FASTCL_COMPILE_ALL=1`` compiles the whole table (about half an hour on two cores).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcl.kernels.triton_plan import ARCHITECTURES, KINDS, WHOLE, padded

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Bytes that a block can have on the smallest chip of the family, and that Triton does not check.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DIMENSIONS = (32, 64, 128, 256, 512)  # beyond WHOLE all are cut alike
ROWS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"))
ALL = [
    (architecture, dtype, precision, d, careful)
    for architecture in ARCHITECTURES
    for dtype, precision in ROWS
    for d in DIMENSIONS
    for careful in (False, True)
]
SOME = [
    (90, "bfloat16", "ieee", 256, False),
    (90, "bfloat16", "ieee", 128, True),
    (90, "float32", "ieee", 128, False),
    (100, "bfloat16", "ieee", 128, False),
    (80, "float16", "ieee", 512, False),
]


def jobs(architecture: int, dtype: str, precision: str, d: int, careful: bool) -> list[dict[str, Any]]:
    """The kernels of the table's entries, in the variants that take the most registers and in the commonest."""
    common = {"architecture": architecture, "dtype": dtype, "precision": precision, "d": d, "careful": careful}
    own_set = {"SELF": not careful}
    both = [
        {"absent": ["SIMILARITY_SUMS", "SUMS"], "flags": own_set},
        {"flags": own_set | {"ONE_EXPONENTIAL": 0}},
        {"flags": {"BIAS": 2 * careful}},
    ]
    variants = {
        "forward": [{"flags": own_set}],
        "running": [{"flags": own_set}],
        "two_way": [{}],
        "weighted": [{}],
        "backward": both,
    }
    listed = [common | {"kind": kind} | variant for kind in KINDS for variant in variants[kind]]
    return [*listed, common | {"kind": "finish"}]


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision", "d", "careful"),
    ALL if os.environ.get("FASTCL_COMPILE_ALL") else SOME,
    ids=lambda value: str(value),
)
def test_compiles_without_spills(architecture, dtype, precision, d, careful, tmp_path) -> None:
    asked = jobs(architecture, dtype, precision, d, careful)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, root / "tests" / "compile_triton.py", json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(asked)
    for result in results:
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        if not (dtype == "float32" and precision == "ieee"):  # whose products are multiply-adds, always in one order
            assert not result["fused"], result  # else it is what rounds a logit
        if result["kind"] != "finish" and (dtype != "float32" or precision == "tf32"):
            small = dtype == "float32"  # few rows in a tile: half of what wgmma takes
            assert any(
                name in result["products"] for name in (PRODUCT[architecture], *(["mma.sync"] if small else []))
            ), result


def test_rows_are_padded_to_what_tiles_take() -> None:
    for d in range(1, 4097):
        width = padded(d)
        assert width >= d
        assert width % 16 == 0
        assert width < 2 * d or width == 32
        assert width & (width - 1) == 0 if width <= WHOLE else width % 128 == 0
