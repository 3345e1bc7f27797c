"""Counts instructions in loops of machine code, and predicts cycles from them. Plain functions of text and numbers.

The model is coarse (about 30 %) and has not been compared with a GPU. A block's tile takes, one after the other,

- the products on tensor cores: `wgmma` at its peak rate, or at the rate of shared memory where that is lower;
- everything else, the longest of: one instruction per cycle and scheduler, the special-function unit, conversions, and
  the stall counts that the compiler has written into one warp's instructions.

A copy to shared memory that the loop waits for as soon as it has started it adds its latency, except for the products
that are still running. Loads that pass through registers add their latency.

Tiles of blocks that share a multiprocessor overlap, but no unit works faster than its peak, and all columns pass
through the L2 cache.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# An H200, as its data sheet and published measurements have it.
MULTIPROCESSORS = 132
CLOCK = 1.755e9
SHARED_BYTES = 227 * 1024  # of a multiprocessor, for blocks
REGISTERS = 65536
SCHEDULERS = 4
SHARED_PER_CYCLE = 128  # bytes
L2_PER_CYCLE = 28  # bytes, of one multiprocessor when all read: 6.5 TB/s
PRODUCTS_PER_CYCLE = {"16": 4096.0, "tf32": 2048.0}  # floating-point operations of a multiprocessor's tensor cores
MMA_SYNC = 0.62  # the share of wgmma's rate that mma.sync reaches on Hopper, as published
BARRIER, WAIT = 30, 60  # cycles of a barrier, and from the end of a product to the first use of its result
LATENCY, LOAD_PER_CYCLE = 300, 64  # of a load from the L2 cache, and bytes per cycle that one multiprocessor receives

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* (0x[0-9a-f]{16}) \*/\s*(?:/\* (0x[0-9a-f]{16}) \*/)?")
SECOND_WORD = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/\s*$")
PREDICATE = re.compile(r"^@!?U?P[T\d]+\s+")
BRANCH = re.compile(r"BRA\S*\s+(?:\S+,\s*)*`?\(?(?:0x)?([0-9a-f]+)\)?$")
WGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\.F32(\S*)\s+R\d+,\s*(R\d+|gdesc)")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without its predicate
    stall: int  # cycles until the warp may issue the next one

    @property
    def name(self) -> str:
        return self.text.split()[0]


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel, as `cuobjdump --dump-sass` prints them."""
    found: list[Instruction] = []
    lines = sass.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        match = INSTRUCTION.search(line)
        if match:
            second = SECOND_WORD.match(after)
            high = int(second[1], 16) if second else 0
            found.append(Instruction(int(match[1], 16), PREDICATE.sub("", match[2].strip()), high >> 41 & 15))
    return found


@dataclass(frozen=True)
class Loop:
    """A loop's instructions for one warp. Those of inner loops have their number of iterations as weight."""

    code: tuple[tuple[Instruction, float], ...]

    def count(self, *names: str) -> float:
        """How often instructions run whose name begins with one of these."""
        return sum(weight for one, weight in self.code if one.name.startswith(names))

    @property
    def issued(self) -> float:
        return sum(weight for _, weight in self.code)

    @property
    def stalls(self) -> float:
        return sum(weight * max(one.stall, 1) for one, weight in self.code)

    def shapes(self) -> str:
        """The tensor cores' instructions, such as ``16 64x128x16``."""
        seen: defaultdict[str, float] = defaultdict(float)
        for one, weight in self.code:
            if one.name.startswith(("HGMMA", "HMMA")):
                seen[one.name.split(".")[1]] += weight
        return " + ".join(f"{number:.0f} {shape}" for shape, number in seen.items())


def flops(one: Instruction, scalar: bool = False) -> float:
    """The multiplications and additions of a product's instruction, of the warp that issues it.

    scalar: the kernel's products use no tensor cores.
    """
    if match := WGMMA.match(one.text):
        return 2 * 64 * int(match[1]) * int(match[2]) / 4  # four warps share it
    if one.name.startswith("HMMA."):
        return {"16816": 4096.0, "1688": 2048.0, "1684": 1024.0}[one.name.split(".")[1]]
    return 64.0 if scalar and one.name.startswith("FFMA") else 0.0


