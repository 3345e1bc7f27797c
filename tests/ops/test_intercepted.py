"""Which tensors the direct path takes: `library.intercepted`."""

import pytest
import torch

from fastcl.ops import library


def test_keys_of_a_device_are_those_of_its_plain_tensors() -> None:
    """With other keys the direct path would never be taken on a GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        assert library._keys_of(device.upper()) == torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()
        assert not library.intercepted(torch.ones(2, requires_grad=True, device=device), None)
    assert library._keys_of("CPU") != library._keys_of("CUDA")


@pytest.mark.parametrize("name", ["meta", "negated", "conjugate", "inference"])
def test_other_tensors_are_intercepted(name) -> None:
    with torch.inference_mode():
        inference = torch.ones(2)
    others = {
        "meta": torch.empty(2, device="meta"),
        "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "inference": inference,
    }
    assert library.intercepted(torch.ones(2), others[name])
