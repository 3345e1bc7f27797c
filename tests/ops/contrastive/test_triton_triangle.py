"""Backend `triton`: the forward of self-contrast that forms the logits of each two blocks of rows once."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends import choose, triton_launch, triton_tiles
from fastcl.ops.backends.triton_tape import Tape, Taped
from fastcl.ops.contrastive import direct, replayed
from fastcl.ops.contrastive.triton import triangle
from tests.ops.contrastive.test_triton_maps import Watch
from tests.support.oracle import differentiate
from tests.support.stats_checks import check_stats, library_stats, objective, simple_problem
from tests.support.strategies import cluster_ids, generator

pytestmark = pytest.mark.skipif(
    "triton" not in choose.AVAILABLE or not triton_launch.INTERPRETED, reason="Triton is not interpreted here"
)
KERNELS = ["triangle_kernel", "remainder_kernel", "statistics_kernel", "triangle_total_kernel"]


@pytest.fixture
def few(monkeypatch) -> list[str]:
    """Few rows are enough, and seven programs share them. The value: the launched kernels."""
    seen: list[str] = []
    launch = triton_launch.launch

    def watched(name: str, shape: Any, grid: Any, given: dict[str, Any]) -> None:
        seen.append(name)
        launch(name, shape, grid, given)

    monkeypatch.setattr(triton_launch, "launch", watched)
    monkeypatch.setattr(triangle, "FEWEST_ROWS", 1)
    monkeypatch.setattr(triangle, "FEWEST_OFFSETS", 1)
    monkeypatch.setattr(triangle, "programs", lambda device: 7)
    return seen


# Where sum_all is wanted, rows become float32.
WANTED = ("lse_all", "lse_pos", "lse_neg", "sum_pos")
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "contrast_dtype": torch.bfloat16, "want": WANTED}


@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (130, {}),  # two whole blocks, which meet once
        (197, {"kind": "converged"}),  # an odd number of blocks
        (320, {"pattern": None}),  # no remainder
        (451, {"pattern": "huge"}),  # most blocks hold positives of each other
        (389, {"pattern": "random", "kind": "converged", "scales": (20.0,)}),
        (389, {"pattern": "negatives", "dtype": torch.float16}),
        (261, {"pattern": "pairs", "scales": (3.0, 9.0)}),
        (261, {"pattern": "pairs", "normalize_anchors": False, "normalize_contrasts": False}),
        (261, {"pattern": "pairs", "kind": "converged", "scales": (100.0,)}),  # a shift far above most logits
        (261, {"pattern": "distinct", "scales": (300.0,)}),  # running maxima do it all
        (133, {"pattern": "same"}),  # no negatives
    ],
)
def test_against_the_formula(n, changes, few) -> None:
    problem = simple_problem(n=n, m=None, d=19, **(BF16 | changes))
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))
    expected = [name for name in KERNELS if name != "remainder_kernel" or n % 64]
    assert [name for name in few if name in KERNELS] == expected * len(problem.scales)


@settings(max_examples=6)
@given(
    n=st.integers(64, 300),
    programs=st.integers(1, 9),
    offsets=st.sampled_from([1, 2, 64]),
    pattern=st.sampled_from([None, "pairs", "huge", "random", "negatives"]),
    seed=st.integers(0, 1000),
)
def test_each_negative_counts_once(n, programs, offsets, pattern, seed) -> None:
    """Logits of zero: the sum over the negatives is their number."""
    clusters = None if pattern is None else cluster_ids(pattern, n, generator(seed))
    with pytest.MonkeyPatch.context() as patch, fastcl.use_backend("triton"):
        patch.setattr(triangle, "FEWEST_ROWS", 1)
        patch.setattr(triangle, "FEWEST_OFFSETS", offsets)
        patch.setattr(triangle, "programs", lambda device: programs)
        patch.setattr(triangle, "triangle_tile", lambda *_: (triton_tiles.Tile(16, 32, 32, 32, 4, 1), 1))
        x = torch.zeros(n, 8, dtype=torch.bfloat16)
        found = fastcl.contrastive_stats(x, anchor_clusters=clusters, want=("lse_neg",))
    assert torch.equal(found.lse_neg.exp().round(), found.num_neg.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_reaches_every_row(value, few) -> None:
    for place in (5, 130, 199):  # in a block that holds its partners, is met by them, and beyond the whole blocks
        x = torch.randn(200, 8, generator=generator(0)).bfloat16()
        x[place, 3] = value
        with fastcl.use_backend("triton"):
            found = fastcl.contrastive_stats(x, anchor_clusters=torch.arange(200) // 2, normalize_anchors=True)
        assert found.lse_all.isnan().all()
    assert "triangle_kernel" in few


def test_zero_rows_and_rows_of_any_length(few) -> None:
    x = torch.randn(200, 8, generator=generator(0)) * torch.logspace(-12, 12, 200)[:, None]
    x[torch.tensor([0, 70, 199])] = 0
    arguments: dict[str, Any] = {
        "anchors": x.bfloat16(),
        "anchor_clusters": torch.arange(200) // 2,
        "normalize_anchors": True,
    }
    arguments |= {"logit_scale": torch.tensor(7.0), "want": WANTED}
    check_stats(arguments, ("anchors", "logit_scale"), backends=("triton",))


def test_the_same_bits_on_every_run(few) -> None:
    problem = simple_problem(n=205, m=None, d=19, **BF16)
    with fastcl.use_backend("triton"):
        runs = [differentiate(library_stats, problem.arguments(), problem.leaves, objective) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_replays_from_a_tape(few, monkeypatch) -> None:
    x = torch.randn(150, 8, generator=generator(0)).bfloat16().requires_grad_()
    clusters, temperature = torch.arange(150) // 2, torch.tensor(0.2, requires_grad=True)

    def step() -> list[torch.Tensor]:
        loss = cluster_infonce(x, clusters, temperature=temperature)
        return [loss.detach(), *torch.autograd.grad(loss, (x, temperature))]

    forward, backward = Taped(replayed._forward, own=1), Taped(replayed._backward, own=5)
    monkeypatch.setattr(replayed, "FORWARD", forward)
    monkeypatch.setattr(replayed, "BACKWARD", backward)
    with fastcl.use_backend("triton"):
        for call in range(4):  # as it is, recorded, replayed, replayed
            with torch.no_grad():
                x += torch.randn(x.shape, generator=generator(call)).bfloat16()
                temperature += 0.1
            monkeypatch.setattr(direct, "TAPED", "cpu")
            few.clear()
            got = step()
            assert "triangle_kernel" in few
            monkeypatch.setattr(direct, "TAPED", "none")
            for value, expected in zip(got, step(), strict=True):
                assert torch.equal(value, expected), call
    for taped in (forward, backward):
        assert [isinstance(tape, Tape) for tape in taped._tapes.values()] == [True]


def test_one_writer_of_each_place(few) -> None:
    """No kernel accesses memory beyond its tensors, and no program reads another's partial sums."""
    x = torch.randn(333, 8, generator=generator(0)).bfloat16()
    watch = Watch()
    with fastcl.use_backend("triton"), watch.watching():
        fastcl.contrastive_stats(x, anchor_clusters=cluster_ids("random", 333, generator(1)), normalize_anchors=True)
    written = dict(watch.launches)
    assert [name for name in written if name in KERNELS] == KERNELS
    assert {name for name, share in written["triangle_kernel"].items() if share} == {"PARTIAL_SUMS"}
    assert {name for name, share in written["triangle_total_kernel"].items() if share} == {"TOTAL"}
    assert written["triangle_total_kernel"]["TOTAL"] == written["statistics_kernel"]["STATISTICS"] == 1


