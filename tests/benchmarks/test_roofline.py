"""Counts of the roofline: on a few lines of machine code, and on one compiled kernel."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.roofline_model import Cycles, Program, cycles, instructions, milliseconds, resident, tile_loops

# Two nested loops: over tiles, and over two parts of D; and an inner loop that hardly ever runs.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
                                                                            /* 0x000fe40000000f00 */
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;  /* 0x01e0000008187df0 */
                                                                            /* 0x000fe20008001818 */
        /*0020*/              @!P0 BRA 0x10 ;                               /* 0xfffffff000008947 */
                                                                            /* 0x000fea000383ffff */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;          /* 0x000000000000791d */
                                                                            /* 0x000fc80000000000 */
        /*0040*/                   FMUL R24, R24, R2 ;                      /* 0x0000000218187220 */
                                                                            /* 0x000fe40000400000 */
        /*0050*/               @P1 FADD R25, R25, -R3 ;                     /* 0x8000000319191221 */
                                                                            /* 0x000fe20000000000 */
        /*0060*/                   MUFU.EX2 R24, R24 ;                      /* 0x0000001800187308 */
                                                                            /* 0x000fe20000000800 */
        /*0070*/                   LDL R9, [R1] ;                           /* 0x0000000001097983 */
                                                                            /* 0x000fe20000100800 */
        /*0080*/               @P2 BRA 0x70 ;                               /* 0xfffffff000002947 */
                                                                            /* 0x000fea000383ffff */
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0000000000007b1d */
                                                                            /* 0x000fec0000010000 */
        /*00a0*/               @P3 BRA 0x10 ;                               /* 0xffffff6000003947 */
                                                                            /* 0x000fea000383ffff */
        /*00b0*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
"""
FLOPS = 2 * 64 * 128 * 16 / 4  # of a warp


def test_counts_of_a_loop_over_tiles() -> None:
    code = instructions(CODE)
    assert [one.name for one in code[:3]] == ["MOV", "HGMMA.64x128x16.F32.BF16", "BRA"]
    assert [one.stall for one in code[:3]] == [2, 1, 5]
    (loop,) = tile_loops(code, "MUFU.EX2", 2 * FLOPS)
    assert loop.shapes() == "2 64x128x16"
    assert loop.count("FMUL", "FADD") == 2
    assert loop.count("MUFU.EX2") == loop.count("BAR") == 1
    assert loop.count("LDL") == 0  # in the loop that hardly ever runs
    assert loop.issued == 2 * 2 + 6


def test_cycles_of_a_tile() -> None:
    (loop,) = tile_loops(instructions(CODE), "MUFU.EX2", 2 * FLOPS)
    program = Program(warps=8, registers=128, shared=100 * 1024, programs=264, tiles=10, loaded=0)
    found = cycles(loop, program)
    assert found.products == 2 * 2 * 64  # two instructions of each of two groups of warps, at 4096 operations a cycle
    assert found.special == 8 * 2
    assert resident(program) == 2
    together = Cycles(products=100, special=10, issue=20, l2=0, alone=300)
    assert together.each(1) == 300
    assert together.each(2) == 150
    assert together.each(9) == 100
    assert milliseconds(together, program) == pytest.approx(1000 * 2 * 150 * 10 / 1.755e9)


LOAD = "LDG.E.128 R4, desc[UR4][R2.64] ;"
STORE = "STS.128 [R9], R4 ;"
PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;"


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        ([PRODUCT], 0),
        ([LOAD, STORE, PRODUCT], 300 + 6400 / 64),  # latency and transfer
        ([STORE, LOAD, PRODUCT], 300 + 6400 / 64 - 64),  # of the next tile, behind the product
    ],
)
def test_rows_through_registers(body, waits) -> None:
    lines = [*body, "MUFU.EX2 R24, R24 ;", "@P3 BRA 0x0 ;", "EXIT ;"]
    word = "/* 0x000fe20000000000 */"
    code = "\n".join(f"/*{16 * k:04x}*/ {line} {word}\n {word}" for k, line in enumerate(lines))
    (loop,) = tile_loops(instructions(code), "MUFU.EX2", FLOPS)
    program = Program(warps=4, registers=128, shared=0, programs=132, tiles=1, loaded=6400)
    found = cycles(loop, program)
    assert found.products == 64
    shared = 16 * loop.count("STS")
    assert found.alone - found.products - max(loop.stalls, found.issue, found.special, shared) == waits


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_compiled_kernel() -> None:
    """The products and exponentials of a tile follow from its shape."""
    code = """
import json, torch
from benchmarks import roofline
case = roofline.Case("", 4096, 4096, 64, torch.bfloat16)
(forward,) = [one for one in roofline.sweeps(case) if one.kernel == "statistics_kernel"]
found = roofline.analysed(forward)
shape, loop = found.one.shape, found.loop
print(json.dumps([shape, loop.count("HGMMA"), loop.count("MUFU.EX2"), found.usage["stack"], found.milliseconds]))
"""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (m, n, _, _, warps, _, _), products, exponentials, stack, time = json.loads(done.stdout)
    assert products == m * n * 64 / (64 * n * 16) / (warps / 4)  # 64 rows and 16 numbers of D at once
    assert exponentials == m * n / (32 * warps)
    assert stack == 0
    assert 0.001 < time < 1
