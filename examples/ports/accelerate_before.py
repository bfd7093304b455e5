"""A classifier of texts in a loop of accelerate."""

import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import small


def main(out: Path) -> tuple[nn.Module, list[float]]:
    transformers.set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    loader = DataLoader(small.texts(), batch_size=16, shuffle=True)
    model = small.text_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 4, 100)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    model.train()
    for _ in range(6):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    model = accelerator.unwrap_model(model)
    model.save_pretrained(out)
    return model, losses


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
