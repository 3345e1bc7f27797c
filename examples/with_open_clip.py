"""open_clip's own training loop with fastcl's loss, on halves of scikit-learn's digits as images and texts."""

from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastcl


def make_model() -> torch.nn.Module:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 8}
    text = {"context_length": 32, "vocab_size": 19, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True)


def make_data(batch_size: int) -> dict[str, SimpleNamespace]:
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)
    images = torch.nn.functional.pad(pixels[:, :4], (0, 0, 0, 4))[:, None].expand(-1, 3, -1, -1) / 16
    texts = pixels[:, 4:].flatten(1).long()
    texts[:, -1] = 18  # the largest token ends the text
    loader = DataLoader(TensorDataset(images[:512], texts[:512]), batch_size=batch_size)
    loader.num_batches, loader.num_samples = len(loader), 512
    return {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}


def main(
    epochs: int = 3, loss: torch.nn.Module | None = None, accum_freq: int = 1, optimizer=torch.optim.AdamW
) -> torch.nn.Module:
    torch.manual_seed(0)
    model, data = make_model(), make_data(batch_size=128)
    optimizer = optimizer(model.parameters(), lr=1e-3)
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, skip_scheduler=True, accum_freq=accum_freq, horovod=False,
        grad_clip_norm=None, rank=0, local_rank=0, world_size=1, log_every_n_steps=1, batch_size=128, wandb=False,
        log_local=False,
    )  # fmt: skip
    # In place of open_clip.create_loss(args). With more processes gather=True is local_loss and gather_with_grad.
    loss = fastcl.ClipLoss(gather=True) if loss is None else loss
    for epoch in range(epochs):
        train_one_epoch(model, data, loss, epoch, optimizer, None, None, None, args)
        with torch.no_grad():
            images, texts = next(iter(data["train"].dataloader))
            print(f"epoch {epoch}  loss {loss(**model(images, texts), output_dict=True)['contrastive_loss']:.3f}")
    return model


if __name__ == "__main__":
    main()
