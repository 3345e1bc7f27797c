"""A custom contrastive loss: alignment plus weighted uniformity (Wang and Isola 2020)."""

import torch

from fastcl import contrastive_stats


def align_uniform(z: torch.Tensor, clusters: torch.Tensor, t: float = 2.0, weight: float = 0.5) -> torch.Tensor:
    """mean_i mean_P |x_i - x_j|^2 + weight * log mean_i mean_{j != i} exp(-t |x_i - x_j|^2), on unit rows z [N, D].

    On unit rows |x - y|^2 = 2 - 2 <x, y>, so both terms are statistics of the inner products.
    """
    s = contrastive_stats(z, anchor_clusters=clusters, logit_scale=2 * t, normalize_anchors=True)
    alignment = (2 - s.sum_pos / (t * s.num_pos))[s.valid].mean()
    pairs = len(z) * (len(z) - 1)
    uniformity = torch.logsumexp(s.lse_all, 0) - 2 * t - torch.tensor(float(pairs)).log()
    return alignment + weight * uniformity


def main(steps: int = 50) -> list[float]:
    torch.manual_seed(0)
    z = torch.randn(256, 16, requires_grad=True)
    clusters = torch.arange(256) // 2
    optimizer = torch.optim.Adam([z], lr=0.05)
    history = []
    for step in range(steps):
        loss = align_uniform(z, clusters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    return history


if __name__ == "__main__":
    main()
