"""Rules about pairs with rows shared out over three gloo processes, one of them without rows."""

from functools import cache
from typing import Any

import pytest
import torch

from tests.support.distributed_cases import spread
from tests.support.distributed_rules import MODES, SAMPLES, called, everything, whole


@cache
def found() -> list[dict[str, Any]]:
    results, errors = spread(everything, len(SAMPLES))
    assert not errors, errors
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(whole()))
def test_the_loss_is_that_of_one_process(name: str, mode: Any) -> None:
    expected = called(*whole()[name], False, slice(None))
    parts = [result[f"{name}, {mode}"] for result in found()]
    for key, truth in expected.items():
        each = [part[key] for part in parts]
        got = torch.stack(each).mean() if key == "loss" else torch.cat(each) / len(parts)
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
