"""Backend ``triton``: the contrastive statistics by Triton kernels. Triton itself is imported by the first call."""

from ..kept import plane_count
from .gradient import backward
from .statistics import forward, merge_planes, planes, saved_size

__all__ = ["backward", "forward", "merge_planes", "plane_count", "planes", "saved_size"]
