"""Backend `triton`: availability, which calls it takes, what its results depend on. Numbers: `test_stats.py`."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.ops.backends import choose, triton_launch, triton_tiles, triton_tuning
from fastcl.ops.contrastive import op
from fastcl.ops.contrastive.records import Rows
from fastcl.ops.contrastive.triton import gradient as triton_gradient
from fastcl.ops.contrastive.triton import rows as triton_rows
from fastcl.ops.contrastive.triton import statistics as triton_statistics
from tests.support.stats_checks import check_stats, simple_problem
from tests.support.strategies import FIELDS, cluster_ids, generator, rows

interpreted = pytest.mark.skipif(
    "triton" not in choose.AVAILABLE or not triton_launch.INTERPRETED, reason="Triton is not interpreted here"
)


# Availability


@pytest.mark.parametrize(
    ("version", "there"), [("3.1.0", False), ("3.2.0", True), ("3.10.0+git1", True), ("4.0", True)]
)
def test_the_floor_of_the_version(version, there, monkeypatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    monkeypatch.setattr(triton_launch.util, "find_spec", lambda name: object())
    found, reason = triton_launch.availability.__wrapped__()
    assert found == there
    assert reason.startswith(f"Triton {version} (at least 3.2)" if there else f"Triton {version} is older than 3.2")


def test_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(triton_launch.util, "find_spec", lambda name: None)
    assert triton_launch.availability.__wrapped__() == (False, "Triton is not installed")


def run_python(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTCL_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fastcl_does_not_import_triton() -> None:
    code = "import sys, torch, fastcl; fastcl.contrastive_stats(torch.ones(2, 2)); print('triton' in sys.modules)"
    for environment in ({}, {"TRITON_INTERPRET": "1"}):
        assert run_python(code, **environment).strip() == "False"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_without_cuda_and_interpreter_it_is_missing() -> None:
    code = """
import torch, fastcl
from fastcl.info import report
print(report())
try:
    with fastcl.use_backend("triton"):
        fastcl.contrastive_stats(torch.ones(2, 2))
except ValueError as error:
    print(error)
"""
    said = run_python(code)
    reason = triton_launch.availability.__wrapped__()[1] if "triton" not in choose.AVAILABLE else "built without CUDA"
    assert said.count(reason) >= 2
    assert "got 'triton', which is" in said


@interpreted
def test_tensors_on_the_cpu_only_when_asked() -> None:
    assert choose.choose_backend(torch.device("cpu"), torch.float32) != "triton"
    with fastcl.use_backend("triton"):
        assert choose.choose_backend(torch.device("cpu"), torch.float32) == "triton"


def test_whom_it_serves(monkeypatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setitem(choose.AVAILABLE, "triton", "here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    assert choose.choose_backend(gpu, torch.float32) == "triton"
    assert choose.choose_backend(gpu, torch.float64) == "chunked"
    with fastcl.use_backend("triton"), pytest.raises(ValueError, match="'triton' takes tensors on a CUDA device, got"):
        choose.choose_backend(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose.choose_backend(gpu, torch.float32) == "chunked"
    with fastcl.use_backend("triton"), pytest.raises(ValueError, match=r"needs a device of compute capability 8.0"):
        choose.choose_backend(gpu, torch.float32)


# What results depend on


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The kernel launches from now on."""
    seen: list[tuple[str, dict[str, Any]]] = []
    launch = triton_launch.launch

    def watched(name: str, shape: Any, grid: Any, given: dict[str, Any]) -> None:
        seen.append((name, given))
        launch(name, shape, grid, given)

    monkeypatch.setattr(triton_launch, "launch", watched)
    return seen


