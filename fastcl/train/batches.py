"""Batches with images of few classes each."""

import numpy as np
from numpy.typing import NDArray

from fastcl.train import OptionError
from fastcl.train.data import ImageData


def check_batch_classes(count: int, batch: int, images: ImageData) -> None:
    """Raise where batches of `batch` images cannot be of `count` classes."""
    present = len(np.unique(images.train_labels))
    if count > min(present, batch):
        raise OptionError(
            f"--batch-classes must be at most the number of classes, {present}, and the images a step, {batch}; got "
            f"{count}"
        )


def batches_of_few_classes(
    labels: NDArray[np.int64], batch: int, few: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Places ``[<= batch]`` among ``labels`` ``[n]``, of at most `few` labels a batch; each place is in one batch.

    Each class is shuffled and cut into chunks of batch // few images; a batch is `few` chunks of different classes as
    long as there are. How many batches there are does not depend on the generator, nor does any size differ by more
    than a chunk, but for chunks of uneven size.
    """
    size = batch // few
    chunks: list[list[NDArray[np.int64]]] = []
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        chunks.append(np.array_split(own, -(-len(own) // size)))
    left = np.array([len(own) for own in chunks])
    total, count = int(left.sum()), -(-int(left.sum()) // few)
    batches = []
    for number in range(count):
        wanted = total // count + (number < total % count)
        # Those with the most chunks left come first, so that none is left alone at the end; ties are drawn.
        order = np.lexsort((generator.random(len(left)), -left))[:few]
        taken: list[NDArray[np.int64]] = []
        while len(taken) < wanted:
            for label in order:
                if left[label] and len(taken) < wanted:
                    left[label] -= 1
                    taken.append(chunks[label][left[label]])
        batches.append(np.concatenate(taken))
    return [batches[place] for place in generator.permutation(count)]
