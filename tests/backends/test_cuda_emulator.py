"""Backend ``cuda`` on the emulator: what it finds, and when it is chosen."""

import math
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastcl
from fastcl.ops.backends import choose, cuda_runtime
from fastcl.ops.contrastive import chunked
from tests.support.emulated import emulating


@pytest.fixture(autouse=True)
def emulated() -> None:
    with emulating():
        yield


def test_is_taken_by_name_only() -> None:
    assert choose.choose_backend(torch.device("cpu"), torch.float32) != "cuda"
    with fastcl.use_backend("cuda"):
        assert choose.choose_backend(torch.device("cpu"), torch.float32) == "cuda"
        with pytest.raises(ValueError, match="'cuda' is emulated and takes tensors on the CPU, got tensors on meta"):
            choose.choose_backend(torch.device("meta"), torch.float32)
    assert not cuda_runtime.MEASURED_FASTER


def test_soft_assignments_are_an_error_by_name(monkeypatch) -> None:
    """They are never computed by another backend without a word."""
    z, assignments = torch.randn(6, 4), torch.rand(6, 3)
    with (
        fastcl.use_backend("cuda"),
        pytest.raises(
            ValueError, match=r"use_backend: expected one of .*'chunked' for soft assignments, which 'cuda' lacks"
        ),
    ):
        fastcl.functional.cluster_infonce(z, assignments=assignments)
    monkeypatch.setattr(choose, "_fastest", lambda *_: "cuda")  # by default, another backend
    with mock.patch.dict(choose.AVAILABLE):
        choose.AVAILABLE.pop("triton", None)
        assert choose.choose_backend(torch.device("cpu"), torch.float32, "soft_assignments") == "chunked"
        assert choose.choose_backend(torch.device("cpu"), torch.float32) == "cuda"


def test_return_stats_takes_the_sweep_that_is_documented(monkeypatch) -> None:
    swept = []
    forward = chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda p: swept.append(p.want) or forward(p))
    with fastcl.use_backend("cuda"):
        fastcl.ClusterInfoNCE()(torch.randn(6, 2, 4))
        assert swept == []
        fastcl.ClusterInfoNCE()(torch.randn(6, 2, 4), return_stats=True)
    assert swept == [()]
    assert choose.SECOND_SWEEP["cuda"] == "chunked"


# What the emulator finds


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    sources = Path(__file__).parents[2] / "csrc" / "tests"
    command = ["c++", "-std=c++17", "-O1", "-include", sources / "emulator.h", sources / "emulator_test.cpp"]
    done = subprocess.run([*map(str, command), "-o", folder / "program"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def ran(program: Path, case: str, order: str = "forward") -> tuple[int, list[float], str]:
    environment = os.environ | {"FASTCL_EMULATOR_ORDER": order}
    done = subprocess.run([program, case], env=environment, capture_output=True, text=True)
    return done.returncode, [float(word) for word in done.stdout.split()], done.stderr


@pytest.mark.parametrize("order", ["forward", "backward", "5"])
def test_barriers_and_exchanges(program, order) -> None:
    assert ran(program, "neighbours", order)[1] == [*map(float, range(1, 64)), 0.0]
    first, second = sum(range(32)) + 11, sum(range(32, 64)) + 11
    assert ran(program, "warp_sums", order)[1] == [float(first)] * 32 + [float(second)] * 32
    assert ran(program, "parts", order)[1] == [2.0] * 64
    assert ran(program, "grid", order)[1] == [7.0] * 64


def test_a_missing_barrier_shows(program) -> None:
    """A thread that reads too early reads the initial content of shared memory."""
    for order in ("forward", "backward"):
        assert any(map(math.isnan, ran(program, "no_barrier", order)[1]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("diverging", "kernel diverging: a barrier that not all threads reach"),
        ("unequal_lanes", "lanes of a warp exchange different things"),
        ("outside", ""),
    ],
)
def test_errors_end_the_process(program, case, message) -> None:
    code, _, said = ran(program, case)
    assert code < 0  # killed by a signal
    assert message in said
