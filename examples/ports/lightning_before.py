"""A classifier of texts as a LightningModule."""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import small


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4)}


def main(out: Path) -> tuple[nn.Module, list[float]]:
    lightning.seed_everything(0, verbose=False)
    model = small.text_classifier().train()
    module = Classifier(model)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    trainer.fit(module, DataLoader(small.texts(), batch_size=16, shuffle=True))
    trainer.save_checkpoint(out / "model.ckpt")
    return model, module.losses


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
