"""A text encoder and a UNet in one host."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftcore.testing.hosts import HOSTS


class WordsAndUNet(nn.Module):
    """An embedding of 20 words, and a UNet that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = HOSTS["unet"].build()[0]
        self.words = nn.Embedding(20, self.unet.config.cross_attention_dim)

    def forward(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        sample: Tensor = self.unet(**inputs, encoder_hidden_states=self.words(ids)).sample
        return sample
