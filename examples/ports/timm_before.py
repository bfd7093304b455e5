"""A ViT that reads digits, in a loop of timm's parts: its optimizers, schedules and moving averages."""

import sys
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.utils.data import DataLoader

import small

EPOCHS = 8


def main(out: Path) -> tuple[nn.Module, list[float]]:
    random_seed(0)
    loader = DataLoader(small.pictures(), batch_size=32, shuffle=True)
    model = small.vit()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    averages = ModelEmaV3(model, decay=0.9, use_warmup=True)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, updates_per_epoch=len(loader))
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    losses = []
    for epoch in range(epochs):
        model.train()
        for step, (images, labels) in enumerate(loader):
            loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            averages.update(model, step=epoch * len(loader) + step)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    torch.save(averages.module.state_dict(), out / "model.pt")
    return averages.module, losses


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
