"""The tests on a GPU as far as they go without one: their bodies on CPU tensors, their names, their tiers.

Tests of streams, graphs and memory have nothing to run on here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from tests.backends import test_cuda_gpu, test_gpu
from tests.losses import test_cluster_assignments_gpu
from tests.ops.sinkhorn import test_sinkhorn_gpu
from tests.support.backends import needs_interpreter
from tests.support.emulated import emulating
from tests.support.smoke import marked

ROOT = Path(__file__).parents[2]
FILES = tuple(str(Path(module.__file__)) for module in (test_gpu, test_sinkhorn_gpu, test_cluster_assignments_gpu))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run on the CUDA device")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (test_gpu, test_sinkhorn_gpu, test_cluster_assignments_gpu):
        monkeypatch.setattr(module, "DEVICE", "cpu")


COLLECT = """
import sys, pytest
class Plugin:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("smoke" if item.get_closest_marker("smoke") else "later", item.nodeid)
options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "gpu"]
sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[Plugin()]))
"""


def test_names_are_readable_and_the_smoke_tier_is_small_and_has_every_backend() -> None:
    command = [sys.executable, "-c", COLLECT, *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    tiers = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("smoke ", "later "))]
    names, smoke = [name for _, name in tiers], [name for tier, name in tiers if tier == "smoke"]
    assert not [name for name in names if re.search(r"dtype\d|options\d|None", name)]
    assert len(set(names)) == len(names) > 200
    assert 20 < len(smoke) < 60
    for backend in ("triton", "cuda"):
        for what in ("error_rule", "waits", "graph", "topk", "test_sinkhorn_gpu"):
            assert any(what in name and f"[{backend}" in name for name in smoke), (backend, what)


def test_a_name_of_the_smoke_tier_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no parameter is called 'b'"):
        marked([pytest.param(1, id="a")], ["a", "b"])


def test_few_calls_are_compiled_in_several_dtypes() -> None:
    """By Triton, which takes seconds for each variant of its kernels."""
    asked = [parameter.values for parameter in test_gpu.RULE]
    compiled = [(call, dtype) for name, call, dtype in asked if name == "triton" and dtype != torch.float64]
    assert {call for call, dtype in compiled if dtype == torch.bfloat16} == set(test_gpu.CALLS)
    assert {dtype for _, dtype in compiled} == {torch.bfloat16, torch.float32, torch.float16}
    assert len(compiled) < 30
    others = [(call, dtype) for name, call, dtype in asked if name == "cuda" and dtype != torch.float64]
    assert len(others) == 3 * len(test_gpu.CALLS)


@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("two_sets", [False, True], ids=["self", "two sets"])
def test_gradients(kind, two_sets) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        with fastcl.use_backend("chunked"):
            test_gpu.test_gradients_are_those_of_float64_on_the_cpu(kind, two_sets, dtype, "chunked")


@pytest.mark.parametrize("call", test_gpu.CALLS)
def test_the_error_rule(call) -> None:
    with fastcl.use_backend("chunked"):
        test_gpu.judge_by_the_error_rule(test_gpu.CALLS[call], torch.bfloat16)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "dtype"), [("queue with positives", torch.float32), ("self-contrast", torch.bfloat16)], ids=str
)
def test_the_error_rule_interpreted(call, dtype) -> None:
    with fastcl.use_backend("triton"):
        test_gpu.judge_by_the_error_rule(test_gpu.CALLS[call], dtype)


def test_a_wrong_result_breaks_the_rule(monkeypatch) -> None:
    call, right = test_gpu.CALLS["two sets"], fastcl.contrastive_stats
    monkeypatch.setattr(fastcl, "contrastive_stats", lambda **a: right(**a | {"logit_scale": a["logit_scale"] * 1.001}))
    with fastcl.use_backend("chunked"), pytest.raises(AssertionError, match="lse_all: error"):
        test_gpu.judge_by_the_error_rule(call, torch.float32)


def test_searches_temperatures_and_stores() -> None:
    with fastcl.use_backend("chunked"):
        for parameter in test_gpu.SEARCHES[:4]:
            test_gpu.test_topk_is_exact_with_ties("chunked", *parameter.values)
        test_gpu.test_a_temperature_on_the_cpu_learns_from_rows_on_the_device("chunked")
        test_gpu.test_queue_and_bank_on_the_device("chunked")


@pytest.mark.parametrize("place", [0, 5])
def test_sinkhorn(place) -> None:
    n, k, tol, dtype = test_sinkhorn_gpu.PROBLEMS[place].values
    with fastcl.use_backend("chunked"):
        test_sinkhorn_gpu.test_values_and_gradients_are_those_of_float64_on_the_cpu("chunked", n, k, tol, dtype)


@pytest.mark.parametrize("call", test_cluster_assignments_gpu.CALLS)
def test_assignments(call) -> None:
    with fastcl.use_backend("chunked"):
        test_cluster_assignments_gpu.test_obeys_the_formula(call, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["STATISTICS", "SINKHORN_AND_TOPK"])
def test_programs_for_the_sanitizer_run_in_the_emulator(program, capsys) -> None:
    text = getattr(test_cuda_gpu, program)
    on_the_host = text.replace('device = "cuda"', 'device = "cpu"')
    assert on_the_host != text
    with emulating():
        exec(on_the_host, {})
    assert capsys.readouterr().out == "done\n"
