"""Backend ``cuda`` of the contrastive statistics."""

from __future__ import annotations

from .chunked import backward, forward, saved_size

__all__ = ["backward", "forward", "saved_size"]