def _branches(code: Sequence[Instruction]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first, last) addresses of loops, and of what forward branches skip."""
    back, forth = [], []
    for one in code:
        if one.name.startswith("BRA") and (match := BRANCH.search(one.text)):
            target = int(match[1], 16)
            if target < one.address:
                back.append((target, one.address))
            elif target > one.address + 16:
                forth.append((one.address + 16, target - 16))
    return back, forth


def tile_loops(code: Sequence[Instruction], needed: str, products: float) -> list[Loop]:
    """The loops over tiles: the innermost ones with a product and an instruction `needed`, or, if it is empty, the
    outermost ones with a product.

    Inner loops without products, and conditional code around them, count as rare: they are left out.

    products: a warp's operations of one tile, from its shape. A loop over parts of D within gets the weight with which
    the products agree, and a loop that holds several tiles is divided by their number.
    """
    spans, skips = _branches(code)
    scalar = not any(flops(one) for one in code)

    def within(span: tuple[int, int]) -> list[Instruction]:
        return [one for one in code if span[0] <= one.address <= span[1]]

    def work(part: Sequence[Instruction]) -> float:
        return sum(flops(one, scalar) for one in part)

    def inside_of(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [other for other in others if other != span and span[0] <= other[0] and other[1] <= span[1]]

    def inside(span: tuple[int, int]) -> list[tuple[int, int]]:
        return inside_of(span, spans)

    whole = {span for span in spans if work(within(span)) and any(one.name.startswith(needed) for one in within(span))}
    found = []
    for span in sorted(whole):
        others = whole.intersection(inside(span)) if needed else {one for one in whole if span in inside(one)}
        if others:
            continue
        again = {one for other in inside(span) if work(within(other)) for one in within(other)}
        rare = [other for other in inside(span) if not work(within(other))]
        rare += [skip for skip in skips if skip in inside_of(span, skips) and inside_of(skip, rare)]
        left_out = {one for other in rare if not work(within(other)) for one in within(other)} - again
        body = [one for one in within(span) if one not in left_out]
        once = work([one for one in body if one not in again])
        repeated = work([one for one in body if one in again])
        weight = (products - once) / repeated if repeated else 1.0
        tiles = 1 if repeated else max(1, round(once / products))
        found.append(Loop(tuple((one, (weight if one in again else 1.0) / tiles) for one in body)))
    return found


@dataclass(frozen=True)
class Program:
    """What a launch needs besides its loop."""

    warps: int
    registers: int
    shared: int
    programs: int
    tiles: float  # of one program
    loaded: int  # bytes of columns per tile


@dataclass(frozen=True)
class Cycles:
    """Of one tile of one block: the tensor cores, the special-function unit, the schedulers, the L2 cache, and all of
    it one after the other."""

    products: float
    special: float
    issue: float
    l2: float
    alone: float

    def each(self, resident: int) -> float:
        """Cycles per tile of a multiprocessor with so many blocks."""
        return max(self.alone / resident, self.products, self.special, self.issue, self.l2)


def cycles(loop: Loop, program: Program) -> Cycles:
    products = behind = 0.0  # behind: products since the last wait for one
    waits = copies = 0.0
    exposed = loading = stored = ahead = False
    for one, weight in loop.code:
        before = products
        if one.name.startswith("LDGSTS"):
            copies += weight
        elif one.name.startswith("LDG") and ".128" in one.name:
            loading = True
        elif one.name.startswith("STS") and loading:
            waits += LATENCY * weight
            loading, stored = False, True
        elif one.name.startswith(("HGMMA", "HMMA")) and loading:  # rows of the next tile
            loading, ahead = False, True
        elif one.name.startswith("DEPBAR") and re.search(r"SB\d, 0x0\b", one.text):
            exposed = True  # no copy may be under way
        elif one.name.startswith("WARPGROUP.DEPBAR"):
            behind = 0.0
            waits += WAIT * weight
        if match := WGMMA.match(one.text):
            columns, depth = int(match[1]), int(match[2])
            size = 32 // depth  # bytes of an operand: 16 numbers of 2, or 8 of 4
            rate: float = PRODUCTS_PER_CYCLE["16" if size == 2 else "tf32"]
            shared = (columns + (64 if match[4] == "gdesc" else 0)) * depth * size / SHARED_PER_CYCLE
            products += weight * max(2 * 64 * columns * depth / rate, shared) / 4 * program.warps
        elif one.name.startswith("HMMA."):
            rate = PRODUCTS_PER_CYCLE["tf32" if "TF32" in one.name else "16"] * MMA_SYNC
            products += weight * flops(one) / rate * program.warps
        behind += (products - before) if one.name.startswith("HGMMA") else 0.0
    turns = program.warps / SCHEDULERS
    special = 8 * loop.count("MUFU") * turns
    issue = loop.issued * turns
    conversions = 2 * loop.count("F2F", "I2F", "F2I") * turns
    shared = loop.count("LDS", "LDSM", "STS", "STSM") * 512 / SHARED_PER_CYCLE * program.warps
    rest = max(special, issue, conversions, shared, loop.stalls if program.warps <= SCHEDULERS else 0.0)
    waits += loop.count("BAR") * BARRIER
    if stored:
        waits += program.loaded / LOAD_PER_CYCLE
    if ahead:
        waits += max(0.0, LATENCY + program.loaded / LOAD_PER_CYCLE - products)
    if exposed and copies:
        waits += max(0.0, LATENCY + program.loaded / LOAD_PER_CYCLE - behind)
    return Cycles(products, special, issue, program.loaded / L2_PER_CYCLE, products + rest + waits)


def resident(program: Program) -> int:
    """Blocks on a multiprocessor."""
    registers = -(-program.registers // 8) * 8 * 32 * program.warps
    return max(1, min(REGISTERS // registers, SHARED_BYTES // (program.shared + 1024), 64 // program.warps))


def milliseconds(found: Cycles, program: Program) -> float:
    """The time of a launch: waves of blocks, of which the last may fill the device in part."""
    most = resident(program)
    full, left = divmod(program.programs, MULTIPROCESSORS * most)
    total = full * most * found.each(most)
    if left:
        blocks = -(-left // MULTIPROCESSORS)
        total += blocks * found.each(blocks)
    return 1000 * total * program.tiles / CLOCK
