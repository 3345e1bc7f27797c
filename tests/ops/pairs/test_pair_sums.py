"""Sums over pairs: every backend against the plain formulas in float64."""

from dataclasses import replace

import pytest
import torch

from fastcl.ops.pairs.maps import KINDS
from fastcl.ops.pairs.op import sweep
from fastcl.ops.pairs.records import Needs
from tests.support.pair_sums import check_sweep, problem

KIND_NAMES = tuple(KINDS)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, None, 3), (37, None, 17), (201, None, 5), (13, 29, 8), (70, 210, 33)])
def test_sweep_agrees_with_the_formula(backend, kind, n, m, d):
    if backend == "triton" and n * (m or n) * d > 30_000:
        pytest.skip("takes too long in the interpreter")
    check_sweep(problem(n, m, d, kind), backend)
    check_sweep(problem(n, m, d, kind, normalize=False, seed=1), backend)
