"""Every entry of the Triton kernels' table of tiles compiles for its architecture. No GPU is needed.

There are no spills, shared memory suffices, tensor cores are used, and all kernels round logits alike. By default a few
entries are compiled. ``FASTCL_COMPILE_ALL=1`` compiles the whole table, ``FASTCL_COMPILE_SHARD=K/N`` the K-th of N
parts (tests/README.md says how long that takes). ``FASTCL_COMPILE_WITH=FOLDER`` uses the Triton of
``pip install --no-deps --target FOLDER triton==VERSION``.
"""

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

from fastcl.ops.backends.triton_tiles import (
    ARCHITECTURES,
    COMPARED,
    KINDS,
    OLD,
    WHOLE,
    Tile,
    padded,
    square_tile,
    tile,
    triangle_tile,
)
from tests.support.compiling import Compilers, chosen, everything, shard

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Shared memory of a block in bytes on the smallest chip of the family. Triton does not check it.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DIMENSIONS = (32, 64, 128, 256, 512)  # longer rows are all cut in the same way
ROWS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"))
# float32 rows are multiplied as three products in tf32 on sm_90 and newer, and on sm_80 by kernels without masks; other
# kernels and devices multiply in float32.
ALL = [
    (architecture, dtype, precision, d, careful)
    for architecture in ARCHITECTURES
    for dtype, precision in ROWS
    for d in DIMENSIONS
    for careful in (False, True)
    if dtype != "float32" or precision not in (("ieee",) if architecture >= 90 else ("tf32x3",) if careful else ())
]
# Each variant of each kernel once, with and without ids; and the products of each architecture and dtype.
SOME = {
    (90, "bfloat16", "ieee", 256, False): KINDS,
    (90, "bfloat16", "ieee", 128, True): KINDS,
    (90, "bfloat16", "ieee", 128, False): ("forward",),
    (90, "bfloat16", "ieee", 512, False): KINDS,
    (90, "float32", "tf32x3", 128, False): ("forward", "backward"),
    (80, "float32", "tf32x3", 128, False): KINDS,
    (90, "float32", "tf32", 128, False): ("forward", "backward"),
    (100, "bfloat16", "ieee", 128, False): ("forward", "backward"),
    (80, "float16", "ieee", 512, False): ("forward", "running", "weighted"),
    (80, "float32", "ieee", 32, True): ("two_way",),
    (80, "float32", "ieee", 64, False): ("running",),
    (80, "float32", "tf32", 64, False): ("running",),
    (100, "float32", "tf32x3", 32, True): ("backward",),
}
PER_ROW = (
    "labels", "rows", "fields", "weights", "side", "finish", "join", "first", "order", "longest", "total", "scale",
    "mean", "scaled", "positive", "positive_gradient", "triangle_total",
)  # fmt: skip
TILES = {
    "first": COMPARED,
    "order": COMPARED,
    "triangle_total": Tile(64, 128, 128, 128, 4, 2, 168),
}  # of those that do not take their family's


def jobs(
    architecture: int, dtype: str, precision: str, d: int, careful: bool, kinds: tuple[str, ...] = KINDS
) -> list[dict[str, Any]]:
    """The kernels of the table's entries, in the variants that take the most registers and in the most common ones."""
    common = {"architecture": architecture, "dtype": dtype, "precision": precision, "d": d, "careful": careful}
    own_set = {"SELF": not careful}
    both = [
        {"absent": ["SIMILARITY_SUMS", "SUMS"], "flags": own_set},
        {"flags": own_set | {"ONE_EXPONENTIAL": 0}},
        {"flags": {"BIAS": 2 * careful}},
    ]
    queue = {"flags": {"CLUSTERS": False, "SPLIT": True}, "absent": ["START", "END"]}
    variants = {
        "forward": [{"flags": own_set}, {"flags": own_set | {"SPLIT": True}}, {"flags": {"MIXED_ONLY": True}}],
        "running": [{"flags": own_set}],
        "two_way": [{}],
        "weighted": [{}, {"flags": {"SPLIT": True}}, queue],
        "backward": both,
    }
    return [common | {"kind": kind} | variant for kind in kinds for variant in variants[kind]]


