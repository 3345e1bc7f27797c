"""Backend ``cuda`` on the emulator: what it takes, and who chooses it."""

import pytest
import torch
from emulated import emulating

import fastcl
from fastcl.kernels import cuda_native, ops


@pytest.fixture(autouse=True)
def emulated() -> None:
    with emulating():
        yield


def test_is_taken_by_name_only() -> None:
    assert ops.choose_backend(torch.device("cpu"), torch.float32) != "cuda"
    with fastcl.use_backend("cuda"):
        assert ops.choose_backend(torch.device("cpu"), torch.float32) == "cuda"
        with pytest.raises(ValueError, match="'cuda' is emulated and takes tensors on the CPU, got tensors on meta"):
            ops.choose_backend(torch.device("meta"), torch.float32)
    assert not cuda_native.MEASURED_FASTER
