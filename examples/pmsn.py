"""PMSN on long-tailed data: a uniform and a power-law prior, on scikit-learn's digits with thinned classes."""

import torch
from sklearn.datasets import load_digits

import fastcl


def long_tailed(labels: torch.Tensor, ratio: float) -> torch.Tensor:
    """Indices of images; class sizes fall geometrically from 170 to 170 / ratio."""
    sizes = [round(170 * ratio ** (-c / 9)) for c in range(10)]
    return torch.cat([(labels == c).nonzero()[:size, 0] for c, size in enumerate(sizes)])


def train(prior: torch.Tensor, steps: int) -> torch.Tensor:
    """Trains, and returns the share of the images assigned to each prototype, in descending order."""
    torch.manual_seed(0)
    digits = load_digits()
    kept = long_tailed(torch.tensor(digits.target), 20)
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[kept] / 16

    layers = torch.nn.Linear(64, 256), torch.nn.BatchNorm1d(256), torch.nn.ReLU(), torch.nn.Linear(256, 32)
    encoder = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(32, affine=False))
    prototypes = torch.nn.Parameter(torch.randn(len(prior), 32))
    criterion = fastcl.PMSNLoss(temperature=0.1, prior=prior)
    optimizer = torch.optim.AdamW([*encoder.parameters(), prototypes], lr=3e-3)
    for step in range(steps):
        one, other = (encoder(images + 0.1 * torch.randn_like(images)) for _ in range(2))
        loss = criterion(torch.cat([one, other]), torch.cat([other, one]), prototypes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    with torch.no_grad():
        nearest = criterion.assignments(encoder.eval()(images), prototypes).argmax(1)
    return torch.bincount(nearest, minlength=len(prior)).sort(descending=True).values / len(images)


def main(steps: int = 60) -> dict[str, torch.Tensor]:
    shares = {}
    for name, prior in (("uniform", fastcl.uniform_prior(10)), ("power law", fastcl.power_law_prior(10, 1.0))):
        shares[name] = train(prior, steps)
        print(name, "prior   ", " ".join(f"{p:6.1%}" for p in prior.tolist()))
        print(name, "assigned", " ".join(f"{p:6.1%}" for p in shares[name].tolist()))
    return shares


if __name__ == "__main__":
    main()
