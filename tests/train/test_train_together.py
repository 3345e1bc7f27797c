"""Methods of the trainer in several processes, which share each batch unevenly."""

from typing import Any

import pytest
import torch
from torch import distributed as dist

from fastcl.train.processes import Processes
from tests.support.distributed_cases import spread
from tests.support.training_processes import CASES, everything, stepped

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    found, errors = spread(everything, 2)
    assert not errors, errors
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_numbers_of_one(together: list[dict[str, Any]], name: str) -> None:
    alone = stepped(*CASES[name], Processes())
    for found in together:
        assert found[name]["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-6)
        for key, value in alone["state"].items():
            torch.testing.assert_close(found[name]["state"][key], value, rtol=1e-3, atol=1e-4, equal_nan=True)
