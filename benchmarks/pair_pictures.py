"""Draws docs/pairs.png, which pairs each rule makes positive or leaves out: ``python -m benchmarks.pair_pictures``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastcl.ops.contrastive import rules
from fastcl.ops.contrastive.records import Problem, Rows
from fastcl.tags import packed

PICTURE = Path(__file__).parents[1] / "docs" / "pairs.png"
NEGATIVE, POSITIVE, LEFT_OUT, HARD = "#dfe3e8", "#0072b2", "#ffffff", "#e69f00"  # apart for colour-blind readers too
N = 8


def problem(**data: Tensor) -> Problem:
    rows = Rows(torch.zeros(N, 1), **data)  # type: ignore[arg-type]
    return Problem(rows, None, None, torch.ones(1), ())


def matrix(p: Problem, own_pairs: bool = False) -> Tensor:
    """[N, N]: 0 left out, 1 negative, 2 positive. own_pairs: two sets, of which contrast i belongs to anchor i."""
    everything = slice(None)
    positive = rules.positives(p, everything)
    positive = torch.zeros(N, N, dtype=torch.bool) if positive is None else positive
    outside = rules.inadmissible(p, everything, positive, rules.guide_rows(p))
    found = torch.where(positive, 2, 1)
    if outside is not None:
        found[outside] = 0
    if not own_pairs:
        found.fill_diagonal_(0)
    return found


def panels() -> dict[str, Tensor]:
    """A matrix for each rule, over eight rows."""
    g = torch.Generator().manual_seed(4)
    clusters = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    tags = torch.zeros(N, 4, dtype=torch.bool)
    for row, own in enumerate(((0,), (0, 1), (1,), (1, 2), (2,), (3,), (2, 3), ())):
        tags[row, list(own)] = True
    samples = torch.arange(N) // 2
    ids = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2])
    guide = torch.randn(N, 2, generator=g)
    pairs = torch.arange(N)
    texts = torch.tensor([0, 1, 2, 1, 3, 0, 4, 1])
    found = {
        "clusters": matrix(problem(clusters=clusters)),
        "tags: one in common": matrix(problem(tags=packed(tags))),
        "ids of two views:\nsamples 0 and 2 are duplicates": matrix(
            problem(clusters=samples, ids=ids, samples=samples)
        ),
        "two sets, keep_pairs=True:\ncaptions 1, 3, 7 are equal": matrix(
            problem(clusters=pairs, ids=texts, samples=pairs), own_pairs=True
        ),
        "groups": matrix(problem(clusters=clusters, groups=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))),
        "a guide": matrix(problem(clusters=clusters, guide=guide, thresholds=torch.full((N,), 0.8))),
    }
    hard = torch.cat((found["clusters"], torch.full((N, 2), 3)), 1)
    return {
        **found,
        "two hard negatives an anchor": hard,
        "tags, groups, a guide and\nhard negatives": _all(tags, guide),
    }


def _all(tags: Tensor, guide: Tensor) -> Tensor:
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    p = problem(tags=packed(tags), groups=groups, guide=guide, thresholds=torch.full((N,), 0.8))
    return torch.cat((matrix(p), torch.full((N, 2), 3)), 1)


def main() -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = [LEFT_OUT, NEGATIVE, POSITIVE, HARD]
    figure, axes = plt.subplots(2, 4, figsize=(11, 6.8), layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels().items(), strict=True):
        axis.imshow(values, cmap=ListedColormap(colours), vmin=0, vmax=3)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(torch.arange(values.shape[1] + 1) - 0.5, labels=[])
        axis.set_yticks(torch.arange(N + 1) - 0.5, labels=[])
        axis.grid(color="#9aa3ad", linewidth=0.6)
        axis.tick_params(length=0)
        axis.set_ylabel("anchors", fontsize=8)
        axis.set_xlabel("contrasts", fontsize=8)
    names = ("left out", "negative", "positive", "the anchor's own negative")
    patches = [Patch(facecolor=c, edgecolor="#9aa3ad", label=name) for c, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
