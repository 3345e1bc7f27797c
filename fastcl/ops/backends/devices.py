"""Makes a CUDA device the current one: kernels are launched on it and on its current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current inside a ``with`` block.

    torch restores the previous device without creating a context on it, as `cudaSetDevice` would; a context takes
    hundreds of megabytes of that device's memory.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
