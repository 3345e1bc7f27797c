"""Backend ``cuda``: its kernels on the emulator against the formula, and what results depend on.

The whole of `test_stats.py` passes on it too, but takes minutes.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastcl
from fastcl.ops.backends.triton_tape import Tape, Taped
from fastcl.ops.contrastive import cuda as contrastive_cuda
from fastcl.ops.contrastive import cuda_rows, direct, op, replayed
from fastcl.ops.contrastive.records import Rows
from tests.ops.contrastive.test_direct import case
from tests.support.emulated import emulating, module
from tests.support.oracle import differentiate
from tests.support.stats_checks import check_stats, library_stats, objective, simple_problem
from tests.support.strategies import FIELDS, StatsProblem, cluster_ids, generator, rows, stats_problems

ROOT = Path(__file__).parents[3]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulating():
        yield


def problem(dtype: torch.dtype, **changes: Any) -> StatsProblem:
    plain = {"n": 133, "m": None, "d": 20, "bias": False, "ids": False, "both": False, "pattern": "pairs"}
    return simple_problem(**(plain | changes), dtype=dtype, contrast_dtype=dtype)


def check(p: StatsProblem, leaves: tuple[str, ...] = ()) -> None:
    check_stats(p.arguments(), leaves or p.leaves, backends=("cuda",))


# Numerical results. Blocks have 128 rows, tiles 128 or 64 columns, slices 64 or 32 numbers of a row.

TWO_SETS = {"m": 141, "both": True}
CALLS: dict[str, dict[str, Any]] = {
    "self-contrast": {"pattern": "random"},
    "self-contrast, converged": {"kind": "converged", "scales": (20.0,)},
    "self-contrast, bias": {"bias": True, "n": 40},
    "self-contrast, low temperature": {"scales": (300.0,)},
    "two sets": TWO_SETS | {"n": 40},
    "two sets, one way": {"m": 141, "n": 40},
    "two sets, ids and bias": TWO_SETS | {"n": 40, "ids": True, "bias": True},
    "two sets, low temperature": TWO_SETS | {"scales": (-200.0,)},
    "two sets, no clusters": TWO_SETS | {"pattern": None, "n": 30},
    "two sets, not normalised": {"m": 30, "normalize_anchors": False, "normalize_contrasts": False, "both": True},
    "three scales": {"m": 30, "n": 40, "both": True, "scales": (0.5, 3.0, 300.0)},
    "slices that do not fill": {"n": 30, "m": 20, "d": 105},
    "columns that are loaded twice": {"n": 30, "m": 130, "d": 170},
    "rows that pass by": {"n": 5, "m": 130, "d": 300, "both": True},
    "one number a row": {"n": 40, "d": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_obeys_the_error_rule(call, dtype) -> None:
    check(problem(dtype, **CALLS[call]))


@settings(max_examples=12)
@given(stats_problems().filter(lambda p: torch.float64 not in (p.dtype, p.contrast_dtype)))
def test_matches_the_formula(p: StatsProblem) -> None:
    check(replace(p, n=min(p.n, 40)))


def test_float64_is_chunked() -> None:
    check(problem(torch.float64, n=5))


@pytest.mark.parametrize("leaf", ["anchors", "contrasts", "contrast_bias", "logit_scale"])
def test_one_gradient_alone(leaf) -> None:
    check(problem(torch.bfloat16, n=9, m=14, bias=True, both=True), (leaf,))
    if leaf != "contrasts":
        check(problem(torch.float32, n=9, bias=leaf != "anchors"), (leaf,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [10.0, 150.0])
@pytest.mark.parametrize("positives", ["none", "some", "ids"])
def test_contrasts_without_gradient(dtype, scale, positives) -> None:
    """The forward computes the anchors' gradient, except for blocks of rows that have positives."""
    p = problem(dtype, n=140, m=75, d=20, scales=(scale,), ids=positives == "ids")
    arguments = p.arguments()
    if positives == "none":
        del arguments["anchor_clusters"], arguments["contrast_clusters"]
    else:
        arguments["contrast_clusters"][arguments["contrast_clusters"] > 40] = -1
    check_stats(arguments, ("anchors",), backends=("cuda",))