def test_where_it_is_used(few) -> None:
    x, y = (torch.randn(140, 8, generator=generator(k)) for k in range(2))
    half = x.bfloat16()
    calls: list[tuple[bool, dict[str, Any]]] = [
        (True, {"anchors": half}),
        (True, {"anchors": half.half(), "anchor_clusters": torch.arange(140) // 2}),
        (False, {"anchors": x}),
        (False, {"anchors": half[:127]}),  # less than two blocks
        (False, {"anchors": half, "contrasts": y.bfloat16()}),
        (False, {"anchors": half, "contrast_bias": torch.zeros(140)}),
        (False, {"anchors": torch.randn(140, 300).bfloat16()}),
    ]
    for expected, arguments in calls:
        few.clear()
        with fastcl.use_backend("triton"):
            fastcl.contrastive_stats(**arguments)
        assert ("triangle_kernel" in few) == expected, arguments.keys()


def test_few_rows_and_other_devices_keep_one_kernel(few, monkeypatch) -> None:
    monkeypatch.undo()
    assert 4096 < triangle.FEWEST_ROWS <= 16384
    for architecture in (80, 89, 90, 100, 120):
        for d in (32, 64, 128, 256):
            found = triton_tiles.triangle_tile(architecture, torch.bfloat16, d)
            assert (found is not None) == (architecture == 90)
            assert triton_tiles.triangle_tile(architecture, torch.float32, d) is None
    assert triton_tiles.triangle_tile(90, torch.bfloat16, 384) is None


@pytest.mark.parametrize("at_once", [2, 3])
@pytest.mark.parametrize("n", [1 << k for k in range(14, 25)])
def test_partial_sums_stay_small(n, at_once) -> None:
    """On 132 multiprocessors: 16 MB at N = 65536, and less than the sorted rows of D = 128 with more rows."""
    division = triangle.Division.of(n, 128, at_once * 132)
    assert division.programs > 0.97 * at_once * 132
    assert division.programs % division.groups == 0
    size = division.programs * division.width * 4
    assert size <= max(16_000_000, 256 * n)
