"""MoCo on scikit-learn's digits: a momentum encoder fills a queue of keys, the negatives of later batches."""

from copy import deepcopy

import torch
from sklearn.datasets import load_digits

import fastcl


def main(steps: int = 150) -> float:
    """Trains, and returns the held-out accuracy of a kNN classifier on the features."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    train = torch.rand(len(images)) < 0.7

    encoder = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    slow = deepcopy(encoder).requires_grad_(False)
    queue = fastcl.MemoryQueue(1024, 64, ids=True)
    criterion = fastcl.ClusterInfoNCE(temperature=0.2)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    for step in range(steps):
        index = torch.nonzero(train)[:, 0][torch.randperm(int(train.sum()))[:256]]
        query, key = (images[index] + 0.15 * torch.randn(256, 64) for _ in range(2))
        with torch.no_grad():
            for own, other in zip(slow.parameters(), encoder.parameters(), strict=True):
                own.lerp_(other, 0.05)
            keys = slow(key)
        loss = criterion(encoder(query), positives=keys, contrasts=queue, ids=index)  # ids exclude the own stale keys
        queue.enqueue(keys, ids=index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    with torch.no_grad():
        features = encoder(images)
    votes = fastcl.knn_predict(features[~train], features[train], labels[train], k=10)
    accuracy = (votes.argmax(1) == labels[~train]).float().mean().item()
    print(f"held-out kNN accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
