"""A ConvNet that reads digits with differential privacy, by Opacus."""

import sys
from pathlib import Path

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader

import peftcore
import small


def main(out: Path) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = small.convnet().train()
    adapter = peftcore.apply(model, "lora", target=["0", "3", "6"], train=["8"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=peftcore.training.PerExample(model),
        optimizer=optimizer,
        data_loader=DataLoader(small.pictures(), batch_size=64),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        grad_sample_mode="no_op",
    )
    losses = []
    for _ in range(10):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(private(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    adapter.save(out)
    return model, losses


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