@pytest.mark.parametrize("d", [20, 170, 300])
def test_one_pass_and_two_agree(d, monkeypatch) -> None:
    p = problem(torch.float32, n=20, m=75, d=d, scales=(20.0,))

    def gradient() -> Tensor:
        with fastcl.use_backend("cuda"):
            return differentiate(library_stats, p.arguments(), ["anchors"], objective)[1]["anchors"]

    one = gradient()
    monkeypatch.setattr(cuda_rows, "sums_are_kept", lambda p: False)
    two = gradient()
    assert not torch.equal(one, two)
    assert (one - two).norm() < 1e-5 * two.norm()


def test_float32_sums_do_not_drift() -> None:
    """Tensor cores truncate when they add: long sums would lose more than float32's rounding."""
    g = generator(0)
    x = torch.rand(1, 3000, generator=g)
    with fastcl.use_backend("cuda"):
        logit = fastcl.contrastive_stats(x, x + 1, want=("lse_all",)).lse_all
    expected = (x.double() * (x + 1).double()).sum()
    assert abs(logit.double() - expected) <= 2e-7 * expected
    weights = torch.ones(4000, 1)
    z = torch.zeros(1, 1, requires_grad=True)
    with fastcl.use_backend("cuda"):
        fastcl.contrastive_stats(z, weights / 3, want=("lse_all",)).lse_all.sum().backward()
    assert abs(z.grad.item() * 3 - 1) <= 2e-6


