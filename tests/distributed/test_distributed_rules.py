"""Rules about pairs, and `GISTEmbedLoss`, with rows shared out over gloo processes, one of three without rows."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.distributed_cases import spread
from tests.support.distributed_rules import GISTS, MODES, SAMPLES, called, everything, gist, whole


@cache
def found(world: int) -> list[dict[str, Any]]:
    results, errors = spread(everything, world)
    assert not errors, errors
    return results


def agrees(name: str, expected: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> None:
    """Raises AssertionError unless the mean over processes is the loss, and its gradients are those of one process."""
    for key, truth in expected.items():
        each = [part[key] for part in parts]
        got = torch.cat(each) / len(parts) if truth.dim() else torch.stack(each).mean()
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("world", SAMPLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(whole()))
def test_the_loss_is_that_of_one_process(name: str, mode: Any, world: int) -> None:
    expected = called(*whole()[name], False, slice(None))
    agrees(name, expected, [result[f"{name}, {mode}"] for result in found(world)])


@pytest.mark.parametrize("world", SAMPLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GISTS)
def test_gist_embed_loss_is_that_of_one_process(name: str, mode: Any, world: int) -> None:
    agrees(name, gist(name, False, slice(0, None)), [result[f"{name}, {mode}"] for result in found(world)])


@pytest.mark.parametrize("mode", MODES)
def test_calls_that_differ_raise_on_all_processes(mode: Any) -> None:
    messages = [result[f"disagreement, {mode}"] for result in found(3)]
    for queue, margin, negatives, broken in messages:
        assert "rows of the queue (their checksum)" in queue
        assert "got margin = [0.0, 0.1, 0.2], by rank" in margin
        assert "got negatives given = [True, False, False], by rank" in negatives
        assert "guide.contrast_embeddings: expected finite numbers" in broken