@interpreted
@pytest.mark.parametrize(
    ("scale", "redone", "exponentials"),
    [(10.0, False, 1), (100.0, False, 2), (300.0, True, 2)],
)
def test_which_kernels_do_the_work(scale, redone, exponentials, monkeypatch) -> None:
    """One shift, also at temperature 0.01, else running maxima; one exponential if log-sums are close, else two."""
    seen = launched(monkeypatch)
    g = generator(0)
    clusters = torch.arange(130) // 2
    z = rows("converged", clusters, 16, g, unit=True).float().requires_grad_()
    if redone:
        with torch.no_grad():
            z[:65] *= -1  # some rows far from all others, some close to similar ones
            z[7] = 0
    with fastcl.use_backend("triton"):
        s = fastcl.contrastive_stats(
            z, anchor_clusters=clusters, logit_scale=scale, normalize_anchors=True, want=("lse_all", "sum_pos")
        )
        s.lse_all.sum().backward()
    bases = [given["STATISTICS"][0] for name, given in seen if name == "running_kernel"]
    assert [len(base.unique()) > 1 for base in bases] == [redone]
    one = {int(given["ONE"]) for name, given in seen if name == "gradient_kernel"}
    assert one == {2 - exponentials}


@interpreted
def test_rows_whose_sums_are_tiny_are_done_again(monkeypatch) -> None:
    """At temperature 0.01, rows that point away from all others: with one shift for all, their sums are tiny."""
    problem = simple_problem(n=70, m=80, d=8, bias=False, ids=False, both=True, scales=(100.0,))
    arguments = problem.arguments()
    arguments["contrasts"][:, 0] = arguments["contrasts"][:, 0].abs() + 5
    arguments["anchors"][3] = 0
    arguments["anchors"][3, 0] = -1
    seen = launched(monkeypatch)
    check_stats(arguments, problem.leaves, backends=("triton",))
    again = [given for name, given in seen if name == "running_kernel"]
    swept = [given for name, given in seen if name == "two_way_kernel"]
    assert (swept[0]["PARTIAL_SUMS"] > 0).any()  # with one shift for all
    assert len(again[0]["STATISTICS"][0].unique()) > 1  # its row block has its own maxima


@interpreted
@pytest.mark.parametrize("scale", [5.0, 10.0])
def test_one_exponential_and_two_agree(scale, monkeypatch) -> None:
    def gradient() -> Tensor:
        g = generator(0)
        z = torch.randn(100, 24, generator=g).requires_grad_()
        with fastcl.use_backend("triton"):
            s = fastcl.contrastive_stats(
                z, anchor_clusters=cluster_ids("random", 100, g), logit_scale=scale, normalize_anchors=True, want=FIELDS
            )
            fields = [torch.where(f.isfinite(), f, 0) for f in (s.lse_all, s.lse_neg, s.sum_pos)]
            sum((f * torch.linspace(-1, 1, 100)).sum() for f in fields).backward()
        return z.grad

    one = gradient()
    monkeypatch.setattr(triton_gradient, "ONE_EXPONENTIAL", -1e9)
    two = gradient()
    assert not torch.equal(one, two)
    assert (one - two).norm() < 1e-5 * two.norm()


@pytest.mark.parametrize(
    ("architecture", "masked", "expected"),
    [(80, False, "tf32x3"), (80, True, "ieee"), (86, False, "ieee"), (89, False, "ieee"), (90, True, "tf32x3")],
)
def test_where_float32_is_multiplied_on_tensor_cores(architecture, masked, expected) -> None:
    assert triton_launch.fast_precision_of(torch.float32, architecture, masked) == expected
    assert triton_launch.fast_precision_of(torch.bfloat16, architecture, masked) == "ieee"


@interpreted
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_obey_torchs_precision(precision) -> None:
    def value() -> Tensor:
        z = torch.randn(40, 64, generator=generator(0))
        with fastcl.use_backend("triton"):
            return fastcl.contrastive_stats(z, want=("lse_all",), logit_scale=0.1).lse_all

    before = torch.get_float32_matmul_precision()
    exact = value()
    try:
        torch.set_float32_matmul_precision(precision)
        rough = value()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, rtol=0, atol=2e-2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 2, 17, 128, 129, 300])
def test_any_dimension(d, dtype) -> None:
    """Whole and streamed rows, with and without padding."""
    problem = simple_problem(n=37, m=70, d=d, dtype=dtype, contrast_dtype=dtype, bias=False, ids=False)
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))


@interpreted
def test_rows_of_4096_numbers() -> None:
    problem = simple_problem(n=5, m=6, d=4096, dtype=torch.bfloat16, contrast_dtype=torch.bfloat16)
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))


