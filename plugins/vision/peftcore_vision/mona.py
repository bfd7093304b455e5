"""Mona, the multi-cognitive visual adapter.   Yin et al. 2023, arXiv 2311.15010 and 2408.08345 (code: Leiyi-Hu/mona).

Equation:
    x' = x + W_up gelu(c + V c) + b_up,   c = u + (D_3 u + D_5 u + D_7 u) / 3
    u = W_down (gamma LN(x) + delta x) + b_down

on the residual stream x after attention and after the feed-forward. W_down [h, d], W_up [d, h]; D_k is a depthwise
convolution of k by k, V [h, h] one of 1 by 1, all with biases and zero padding; LN is a norm that belongs to the
adapter. Dropout acts in front of W_up.

The convolutions act on the patches in their arrangement in the picture. Activations of four dimensions (Swin in timm)
are grids already. In a sequence, the patches are the last tokens: as many as fit into the largest grid with the
proportions of the model's patch embedding. Each token in front of them counts as a picture of one pixel. The next
branch reads the stream with the adapter's output; the host's dropout, layer scale and stochastic depth do not act on
this output.

Parameters: 133 d + 9,728 per adapter with h = 64, two per block: 2 d h + h^2 + 5 d + 88 h.

Start: γ starts at 1e-6 and δ at 1, [d] each; W_down and W_up from N(0, 0.02^2), their biases at zero; convolutions as
in torch. So a fresh adapter is not an identity (`zero_up` makes it one).

Differs from the authors' code: The code does not handle tokens that are not patches, such as a class token; here each
counts as a picture of one pixel.

Use it: `peftcore.apply(model, "mona")`, for detection and segmentation, where the paper finds it better than full
fine-tuning; not where latency counts, since it cannot be merged (`repadapter` can), nor for inputs that are not
pictures. `convpass` is a similar adapter in parallel with the branches, with one full convolution.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import BlockSite, LearningRate, Method, Share, Surgeon, Tags
from peftcore_vision._patches import over_patches
from peftcore_vision._stream import Stream, StreamConfig, StreamOperator, streams

KERNELS = (3, 5, 7)


class MonaConfig(StreamConfig):
    """Options of Mona."""

    method: Literal["mona"] = "mona"
    bottleneck: PositiveInt = 64
    """Channels h of the convolutions."""
    dropout: Share = 0.1
    """Dropout probability of the inputs of W_up."""
    behind: Literal["both", "attention", "feed-forward"] = "both"
    """Where adapters act: after both branches of a block, or after only one of them."""
    zero_up: bool = False
    """Start W_up at zero, like its bias: an exact identity."""

    @property
    def amid(self) -> bool:
        return self.behind != "feed-forward"


class Cognition(nn.Module):
    """One adapter, which computes the term to add to the residual stream."""

    def __init__(self, width: int, config: MonaConfig) -> None:
        super().__init__()
        h = config.bottleneck
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.delta = nn.Parameter(torch.ones(width))
        self.down, self.up = nn.Linear(width, h), nn.Linear(h, width)
        self.filters = nn.ModuleList(nn.Conv2d(h, h, k, padding=k // 2, groups=h) for k in KERNELS)
        self.mix = nn.Conv2d(h, h, 1)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if config.zero_up:
            nn.init.zeros_(self.up.weight)

    def convolve(self, u: Tensor) -> Tensor:
        """Return the convolutions' output c for pictures ``[n, h, rows, columns]``."""
        c = u + torch.stack([each(u) for each in self.filters]).mean(0)
        mixed: Tensor = c + self.mix(c)
        return mixed

    def read(self, x: Tensor) -> Tensor:
        """Return u, the input of the convolutions, for the residual stream ``[..., d]``."""
        u: Tensor = self.down(self.norm(x) * self.gamma + x * self.delta)
        return u

    def add(self, c: Tensor) -> Tensor:
        """Return the term to add to the residual stream, from the convolutions' output ``[..., h]``."""
        added: Tensor = self.up(self.dropout(F.gelu(c)))
        return added


class MonaOperator(StreamOperator):
    """The adapters of one block."""

    def __init__(self, site: BlockSite, config: MonaConfig, stream: Stream) -> None:
        super().__init__(site, config, stream)
        self.attention = Cognition(site.width, config) if config.amid else None
        self.feed_forward = Cognition(site.width, config) if config.behind != "attention" else None

    def amid(self, x: Tensor) -> Tensor:
        assert self.attention is not None, "it stands there for that"
        return self._added(self.attention, x)

    def behind(self, x: Tensor) -> Tensor | None:
        return None if self.feed_forward is None else self._added(self.feed_forward, x)

    def _added(self, adapter: Cognition, x: Tensor) -> Tensor:
        u = adapter.read(x.to(adapter.gamma.dtype))
        c = over_patches(u, adapter.convolve, self.lie.get(), self.grid, self.prefix_tokens)
        return adapter.add(c).to(x.dtype)


class Mona(Method):
    """Adapters with convolutions of several sizes, after attention and feed-forward."""

    name = "mona"
    Config = MonaConfig
    tags = Tags(
        category="vision",
        paper="2408.08345",
        identity_at_init=False,
        identity_options={"zero_up": True},
        random=True,
    )
    learning_rate = LearningRate(
        1e-4,
        "Leiyi-Hu/mona@5deeac9, Swin-Transformer-Object-Detection/mona_configs/swin-b_coco/"
        "cascade_mask_swin_base_3x_coco_sample_1_bs_16_mona.py",
        on="Swin-B, COCO",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: MonaConfig, surgeon: Surgeon) -> None:
        for site, stream in streams(surgeon, config):
            surgeon.graft(site, MonaOperator, config, stream.places, stream=stream)

    @staticmethod
    def parameter_count(site: BlockSite, config: MonaConfig) -> int:
        d, h = site.width, config.bottleneck
        adapter = 2 * d * h + h * h + 5 * d + (sum(k * k + 1 for k in KERNELS) + 2) * h
        return adapter * (1 + (config.behind == "both"))
