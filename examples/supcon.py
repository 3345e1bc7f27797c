"""Supervised contrastive training of a small encoder on scikit-learn's digits, with a nearest-neighbour check."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastcl


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    train, test = torch.arange(1200), torch.arange(1200, len(images))

    encoder = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
    criterion = fastcl.SupConLoss(temperature=0.1)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)

    for step in range(steps):
        views = torch.stack([images[train] + 0.1 * torch.randn(len(train), 64) for _ in range(2)], dim=1)
        loss = criterion(encoder(views), labels[train])  # [N, 2, 32] and [N]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    with torch.no_grad():
        memory, queries = (F.normalize(encoder(images[part]), dim=1) for part in (train, test))
        nearest = (queries @ memory.T).argmax(1)
    accuracy = (labels[train][nearest] == labels[test]).float().mean().item()
    print(f"nearest-neighbour accuracy on {len(test)} held-out images: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