@interpreted
def test_no_values_are_looked_at_on_the_host(monkeypatch) -> None:
    """Each read would make the host wait for a device, and break the capture of a CUDA graph."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked at a value")

    launch = triton_launch.launch

    def allowed(*args: Any) -> None:  # the interpreter itself may read
        with monkeypatch.context() as inside:
            for name, method in originals.items():
                inside.setattr(Tensor, name, method)
            launch(*args)

    problem = simple_problem(n=70, m=40)
    arguments = {k: v.requires_grad_() if k in problem.leaves else v for k, v in problem.arguments().items()}
    names = ("item", "__bool__", "__int__", "__float__", "tolist", "nonzero", "unique", "cpu")
    originals = {name: getattr(Tensor, name) for name in names}
    monkeypatch.setattr(triton_launch, "launch", allowed)
    with fastcl.use_backend("triton"):
        a = {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        p = op.Problem(
            Rows(a["anchors"], a["anchor_clusters"], a["anchor_ids"], normalize=True),
            Rows(a["contrasts"], a["contrast_clusters"], a["contrast_ids"], a["contrast_bias"], normalize=True),
            None,
            a["logit_scale"].reshape(1),
            FIELDS,
            both=True,
        )
        for name in names:
            monkeypatch.setattr(Tensor, name, refuse)
        statistics = triton_statistics.forward(p)
        grad, other = (torch.ones_like(side.fields) for side in (statistics.anchors, statistics.contrasts))
        gradients = triton_gradient.backward(p, statistics, grad, other, op.Needs(True, True, True, True, False))
    monkeypatch.undo()
    assert all(gradient.isfinite().all() for gradient in gradients[:4])


@interpreted
@pytest.mark.parametrize("pattern", ["negatives", "random", None])
@pytest.mark.parametrize("normalize", [False, True])
def test_self_contrast_with_a_bias(pattern, normalize) -> None:
    """The rows are also the second set, and the gradients of both are added row by row."""
    problem = simple_problem(
        n=20, m=None, pattern=pattern, bias=True, normalize_anchors=normalize, normalize_contrasts=normalize
    )
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))


@interpreted
@pytest.mark.parametrize("size", [1e-7, 1e-5, 3e3])
@pytest.mark.parametrize("queue", [False, True])
def test_float16_beside_a_row_of_another_size(size, queue) -> None:
    """Its inverse norm, and products with it, may not push other rows' numbers out of float16's range."""
    torch.manual_seed(0)
    rows, others = torch.randn(80, 32), torch.randn(90, 32)
    rows[3] *= size
    others[5] *= size
    gradients = []
    for backend in ("triton", "reference"):
        x = rows.half().requires_grad_()
        with fastcl.use_backend(backend):
            if queue:
                normalize = {"normalize_anchors": True, "normalize_contrasts": True, "logit_scale": 10.0}
                fastcl.contrastive_stats(x, others.half(), want=("lse_all",), **normalize).lse_all.sum().backward()
            else:
                fastcl.functional.cluster_infonce(x, torch.arange(80) // 2).backward()
        assert x.grad is not None
        gradients.append(x.grad.double()[torch.arange(80) != 3])
    got, expected = gradients
    assert (got - expected).norm() <= 2**-11 * expected.norm()


@interpreted
def test_either_setting_of_precision() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one setting only")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, precision in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert triton_rows.precision_of(torch.float32) == precision
            assert triton_rows.precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# Timed tiles


@pytest.fixture
def timed(monkeypatch, tmp_path) -> tuple[Path, list[tuple[str, triton_tiles.Tile]]]:
    """Tunes into a file, with a clock that prefers few columns and stages that fail to compile; yields the launches."""
    from triton.runtime.errors import OutOfResources

    launched: list[tuple[str, triton_tiles.Tile]] = []
    launch = triton_launch.launch

    def watched(name: str, shape: triton_tiles.Tile, grid: Any, given: dict[str, Any]) -> None:
        launched.append((name, shape))
        launch(name, shape, grid, given)

    def seconds(trial: Any) -> float:
        trial()
        if launched[-1][1].stages > 1:
            raise OutOfResources(2, 1, "shared memory")
        return float(launched[-1][1].block_n)

    path = tmp_path / "tiles.json"
    monkeypatch.setenv(triton_tuning.VARIABLE, str(path))
    monkeypatch.setattr(triton_tuning, "FEWEST", 60 * 60)
    monkeypatch.setattr(triton_tuning, "_found", {})
    monkeypatch.setattr(triton_tuning, "seconds", seconds)
    monkeypatch.setattr(triton_launch, "launch", watched)
    return path, launched


@interpreted
@pytest.mark.parametrize("both", [False, True])
def test_tiles_by_time(both, timed, monkeypatch) -> None:
    """Tuning gives right results. Its choice is used from then on, also by smaller calls, and is read from the file."""
    path, launched = timed
    sweeps = {"two_way_kernel" if both else "weighted_kernel", "gradient_kernel"}

    def tiles(n: int) -> dict[str, set[triton_tiles.Tile]]:
        launched.clear()
        problem = simple_problem(n=n, m=60, d=8, ids=False, bias=False, both=both, scale_tensor=False)
        leaves = ("anchors", "contrasts") if both else ("anchors",)
        check_stats(problem.arguments(), leaves, backends=("triton",))
        return {kernel: {shape for name, shape in launched if name == kernel} for kernel in sweeps}

    before = tiles(50)
    assert all(len(shapes) == 1 for shapes in before.values())
    assert not path.exists()
    assert all(len(shapes) > 3 for shapes in tiles(70).values())
    written = path.read_text()
    for _ in range(2):
        after = tiles(50)
        for kernel, (shape,) in before.items():
            assert after[kernel] == {shape._replace(block_n=shape.block_n // 2)}
        monkeypatch.setattr(triton_tuning, "_found", {})  # as in another process
    assert path.read_text() == written


@interpreted
def test_errors_that_are_not_about_tiles_are_not_hidden(timed, monkeypatch) -> None:
    def broken(trial: Any) -> float:
        raise RuntimeError("no such device")

    monkeypatch.setattr(triton_tuning, "seconds", broken)
    with fastcl.use_backend("triton"), pytest.raises(RuntimeError, match="no such device"):
        fastcl.contrastive_stats(torch.randn(70, 8))


@pytest.mark.parametrize("setting", ["yes", "tiles.txt"])
def test_settings_of_tuning(setting, monkeypatch) -> None:
    monkeypatch.setenv(triton_tuning.VARIABLE, setting)
    with pytest.raises(ValueError, match=f"FASTCL_TRITON_AUTOTUNE: expected 0, 1 or the name of a file .* '{setting}'"):
        triton_tuning.mode()


@pytest.mark.parametrize("content", ["", "[]", '{"backward": [1, 2]}', '{"backward": 3}'])
def test_a_file_that_holds_no_tiles(content, tmp_path, monkeypatch) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    monkeypatch.setenv(triton_tuning.VARIABLE, str(path))
    with pytest.raises(ValueError, match="FASTCL_TRITON_AUTOTUNE: expected tiles that fastcl has written"):
        triton_tuning.choose("backward", triton_tiles.Tile(64, 64, 32, 32, 4, 1), 1)


def test_without_being_asked_nothing_is_timed(monkeypatch) -> None:
    table = triton_tiles.Tile(64, 64, 32, 32, 4, 1)
    for setting in ("", "0"):
        monkeypatch.setenv(triton_tuning.VARIABLE, setting)
        assert triton_tuning.choose("backward", table, 1 << 40, lambda tile: pytest.fail("launched")) == table


def test_neighbours_round_logits_as_the_table_does() -> None:
    for shape in (triton_tiles.Tile(128, 64, 64, 128, 8, 2), triton_tiles.Tile(64, 32, 32, 32, 4, 1)):
        tried = triton_tiles.neighbours(shape)
        assert len(tried) == len(set(tried)) >= 4
        assert shape not in tried
        assert all((tile.block_k, tile.block_d) == (shape.block_k, shape.block_d) for tile in tried)
        assert all(tile.block_m >= 64 and tile.stages >= 1 for tile in tried)
