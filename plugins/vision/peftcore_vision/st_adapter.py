"""ST-Adapter, the spatio-temporal adapter.   Pan et al. 2022, arXiv 2206.13559 (code: linziyi96/st-adapter).

Equation:
    x' = x + W_up (k * (W_down x + b_down) + c) + b_up

on the patches of the residual stream, in front of attention and in front of the feed-forward. The model is an image
model. The frames of clips are rows of its batch, and the frames of one clip are consecutive: [clips * T, 3, rows,
columns]. k [h, t, y, z] is a depthwise convolution over T frames and the patches of each frame, with zero padding;
W_down [h, d], W_up [d, h]. Other tokens, such as a class token, are unchanged. The adapter is linear: only the model's
layers after it are non-linear.

The user adds a mean over the T outputs of a clip, or another head over them.

The number of frames of a clip is `frames`, or the number in ``peftcore.call(model, frames=16)``; the size of k does not
depend on it. A batch that does not consist of whole clips is refused. Rows depend on each other, so they cannot be
routed to several adapters.

Parameters: 2 d h + 2 h + d + h t y z per adapter: 592,512 in a ViT-B with the defaults, two per block.

Start: k, c and all biases at zero, W_down and W_up as torch's layers. A fresh adapter is the identity. W_down and W_up
get no gradient in the first step.

Differs from the authors' code: The code turns cuDNN off for the convolution k; here it stays on.

Use it: `peftcore.apply(model, "st_adapter", frames=1)`, to turn a frozen image model (CLIP, ViT, Swin) into a video
model; not for single pictures (use `convpass` or `mona`), and not where one block has to relate distant frames: its
kernel reads only neighbouring frames (`aim` attends to all).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import BlockSite, LearningRate, Method, Surgeon, Tags, forward_context
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore_vision._frames import clips
from peftcore_vision._patches import layout
from peftcore_vision._stream import Stream, StreamConfig, StreamOperator, streams


class STAdapterConfig(StreamConfig):
    """Options of ST-Adapter."""

    method: Literal["st_adapter"] = "st_adapter"
    frames: PositiveInt = 8
    """Number T of frames of a clip; each clip is T consecutive rows of the batch."""
    bottleneck: PositiveInt = 384
    """Channels h of the convolution."""
    kernel: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 1, 1)
    """Size of the kernel in frames, rows and columns; odd numbers."""
    before: Literal["both", "attention", "feed-forward"] = "both"
    """Where adapters act: in front of both branches of a block, or of only one of them. For data in which motion
    matters less, the authors' code has an adapter only in front of the feed-forward."""

    @field_validator("kernel")
    @classmethod
    def _has_a_centre(cls, kernel: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(size % 2 for size in kernel):
            raise ValueError(f"kernel={kernel} has no centre: use odd numbers")
        return kernel

    @property
    def amid(self) -> bool:
        return self.before != "attention"


class Convolution(nn.Module):
    """One adapter, which computes the term to add to the patches."""

    def __init__(self, width: int, config: STAdapterConfig) -> None:
        super().__init__()
        h = config.bottleneck
        self.down, self.up = nn.Linear(width, h), nn.Linear(h, width)
        times, rows, columns = config.kernel
        self.conv = nn.Conv3d(h, h, config.kernel, padding=(times // 2, rows // 2, columns // 2), groups=h)
        for zero in (self.down.bias, self.up.bias, self.conv.weight, self.conv.get_parameter("bias")):
            nn.init.zeros_(zero)


class STAdapterOperator(StreamOperator):
    """The adapters of one block."""

    def __init__(self, site: BlockSite, config: STAdapterConfig, stream: Stream) -> None:
        super().__init__(site, config, stream)
        self.frames = config.frames
        self.attention = Convolution(site.width, config) if config.before != "feed-forward" else None
        self.feed_forward = Convolution(site.width, config) if config.amid else None

    def ahead(self, x: Tensor) -> Tensor | None:
        """Return the term to add in front of attention; raises UnsupportedSite if the tokens lack patches, and
        ConfigError if the number of frames is invalid."""
        return None if self.attention is None else self._added(self.attention, x)

    def amid(self, x: Tensor) -> Tensor:
        """Return the term to add in front of the feed-forward; raises UnsupportedSite if the tokens lack patches, and
        ConfigError if the number of frames is invalid."""
        assert self.feed_forward is not None, "it stands there for that"
        return self._added(self.feed_forward, x)

    def _added(self, adapter: Convolution, x: Tensor) -> Tensor:
        """Return the term to add to the residual stream ``[rows, tokens, d]`` or ``[rows, height, width, d]``. It is
        zero at tokens that are not patches."""
        lie, frames = self.lie.get(), self._told()
        count = clips(x, frames, None if lie is None else lie[0])
        if x.dim() == 3:
            grid = layout(lie, x.shape[0], x.shape[1], self.grid, self.prefix_tokens)
            others = x.shape[1] - grid[0] * grid[1]
            patches = x[:, others:].unflatten(1, grid)
        elif x.dim() == 4:
            others, patches = 0, x
        else:
            raise UnsupportedSite(
                f"a block got {tuple(x.shape)}, but patches of pictures have the shape [rows, tokens, d]; target the "
                "blocks of an image tower"
            )
        assert adapter.conv.bias is not None, "it is made with one"
        (down, down_bias, up, up_bias, kernel, bias) = self.cast(
            x,
            *(adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias),
            *(adapter.conv.weight, adapter.conv.bias),
        )
        u = F.linear(patches, down, down_bias).unflatten(0, (count, frames)).movedim(-1, 1)  # [clips, h, T, ...]
        seen = F.conv3d(u, kernel, bias, padding=adapter.conv.padding, groups=len(kernel)).movedim(1, -1)
        added = F.linear(seen.flatten(0, 1), up, up_bias)
        return added if x.dim() == 4 else F.pad(added.flatten(1, 2), (0, 0, others, 0))

    def _told(self) -> int:
        told: Any = forward_context().context.get("frames", self.frames)
        if not isinstance(told, int) or told < 1:
            raise ConfigError(f"frames={told!r} is not a number of frames")
        return told


class STAdapter(Method):
    """Depthwise convolutions over frames and patches in front of attention and feed-forward.

    Example:
        injection = peftcore.apply(model, "st_adapter", frames=1)  # rows are frames, clip by clip; 8 in the paper
    """

    name = "st_adapter"
    Config = STAdapterConfig
    tags = Tags(category="vision", paper="2206.13559", per_row=False)
    learning_rate = LearningRate(
        1e-3,
        "linziyi96/st-adapter@b914b38, main.py",
        on="CLIP ViT-B/16, Something-Something v2, batches of 256 clips: --blr is for 256, times 4 * 64 / 256",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: STAdapterConfig, surgeon: Surgeon) -> None:
        for site, stream in streams(surgeon, config):
            surgeon.graft(site, STAdapterOperator, config, stream.places, stream=stream)

    @staticmethod
    def parameter_count(site: BlockSite, config: STAdapterConfig) -> int:
        d, h, (t, y, z) = site.width, config.bottleneck, config.kernel
        return (2 * d * h + 2 * h + d + h * t * y * z) * (1 + (config.before == "both"))
