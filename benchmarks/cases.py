"""What is measured: the suites, the inputs of a case, and its minimum number of operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
KINDS = ("random", "converged")
# One temperature for both kinds of rows, so that nothing is compiled twice. It is hard for converged rows: their loss
# is the small difference of two numbers near 20.
TEMPERATURE = 0.05
NOISE = 0.3  # standard deviation of converged rows around the centre of their cluster, which has unit variance


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, the same for every provider. The `leaves` require a gradient."""

    anchors: Tensor  # [N, D]
    clusters: Tensor | None = None  # [N] int64, for a self-contrast
    contrasts: Tensor | None = None  # [M, D], for two sets
    keys: Tensor | None = None  # [N, D], the positives of a queue loss
    queue: Tensor | None = None  # [M, D], the unit rows of a queue

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.anchors,) if self.contrasts is None else (self.anchors, self.contrasts)


@dataclass(frozen=True)
class Case:
    """One problem. Values of `loss`:

    - ``"self"``: ClusterInfoNCE, self-contrast of N rows in clusters of `cluster_size` rows. The rows of a cluster of
      two are adjacent, like the views of a sample; larger clusters are shuffled.
    - ``"two sets"``: the CLIP loss, the mean of both directions; row i of one set is paired with row i of the other;
      both gradients.
    - ``"queue"``: MoCo's loss, one key per anchor and M stored rows as negatives; the anchors' gradient.
    """

    suite: str
    loss: str
    n: int
    m: int
    d: int
    dtype: torch.dtype = torch.float32
    cluster_size: int = 2

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def problem(self) -> str:
        """What is computed, without sizes."""
        if self.loss == "self":
            return "self-contrast, " + ("pairs" if self.cluster_size == 2 else "4 clusters")
        return self.loss

    @property
    def name(self) -> str:
        size = f"N={self.n}" if self.loss == "self" else f"{self.n} x {self.m}"
        return f"{self.problem}, {size}, D={self.d}, {self.dtype_name}"

    def flops(self, direction: str) -> int:
        """The least number of floating-point operations in matrix products that the case requires.

        A self-contrast has symmetric logits: N² D for the upper triangle. The backward computes the triangle again,
        because no logit is stored, and takes 2 N² D for the product with the rows: 4 N² D in all. Two sets take 2 N M D
        for the logits and for each of the two gradients, a queue the same with one gradient. Computing the logits of
        two sets again, or both triangles, does not count.
        """
        pairs = self.n * self.m * self.d
        forward, both = {"self": (1, 4), "two sets": (2, 6), "queue": (2, 4)}[self.loss]
        return pairs * (forward if direction == FORWARD else both)

    @property
    def gradient_bytes(self) -> int:
        rows = self.n + (self.m if self.loss == "two sets" else 0)
        return rows * self.d * self.dtype.itemsize

    def inputs(self, kind: str, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Random rows, or converged ones, in which rows of a cluster (or pair) are close, as late in training.

        They are drawn on the device.
        """
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        def near(centres: Tensor) -> Tensor:
            fresh = normal(*centres.shape)
            return fresh if kind == "random" else centres + NOISE * fresh

        def leaf(rows: Tensor) -> Tensor:
            return rows.to(self.dtype).requires_grad_()

        if self.loss == "self":
            clusters = torch.arange(self.n, device=device) // self.cluster_size
            if self.cluster_size > 2:
                clusters = clusters[torch.randperm(self.n, generator=g, device=device)]
            centres = normal(int(clusters.max()) + 1, self.d)
            return Inputs(leaf(near(centres[clusters])), clusters=clusters)
        centres = normal(self.n, self.d)
        if self.loss == "two sets":
            return Inputs(leaf(near(centres)), contrasts=leaf(near(centres)))
        keys = near(centres).to(self.dtype)
        queue = F.normalize(normal(self.m, self.d), dim=1).to(self.dtype)
        return Inputs(leaf(near(centres)), keys=keys, queue=queue)


def _self_contrast(suite: str, n: int, d: int, dtype: torch.dtype = torch.float32, clusters: int = 0) -> Case:
    """A self-contrast of pairs, or with the given number of clusters."""
    return Case(suite, "self", n, n, d, dtype, n // clusters if clusters else 2)


BF16 = torch.bfloat16
SUITES: dict[str, tuple[Case, ...]] = {
    "infonce": (
        *(_self_contrast("infonce", n, 128) for n in (512, 2048, 8192, 16384)),
        _self_contrast("infonce", 8192, 128, clusters=4),
        *(_self_contrast("infonce", n, 512) for n in (2048, 8192)),
        *(_self_contrast("infonce", n, 128, BF16) for n in (2048, 8192)),
    ),
    "two_set": tuple(Case("two_set", "two sets", n, n, d) for n, d in ((2048, 128), (2048, 512), (8192, 128))),
    "small": tuple(_self_contrast("small", n, 128) for n in (64, 128, 256, 512)),
    "memory": tuple(Case("memory", "queue", n, 65536, 128) for n in (256, 4096)),
}
QUICK: dict[str, tuple[Case, ...]] = {
    "infonce": (_self_contrast("infonce", 2048, 128),),
    "two_set": (Case("two_set", "two sets", 1024, 1024, 128),),
    "small": (_self_contrast("small", 256, 128),),
    "memory": (Case("memory", "queue", 256, 16384, 128),),
}


def cases(suites: Sequence[str], quick: bool) -> list[Case]:
    """The cases of the named suites, in order. Raises ValueError for an unknown suite."""
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite: expected some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    chosen = QUICK if quick else SUITES
    return [case for name in suites for case in chosen[name]]
