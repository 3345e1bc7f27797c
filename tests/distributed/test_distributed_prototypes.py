"""DINO, iBOT and CAPI with rows shared out over one to three gloo processes: those of one process with all rows."""

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.distributed_cases import spread
from tests.support.distributed_prototypes import CASES, SAMPLES, everything, run


@cache
def found(world: int) -> list[dict[str, Any]]:
    results, errors = spread(everything, world)
    assert not errors, errors
    return results


@pytest.mark.parametrize("world", SAMPLES)
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_centres_are_those_of_one_process(name: str, world: int) -> None:
    expected = run(name, slice(None), False, lambda model: model)
    parts = [result[name] for result in found(world)]
    torch.testing.assert_close(torch.stack([part["losses"] for part in parts]).mean(0), expected["losses"])
    for part in parts:
        torch.testing.assert_close(part["prototypes"], expected["prototypes"])
        if "center" in expected:
            torch.testing.assert_close(part["center"], expected["center"])


def test_an_error_of_one_process_reaches_all() -> None:
    own, other = (result["errors"] for result in found(2))
    for name, message in own.items():
        if name == "positions":
            assert message == other[name]
            assert "positions = [4, 3]" in message
        else:
            assert message.split(":")[0] in ("student[1]", "teacher", "prior", "center")
            assert f"error on rank 0: ValueError: {message}"[:80] in other[name]


def test_no_rows_anywhere() -> None:
    assert [result["empty"] for result in found(2)] == [[0.0, 0.0]] * 2
