"""SupCon in PyTorch Lightning, with the loss's statistics in its log."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastcl


class SupCon(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
        self.criterion = fastcl.ClusterInfoNCE(temperature=0.1, gather=True)  # all processes' rows; no effect on one

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        views = images[:, None] + 0.1 * torch.randn(len(images), 2, 64, device=images.device)
        rows = self.encoder(views)
        if self.trainer.world_size == 1:  # statistics are those of one process's rows
            loss, stats = self.criterion(rows, labels, return_stats=True)
            self.log_dict(stats.scalars("train/"))
        else:
            loss = self.criterion(rows, labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int = 40, **options: object) -> SupCon:
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=256, shuffle=True)
    model = SupCon()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", **{**quiet, **options})
    trainer.fit(model, loader)
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
    return model


if __name__ == "__main__":
    main()