Compiled = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Compiles the jobs of a test, on all cores."""
    compilers = Compilers(tmp_path_factory.mktemp("compiled"))
    yield compilers
    compilers.close()


@pytest.mark.parametrize("entry", chosen(SOME, ALL), ids=lambda entry: "-".join(map(str, entry)))
def test_compiles_without_spills(entry, compiled) -> None:
    architecture, dtype, precision, d, _ = entry
    products = set()
    for result in compiled(jobs(*entry, KINDS if everything() else SOME[entry])):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        block_m, block_n, block_k, block_d, warps = result["tile"][:5]
        # If only some kernels fused the rounding of a logit into a multiply-add, logits would differ. So there may
        # be no multiply-adds but those of products without tensor cores, in the loops over interior and mixed tiles.
        numbers = block_k + (block_d if result["kind"] in ("weighted", "backward") else 0)
        loops = 1 if result.get("flags", {}).get("MIXED_ONLY") else 2
        of_products = loops * block_m * block_n * numbers // (32 * warps)
        expected = of_products if (dtype, precision) == ("float32", "ieee") else 0
        assert result["multiply_adds"] == expected, result
        assert result["fusible"] == 0, result
        products.add((*result["products"], block_k))
    # The backward repeats the forward's logits to the bit: same instructions, sums in the same order.
    assert len(products) == 1, products
    if (
        dtype != "float32" or precision == "tf32x3" or (precision == "tf32" and d > 64)
    ):  # else in few rows, half of what wgmma takes
        assert PRODUCT[architecture] in products.pop()


def test_kernels_of_single_rows_compile_without_spills(compiled) -> None:
    common = {"architecture": 90, "dtype": "float16", "d": 128, "careful": True}
    asked = [common | {"kind": kind} | ({"tile": TILES[kind]} if kind in TILES else {}) for kind in PER_ROW]
    for result in compiled(asked):
        assert result["stack"] == result["local"] == 0, result
        assert result["fusible"] == 0, result


# Kernels that read whole rows once.
WHOLE_ROWS = [
    (architecture, dtype, d)
    for architecture in ARCHITECTURES
    for dtype in ("bfloat16", "float16", "float32")
    for d in (32, 128, 256, 384, 512)
]


@pytest.mark.parametrize(("architecture", "dtype", "d"), chosen([(100, "bfloat16", 512)], WHOLE_ROWS))
def test_kernels_of_whole_rows_compile_without_spills(architecture, dtype, d, compiled) -> None:
    common = {"architecture": architecture, "dtype": dtype, "d": d}
    kinds = ("rows", "finish", "positive", "positive_gradient") if everything() else ("rows",)
    for result in compiled(
        [common | {"kind": kind, "careful": careful} for kind in kinds for careful in (True, False)]
    ):
        assert result["stack"] == result["local"] == 0, result
        assert result["fusible"] == 0, result


SOME_OBSERVATIONS = [(90, "bfloat16", "ieee", 256, True), (90, "float32", "tf32x3", 64, True), *list(SOME)[::3]]


@pytest.mark.parametrize("entry", chosen(SOME_OBSERVATIONS, ALL), ids=lambda entry: "-".join(map(str, entry)))
def test_observation_compiles_without_spills(entry, compiled) -> None:
    names = ("architecture", "dtype", "precision", "d", "careful")
    for result in compiled([{"kind": "observation"} | dict(zip(names, entry, strict=True))]):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[result["architecture"]], result


# The forward in which two blocks meet once. The table has it for sm_90 only; elsewhere it is tried with one stage.
MEETINGS = [(architecture, d) for architecture in ARCHITECTURES for d in (32, 64, 128, 256)]
SOME_MEETINGS = [(80, 128), (90, 128), (90, 256), (100, 256)]


def compiler() -> tuple[int, ...]:
    """The version of the Triton that compiles."""
    folder = os.environ.get("FASTCL_COMPILE_WITH")
    found = metadata.distributions(name="triton", **({"path": [folder]} if folder else {}))
    return tuple(int(part) for part in next(iter(found)).version.split(".")[:2])


@pytest.mark.parametrize(("architecture", "d"), chosen(SOME_MEETINGS, MEETINGS))
def test_blocks_that_meet_once_compile_without_spills(architecture, d, compiled) -> None:
    if compiler() < OLD:
        pytest.skip("the library does not launch these kernels with this Triton")
    found = triangle_tile(architecture, torch.bfloat16, d)
    shape, at_once = found or (Tile(64, 128, d, d, 4, 1), 1)
    common = {"architecture": architecture, "dtype": "bfloat16", "d": d}
    own = common | {"tile": tuple(shape)} | ({} if found else {"flags": {"AHEAD": False}})
    asked = [own | {"kind": "triangle"}, own | {"kind": "remainder"}]
    if found is not None:
        square = {"tile": tuple(square_tile(shape)), "flags": {"SELF": True, "MIXED_ONLY": True}}
        plain = {"absent": ["START", "END", "ORDER"], "flags": {"CLUSTERS": False, "NORMED": False}}
        asked += [common | square | {"kind": "forward"}, own | {"kind": "triangle"} | plain]
    for result in compiled(asked):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        assert result["fusible"] == result["multiply_adds"] == 0, result
        assert PRODUCT[architecture] in result["products"], result
        if result["kind"] == "triangle":  # as many programs fit on a multiprocessor as the library launches for it
            assert result["registers"] * 32 * shape.warps * at_once <= 65536
            assert (result["shared"] + 1024) * at_once <= SHARED[architecture] + 1024


def test_all_kernels_form_logits_in_one_way() -> None:
    """They use the same functions and the same order along D."""
    from fastcl.ops.contrastive.triton import gradient_kernels as triton_backward
    from fastcl.ops.contrastive.triton import statistics_kernels as triton_forward

    for name in ("inner_products", "similarities", "base2_logits"):
        assert getattr(triton_forward, name) is getattr(triton_backward, name)
    for architecture, dtype, precision, d, careful in ALL:
        tf32 = precision == "tf32"
        split = precision == "tf32x3"
        for old in (False, True):  # of Triton
            tiles = [
                tile(kind, architecture, getattr(torch, dtype), d, careful, tf32, split=split, old=old)
                for kind in KINDS
            ]
            assert len({t.block_k for t in tiles}) == 1, (architecture, dtype, precision, d, careful, old)
            if dtype != "float32" and architecture > 80:  # rows for the same instruction
                assert min(t.block_m for t in tiles) >= 64, (architecture, dtype, d, careful, old)


SEARCHES = [
    (architecture, dtype, d, slots)
    for architecture in ARCHITECTURES
    for dtype in ("bfloat16", "float32")
    for d in DIMENSIONS
    for slots in (32, 64, 256)
]
SOME_SEARCHES = [(90, "bfloat16", 128, 64), (80, "float32", 256, 256), (100, "bfloat16", 512, 256)]


@pytest.mark.parametrize(("architecture", "dtype", "d", "slots"), chosen(SOME_SEARCHES, SEARCHES))
def test_topk_compiles_without_spills(architecture, dtype, d, slots, compiled) -> None:
    job = {"kind": "topk", "architecture": architecture, "dtype": dtype, "d": d, "flags": {"SLOTS": slots}}
    for result in compiled([job | {"careful": True}, job]):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result


# Of rows and of assignments. Any pair may be a positive, so every tile is masked. No products are split in three.
SOFT = [
    (architecture, dtype, precision, d, assignments)
    for architecture in ARCHITECTURES
    for dtype, precision in ROWS
    for d in DIMENSIONS
    for assignments in ("float32", dtype)
    if precision != "tf32x3"
]
SOME_SOFT = [(90, "bfloat16", "ieee", 256, "float32"), (80, "float32", "ieee", 128, "float32")]
SOME_SOFT += [(90, "float32", "ieee", 32, "float32")]


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision", "d", "assignments"),
    chosen(SOME_SOFT, dict.fromkeys(SOFT)),
)
def test_soft_assignments_compile_without_spills(architecture, dtype, precision, d, assignments, compiled) -> None:
    common = {"architecture": architecture, "dtype": dtype, "precision": precision, "d": d, "careful": True}
    half = {} if assignments == "float32" else {"assignments": assignments}
    self_contrast = {"flags": {"SELF": True, "IDS": False, "BIAS": 0}, "careful": False}
    asked = [common | half | {"kind": kind} for kind in ("soft_forward", "soft_backward")]
    results = compiled(asked + [job | self_contrast for job in asked])
    for result in results:
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        assert result["fusible"] == 0, result
    assert len({result["tile"][2] for result in results}) == 1  # logits are sums in the same order along D


# Kernels with rules about pairs, which mask every tile.
RULED = [(architecture, dtype, precision, d) for architecture, dtype, precision, d, careful in ALL if careful]
OF_GUIDE = [f"{side}_{name}" for side in ("ROW", "COLUMN") for name in ("GUIDE", "GUIDE_NORMS", "THRESHOLDS")]
# All rules but a guide, for two sides at once; or with a guide, for one side at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "two sets": {"careful": True, "absent": OF_GUIDE},
    "self-contrast": {"careful": False, "absent": OF_GUIDE, "flags": {"SELF": True}},
    "guide": {"careful": True, "absent": ["COLUMN_THRESHOLDS"], "flags": {"OTHERS": False}},
    "guide of the columns": {
        "careful": True, "absent": ["ROW_THRESHOLDS"], "flags": {"BIAS": 2, "OWN": False}, "guide": "bfloat16",
    },
}  # fmt: skip
SOME_RULED = {
    (90, "bfloat16", "ieee", 128): [("ruled_forward", "guide")],
    (80, "float16", "ieee", 128): [("ruled_backward", "guide of the columns")],
    (100, "float32", "tf32x3", 64): [("ruled_observation", "self-contrast")],
    (80, "float32", "ieee", 64): [("ruled_observation", "two sets"), ("ruled_observation", "self-contrast")],
}
EVERY_RULED = [
    (kind, name) for kind in ("ruled_forward", "ruled_observation") for name in VARIANTS if "col" not in name
]
EVERY_RULED += [("ruled_backward", name) for name in VARIANTS]


@pytest.mark.parametrize("entry", chosen(SOME_RULED, RULED), ids=lambda entry: "-".join(map(str, entry)))
def test_rules_compile_without_spills(entry, compiled) -> None:
    architecture, dtype, precision, d = entry
    common = {"architecture": architecture, "dtype": dtype, "precision": precision, "d": d}
    of_entry = EVERY_RULED if everything() else SOME_RULED[entry]
    asked = [common | {"kind": kind} | VARIANTS[name] for kind, name in of_entry]
    for result in compiled(asked):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        assert result["fusible"] == 0, result
        if dtype != "float32":
            assert PRODUCT[architecture] in result["products"]


# By the number of `pair_maps.KINDS`; of distances scale and offset have no gradient.
PAIRS = [
    (architecture, dtype, precision, d, kind)
    for architecture in ARCHITECTURES
    for dtype, precision in ROWS
    for d in DIMENSIONS
    for kind in range(4)
    if (architecture, dtype, precision, d, False) in ALL
]
SOME_PAIRS = [(90, "bfloat16", "ieee", 128, 0), (90, "float32", "tf32x3", 128, 3), (100, "float16", "ieee", 256, 2)]


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision", "d", "kind"),
    chosen(SOME_PAIRS, PAIRS),
)
def test_pair_sums_compile_without_spills(architecture, dtype, precision, d, kind, compiled) -> None:
    common = {"kind": "pairs", "architecture": architecture, "dtype": dtype, "precision": precision, "d": d}
    logits = ["ROW_SQUARES", "COLUMN_SQUARES"]
    distances = ["ROW_SHIFT", "SIMILARITY_SUMS", "SLOPE_SUMS"]
    outputs = ["GRADIENT", "SIMILARITY_SUMS", "SLOPE_SUMS", "OWN_WEIGHTS", "OTHER_WEIGHTS"]
    absent = distances if kind >= 2 else logits
    flags = {"KIND": kind, "ONLY_POSITIVES": False}
    ids = {"careful": (architecture, dtype, precision, d, True) in ALL}
    asked = [
        common | ids | {"absent": absent, "flags": flags},
        common | ids | {"absent": absent + outputs, "flags": flags},
        common | {"careful": False, "absent": [*absent, "COLUMN_SHIFT"], "flags": flags | {"SELF": True}},
    ]
    for result in compiled(asked):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result
        assert result["fusible"] == 0, result


# d: the number of prototypes.
PROTOTYPES = [
    (architecture, dtype, k)
    for architecture in ARCHITECTURES
    for dtype in ("bfloat16", "float16", "float32")
    for k in (100, 1000, 65536)
]


@pytest.mark.parametrize(
    ("architecture", "dtype", "k"),
    chosen([(90, "bfloat16", 65536), (80, "float32", 1000)], PROTOTYPES),
)
def test_prototype_losses_compile_without_spills(architecture, dtype, k, compiled) -> None:
    """Two teachers with all terms, and one teacher without potential and further terms."""
    few = ["SECOND", "SECOND_POTENTIAL", "SECOND_KEPT", "FIRST_POTENTIAL", "ENTROPIES", "COLUMN_SUMS"]
    common = {"architecture": architecture, "dtype": dtype, "d": k, "careful": True}
    kinds = ("prototype_forward", "prototype_backward")
    asked = [common | {"kind": kind, "absent": absent} for kind in kinds for absent in ([], few)]
    for result in compiled(asked):
        assert result["stack"] == result["local"] == 0, result
        assert result["shared"] <= SHARED[architecture], result


def test_rows_are_padded_to_what_tiles_take() -> None:
    for d in range(1, 4097):
        width = padded(d)
        assert width >= d
        assert width % 16 == 0
        assert width < 2 * d or width == 32
        assert width & (width - 1) == 0 if width <= WHOLE else width % 128 == 0


def test_shards_are_the_whole() -> None:
    parts = [shard(range(100), f"{part}/7") for part in range(1, 8)]
    assert sorted(entry for part in parts for entry in part) == list(range(100))
    assert {len(part) for part in parts} == {14, 15}
    assert shard(range(3), "") == [0, 1, 2]
    for wrong in ("0/2", "3/2", "1", "1/", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="expected K/N"):
            shard(range(3), wrong)
