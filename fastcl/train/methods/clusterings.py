"""Clusters of the training images: known beforehand, or found by k-means."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

import fastcl
from fastcl import KMeansResult
from fastcl.train.data import ImageData, attribute_tags, attributes, read_csv_clusters
from fastcl.train.glyphs import OF_CHARACTERS
from fastcl.train.known import is_worse_labels, joined, tags_of, worse_labels

Clusters = NDArray[np.int64] | NDArray[np.bool_]  # ids [n], negative: none; or tags [n, T]

TRIES = 3  # of k-means, with different initial centroids


def fixed_clusters(option: str, images: ImageData) -> Clusters:
    """The training clusters that are known beforehand: every kind of --clusters but kmeans and sinkhorn."""
    if option == "labels":
        return images.train_labels
    if is_worse_labels(option):
        return worse_labels(option, images.train_labels, images.source_index, images.source_size)
    if option == "attributes":
        return joined(images.facts, OF_CHARACTERS) if images.facts else attributes(images.train_images)
    if option == "tags":
        return tags_of(images.facts) if images.facts else attribute_tags(images.train_images)
    if set(option.split("+")) <= set(images.facts):
        return joined(images.facts, option.split("+"))
    return read_csv_clusters(option, images.source_size)[images.source_index]


def cluster_ids(clusters: Clusters) -> NDArray[np.int64]:
    """Ids ``[n]``. Of tags each set of them is a cluster; images without a tag have none."""
    if clusters.ndim == 1:
        return clusters.astype(np.int64)
    _, ids = np.unique(clusters, axis=0, return_inverse=True)
    return np.where(clusters.any(axis=1), ids.reshape(-1), -1)


def kmeans(rows: NDArray[np.float32], n_clusters: int, seed: int) -> KMeansResult:
    """The best of three k-means of rows ``[n, D]``."""
    generator = torch.Generator().manual_seed(seed)
    tries = [fastcl.kmeans(torch.from_numpy(rows), n_clusters, generator=generator) for _ in range(TRIES)]
    return min(tries, key=lambda found: found.inertia)


def nearest(rows: NDArray[np.float32], clusters: KMeansResult) -> NDArray[np.int64]:
    """The cluster ``[n]`` whose centroid is nearest."""
    centroids = clusters.centroids
    found: NDArray[np.int64] = fastcl.kmeans(
        torch.from_numpy(rows), len(centroids), init=centroids, n_iters=0
    ).assignments.numpy()
    return found


def renumbered(clusters: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clusters ``[n]`` under other numbers, with which as many images as possible keep the one that they had before.

    k-means numbers its clusters at random, and what a classifier learned is of use as long as its classes stay.
    """
    shared = np.zeros([1 + max(clusters.max(), before.max())] * 2, dtype=np.int64)
    np.add.at(shared, (clusters, before), 1)
    numbers: NDArray[np.int64] = linear_sum_assignment(shared, maximize=True)[1]
    return numbers[clusters]
