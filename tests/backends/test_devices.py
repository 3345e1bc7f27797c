"""The current CUDA device around a launch, with torch's functions replaced: no device is needed."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastcl.ops.backends import cuda_runtime
from fastcl.ops.backends.devices import on_device


@pytest.fixture
def devices(monkeypatch) -> list[Any]:
    """The devices that are made current; the current one is the last."""
    history: list[Any] = [0]

    @contextmanager
    def device(which: torch.device):
        history.append(which.index)
        yield
        history.append(history[-2])

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(torch.cuda, "current_device", lambda: history[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream())
    return history


def test_only_another_device_is_made_current(devices) -> None:
    for name in ("cpu", "cuda", "cuda:0"):
        with on_device(torch.device(name)):
            pass
        assert devices == [0]
    with on_device(torch.device("cuda:2")):
        assert torch.cuda.current_device() == 2
    assert devices == [0, 2, 0]


def test_the_kernels_run_on_the_rows_device(devices, monkeypatch) -> None:
    """The native module requires that the device is current, because restoring another one may create a context."""
    calls = []

    class Kernels:
        def topk(self, *arguments: Any) -> None:
            calls.append((devices[-1], *arguments))

    monkeypatch.setattr(cuda_runtime, "kernels", Kernels)
    cuda_runtime.run("topk", torch.device("cuda:1"), (1, 2), 3.0)
    cuda_runtime.run("topk", torch.device("cuda:0"), (4,))
    assert calls == [(1, (1, 77), (1, 2), 3.0), (0, (0, 77), (4,))]
    assert devices == [0, 1, 0]
