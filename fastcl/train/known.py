"""Clusters made of what is known of the images beforehand: their labels, made worse on purpose, and facts."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_WORSE = re.compile(r"(merged|split|noisy)([1-9]\d{0,3})")


def is_worse_labels(option: str) -> bool:
    """Whether --clusters names labels that :func:`worse_labels` makes."""
    match = _WORSE.fullmatch(option)
    return match is not None and (match[1] != "noisy" or int(match[2]) <= 100)


def worse_labels(option: str, labels: Ids, source_index: Ids, source_size: int) -> Ids:
    """Cluster ids ``[n]``: ``merged4``: four labels at random in one; ``split4``: each label at random in four;
    ``noisy30``: of 30 % of the images the label is drawn anew.

    What is drawn for an image depends on its place in the source alone, so that another split has the same clusters.
    """
    match = _WORSE.fullmatch(option)
    assert match is not None
    number, generator = int(match[2]), np.random.default_rng(0)
    classes = 1 + int(labels.max())
    if match[1] == "merged":
        merged: Ids = generator.permutation(classes)[labels] // number
        return merged
    if match[1] == "split":
        split: Ids = number * labels + generator.integers(number, size=source_size)[source_index]
        return split
    drawn, others = generator.random(source_size)[source_index], generator.integers(classes, size=source_size)
    return np.where(100 * drawn < number, others[source_index], labels)


def joined(facts: Mapping[str, Ids], names: Sequence[str]) -> Ids:
    """Cluster ids ``[n]``: images in which all these facts agree are a cluster."""
    _, ids = np.unique(np.stack([facts[name] for name in names], axis=1), axis=0, return_inverse=True)
    return ids.reshape(-1).astype(np.int64)


def tags_of(facts: Mapping[str, Ids]) -> NDArray[np.bool_]:
    """Tags ``[n, T]``: each value of each fact is a tag."""
    return np.concatenate([values[:, None] == np.unique(values) for values in facts.values()], axis=1)
