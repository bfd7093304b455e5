"""A UNet that draws digits, as diffusers' scripts train: noise of a DDPM, accelerate, moving averages."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader

import small


def main(out: Path) -> tuple[nn.Module, list[float]]:
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(small.pictures(), batch_size=32, shuffle=True)
    noises = DDPMScheduler(num_train_timesteps=100)
    model = small.unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    averages = EMAModel(model.parameters(), decay=0.9)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=4, num_training_steps=64)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    model.train()
    for _ in range(4):
        for images, _ in loader:
            noise = torch.randn_like(images)
            times = torch.randint(noises.config.num_train_timesteps, (len(images),))
            predicted = model(noises.add_noise(images, noise, times), times).sample
            loss = nn.functional.mse_loss(predicted, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            averages.step(model.parameters())
            losses.append(loss.item())
    model = accelerator.unwrap_model(model)
    averages.copy_to(model.parameters())
    model.save_pretrained(out)
    return model, losses


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