@pytest.mark.parametrize("size", [1e-7, 3e3])
def test_float16_beside_a_row_of_another_size(size) -> None:
    """Its inverse norm, and products with it, may not push other rows' numbers out of float16's range."""
    x = torch.randn(80, 32, generator=generator(0))
    x[3] *= size
    gradients = []
    for backend in ("cuda", "reference"):
        z = x.half().requires_grad_()
        with fastcl.use_backend(backend):
            fastcl.functional.cluster_infonce(z, torch.arange(80) // 2).backward()
        gradients.append(z.grad.double()[torch.arange(80) != 3])
    got, expected = gradients
    assert (got - expected).norm() <= 2**-11 * expected.norm()


def test_float32_products_obey_torchs_precision() -> None:
    def value() -> Tensor:
        z = torch.randn(40, 64, generator=generator(0))
        with fastcl.use_backend("cuda"):
            return fastcl.contrastive_stats(z, want=("lse_all",), logit_scale=0.1).lse_all

    before = torch.get_float32_matmul_precision()
    full = value()
    try:
        torch.set_float32_matmul_precision("high")
        rough = value()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(full, rough)
    torch.testing.assert_close(rough, full, rtol=0, atol=2e-2)


# What results depend on


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_the_exchanged_sets_to_the_bit(dtype) -> None:
    """The forward's sums over columns must belong to the same logits as the backward's weights."""
    g = generator(0)
    x, y = torch.randn(50, 70, generator=g).to(dtype), torch.randn(1, 70, generator=g).to(dtype)
    arguments: dict[str, Any] = {"logit_scale": 30.0, "normalize_anchors": True, "normalize_contrasts": True}
    with fastcl.use_backend("cuda"):
        of_rows = fastcl.contrastive_stats(x, y, want=("lse_all",), **arguments).lse_all
        exchanged = fastcl.contrastive_stats(y, x, want=("lse_all",), both=True, **arguments).reverse
    assert exchanged is not None
    assert torch.equal(of_rows, exchanged.lse_all)


ORDERS = """
import sys, torch
from tests.ops.contrastive.test_direct import case
from tests.support.emulated import emulating
from tests.support.oracle import differentiate
from tests.ops.contrastive.test_cuda import DTYPES, FIELDS, problem
from tests.support.stats_checks import library_stats, objective
import fastcl
with emulating(), fastcl.use_backend("cuda"):
    two, queue = {"m": 30, "both": True}, {"m": 30, "pattern": None, "scale_tensor": False}
    for dtype in DTYPES[:2]:
        for changes in ({"pattern": "random", "n": 130}, two, two | {"scales": (300.0,)}, {"d": 300}, queue):
            p = problem(dtype, **({"n": 40} | changes))
            leaves = ["anchors"] if changes == queue else p.leaves
            for part in differentiate(library_stats, p.arguments(), leaves, objective):
                for value in part.values():
                    print([x.hex() for x in value.detach().double().flatten().tolist()])
"""


def test_the_order_of_threads_does_not_matter() -> None:
    """If a barrier were missing, it would."""
    module()  # built once, here
    said = set()
    for order in ("forward", "backward", "5"):
        environment = os.environ | {"FASTCL_EMULATOR_ORDER": order, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", ORDERS], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.add(done.stdout)
    assert len(said) == 1
    assert len(said.pop()) > 10_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_from_run_to_run(dtype) -> None:
    p = problem(dtype, **TWO_SETS)
    with fastcl.use_backend("cuda"):
        first, second = (differentiate(library_stats, p.arguments(), p.leaves, objective) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("scale", [5.0, 10.0])
def test_one_exponential_and_two_agree(scale, monkeypatch) -> None:
    def gradient() -> Tensor:
        g = generator(0)
        z = torch.randn(70, 24, generator=g).requires_grad_()
        with fastcl.use_backend("cuda"):
            s = fastcl.contrastive_stats(
                z, anchor_clusters=cluster_ids("random", 70, g), logit_scale=scale, normalize_anchors=True, want=FIELDS
            )
            fields = [torch.where(f.isfinite(), f, 0) for f in (s.lse_all, s.lse_neg, s.sum_pos)]
            sum((f * torch.linspace(-1, 1, 70)).sum() for f in fields).backward()
        return z.grad

    one = gradient()
    monkeypatch.setattr(contrastive_cuda, "ONE_EXPONENTIAL", -1e9)
    two = gradient()
    assert not torch.equal(one, two)
    assert (one - two).norm() < 1e-5 * two.norm()


def test_nothing_is_left_unwritten(monkeypatch) -> None:
    """Every number of memory that is allocated empty and returned has been written."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(10**6))

    p = problem(torch.bfloat16, n=40, m=30, both=True, ids=True, bias=True).arguments()
    with fastcl.use_backend("cuda"):
        expected = differentiate(library_stats, p, ["anchors", "contrasts"], objective)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
        monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
        got = differentiate(library_stats, p, ["anchors", "contrasts"], objective)
    for one, other in zip(got, expected, strict=True):
        for name, value in other.items():
            assert torch.equal(one[name], value), name


def test_no_values_are_looked_at_on_the_host(monkeypatch) -> None:
    """Each read would make the host wait for a device, and break the capture of a CUDA graph."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked at a value")

    a = problem(torch.float32, n=40, m=30, both=True, ids=True, bias=True).arguments()
    anchors = Rows(a["anchors"], a["anchor_clusters"], a["anchor_ids"], normalize=True)
    contrasts = Rows(a["contrasts"], a["contrast_clusters"], a["contrast_ids"], a["contrast_bias"], normalize=True)
    p = op.Problem(anchors, contrasts, None, a["logit_scale"].reshape(1), FIELDS, both=True)
    for name in ("item", "__bool__", "__int__", "__float__", "tolist", "nonzero", "unique", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    statistics = contrastive_cuda.forward(p)
    grad, other = (torch.ones_like(side.fields) for side in (statistics.anchors, statistics.contrasts))
    gradients = contrastive_cuda.backward(p, statistics, grad, other, op.Needs(True, True, True, True, False))
    monkeypatch.undo()
    assert all(gradient.isfinite().all() for gradient in gradients[:4])


# Without the emulator


def test_rows_by_cluster_and_names() -> None:
    """Every row's range holds its positives, and both ends increase."""
    g = generator(0)
    own, other = torch.randint(-1, 6, (40,), generator=g), torch.randint(-1, 9, (50,), generator=g)
    x, y = rows("random", own, 3, g, unit=True).float(), rows("random", other, 3, g, unit=True).float()
    p = op.Problem(Rows(x, own, own), Rows(y, other, other), None, torch.ones(1), FIELDS, both=True)
    parts = cuda_rows.KEPT.parts(p, torch.full((cuda_rows.KEPT.size(p),), torch.nan))
    cuda_rows.find_clusters(p, parts)
    cuda_rows.find_names(p, parts)
    equal = (own[:, None] == other) & (own != -1)[:, None]
    for prefix, columns, pairs in (("", "contrast_", equal), ("contrast_", "", equal.T)):
        order, columns_order = parts[prefix + "order"], parts[columns + "order"]
        start, end = parts[prefix + "range"]
        place = torch.arange(pairs.shape[1])
        assert torch.equal((start[:, None] <= place) & (place < end[:, None]), pairs[order][:, columns_order])
        assert (start.diff() >= 0).all()
        assert (end.diff() >= 0).all()
    names, others = parts["names"], parts["contrast_names"]
    assert torch.equal((names[:, None] == others) & (names != 0)[:, None], equal)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_arithmetic_of_tiles(tmp_path) -> None:
    """Which block visits what, and where numbers lie: csrc/tests/cuda_tiles_test.cpp."""
    source, program = ROOT / "csrc" / "tests" / "cuda_tiles_test.cpp", tmp_path / "tiles"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
    built = subprocess.run(["c++", *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is for x86-64")
def test_float32_numbers_are_split_into_tf32_numbers(tmp_path) -> None:
    """The nearest one and the exact rest, and a NaN stays a NaN: csrc/tests/cuda_split_test.cpp."""
    tests, program = ROOT / "csrc" / "tests", tmp_path / "split"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-I", ROOT / "csrc", "-include", tests / "emulator.h")
    command = ["c++", *map(str, flags), str(tests / "cuda_split_test.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


# Tapes


@pytest.mark.parametrize("kind", ["self", "views", "symmetric", "momentum key", "bias", "ids"])
def test_replays_give_the_same_bits(kind: str, monkeypatch) -> None:
    """Addresses in the descriptions of calls are found, and other ones take their place."""
    leaves, options = case(kind, torch.float32)
    forward, backward = Taped(replayed._forward, own=1), Taped(replayed._backward, own=5)
    monkeypatch.setattr(replayed, "FORWARD", forward)
    monkeypatch.setattr(replayed, "BACKWARD", backward)
    monkeypatch.setattr(direct, "values_visible", lambda tensor: False)  # as on a GPU

    def results() -> list[Tensor]:
        loss = fastcl.functional.cluster_infonce(leaves[0], **options)
        return [loss.detach(), *torch.autograd.grad(loss * -3.5, leaves)]

    with fastcl.use_backend("cuda"):
        for call in range(5):
            with torch.no_grad():
                for leaf in leaves:
                    leaf.add_(0.1 * torch.randn_like(leaf)) if leaf.dim() else leaf.mul_(1.1)
            monkeypatch.setattr(direct, "TAPED", "cpu")
            got = results()
            monkeypatch.setattr(direct, "TAPED", "none")
            for a, b in zip(got, results(), strict=True):
                assert torch.equal(a, b), call
    for taped in (forward, backward):
        assert [isinstance(tape, Tape) for tape in taped._tapes.values()] == [True]
