"""Backend `triton`: a row block's columns shared by several programs, whose parts are joined."""

from typing import Any

import pytest
import torch

import fastcl
from fastcl.ops.backends import choose, triton_launch, triton_tiles
from fastcl.ops.contrastive.triton import rows as triton_rows
from tests.support.backends import running
from tests.support.oracle import differentiate
from tests.support.stats_checks import check_stats, library_stats, objective, simple_problem

pytestmark = pytest.mark.skipif(
    "triton" not in choose.AVAILABLE or not triton_launch.INTERPRETED, reason="Triton is not interpreted here"
)
SHARED = ("statistics_kernel", "weighted_kernel", "gradient_kernel")


@pytest.fixture
def parts(monkeypatch) -> list[tuple[str, int]]:
    """Programs with as little as one tile of columns. The value: kernels launched, with the number of parts."""
    seen: list[tuple[str, int]] = []
    launch = triton_launch.launch

    def watched(name: str, shape: Any, grid: Any, given: dict[str, Any]) -> None:
        if name in SHARED:
            assert given["SPLIT"] == (grid[-1] > 1 and not given.get("MIXED_ONLY"))
            seen.append((name, grid[-1] if given["SPLIT"] else 1))
        launch(name, shape, grid, given)

    monkeypatch.setattr(triton_launch, "launch", watched)
    monkeypatch.setattr(triton_rows, "FEWEST_TILES", 1)
    monkeypatch.setattr(triton_rows, "PROGRAMS_AT_ONCE", 8)
    return seen


ONE_WAY = {"both": False, "bias": False, "ids": False}


@pytest.mark.parametrize(
    "problem",
    [
        simple_problem(n=150, m=None, d=9),
        simple_problem(n=141, m=None, d=9, bias=True, kind="converged"),
        simple_problem(n=37, m=270, d=7, both=False),
        simple_problem(n=70, m=200, d=140, scales=(3.0, 9.0), both=False, bias=False),
        simple_problem(n=66, m=131, d=5, scales=(90.0,), **ONE_WAY),
        simple_problem(n=70, m=199, d=33, dtype=torch.bfloat16, contrast_dtype=torch.bfloat16, **ONE_WAY),
    ],
    ids=["self", "self-bias", "ids-bias", "scales", "two-exponentials", "bfloat16"],
)
def test_parts_of_the_columns_are_joined(problem, parts) -> None:
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))
    for kernel in ("statistics_kernel", "gradient_kernel"):
        assert max(count for name, count in parts if name == kernel) > 1, parts


@pytest.mark.parametrize("pattern", ["random", None])
@pytest.mark.parametrize("scale", [5.0, 200.0])
def test_parts_of_a_queue(pattern, scale, parts) -> None:
    """Contrasts without a gradient: weighted sums are joined too, also where parts have far apart maxima."""
    problem = simple_problem(
        n=70, m=261, d=9, pattern=pattern, scales=(scale,), scale_tensor=False, kind="converged", **ONE_WAY
    )
    wanted = ("lse_all", "lse_neg", "sum_pos") if pattern else ("lse_all",)
    check_stats(problem.arguments() | {"want": wanted}, ("anchors",), backends=("triton",))
    assert [count for name, count in parts if name == "weighted_kernel"] == [5]


def test_columns_beyond_the_first_parts_maximum(parts) -> None:
    """The last part has the largest logits by far, the first has none that count."""
    x = torch.eye(8)[:3]
    y = torch.cat((torch.full((64, 8), -300.0), torch.full((64, 8), -20.0), torch.full((30, 8), 200.0)))
    arguments = {"anchors": x, "contrasts": y, "contrast_ids": torch.arange(158) // 64}
    arguments |= {"anchor_ids": torch.zeros(3, dtype=torch.int64), "want": ("lse_all",)}
    check_stats(arguments, ("anchors",), backends=("triton",))
    assert parts == [("weighted_kernel", 3)]


def test_the_same_bits_on_every_run(parts) -> None:
    problem = simple_problem(n=70, m=200, d=9, both=False)
    with running("triton"):
        runs = [differentiate(library_stats, problem.arguments(), problem.leaves, objective) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [(65536, 65536, 1), (4096, 1 << 20, 4), (64, 1 << 20, 244), (64, 2048, 1), (16384, 16384, 1), (100, 20000, 9)],
)
def test_how_many_parts(n, m, expected, monkeypatch) -> None:
    """On 132 multiprocessors with tiles of 64 x 32."""
    shape = triton_tiles.Tile(64, 32, 64, 64, 4, 3)
    monkeypatch.setattr(triton_rows.Launch, "tile", lambda *_: shape)
    monkeypatch.setattr(triton_rows, "programs", lambda device: 132)
    anchors, contrasts = (triton_rows.SortedRows(torch.empty(k, 64), *[None] * 6) for k in (n, m))
    launch = triton_rows.Launch(anchors, contrasts, {}, False)
    assert launch.column_parts("weighted") == expected


@pytest.mark.parametrize(("version", "old"), [("3.2.0", True), ("3.5.1", True), ("3.6.0", False), ("3.10.0", False)])
def test_an_old_triton_has_tiles_of_its_own(version, old, monkeypatch) -> None:
    """Its kernels would spill with the tiles that newer versions take."""
    monkeypatch.setattr(triton_launch, "triton_version", lambda: version)
    for name in ("version", "is_old"):  # without their caches
        monkeypatch.setattr(triton_launch, name, getattr(triton_launch, name).__wrapped__)
    monkeypatch.setattr(triton_rows, "INTERPRETED", False)
    launched: list[triton_tiles.Tile] = []
    monkeypatch.setattr(triton_launch, "launch", lambda name, shape, grid, given: launched.append(shape))
    rows = triton_rows.SortedRows(torch.empty(256, 128, dtype=torch.bfloat16), *[None] * 6)
    flags = {"IDS": False, "BIAS": 0, "PRECISION": "ieee"}
    launch = triton_rows.Launch(rows, rows, flags, False)
    assert launch.tile("forward").block_n == (32 if old else 64)
    masked = triton_rows.Launch(rows, rows, flags | {"IDS": True}, False)
    assert masked.tile("forward") == triton_tiles.tile("forward", 90, torch.bfloat16, 128, True)
    both = {"OWN": True, "OTHERS": True}
    launch.sweep("backward", "", launch.grid, *(both | {"ONE_EXPONENTIAL": one} for one in (1, 0)))
    assert [shape.block_n for shape in launched] == [64, 32 if old else 64]


def test_the_public_loss_on_a_queue(parts) -> None:
    x, keys, queue = torch.randn(40, 8), torch.randn(40, 8), torch.randn(200, 8)

    def gradient(backend: str) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with fastcl.use_backend(backend):
            fastcl.ClusterInfoNCE(0.2)(leaf, positives=keys, contrasts=queue).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-5, atol=1e-7)
    assert max(count for _, count in parts) > 1
