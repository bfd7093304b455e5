"""Information calibration: the scheme nf4-icq of IR-QLoRA (arXiv 2402.05445, htqin/IR-QLoRA).

    W = nf4(W - t) + t,   one t for each block: median + f absmax(block - median)

f is searched on a grid around zero. The number chosen is the one that uses the 16 codes most evenly: the entropy of the
codes in the block is largest. Of equally good numbers the first is chosen. t is stored in 8 bits, and 256 blocks share
the scale of their t. As in the authors' code, the exact t is subtracted before rounding, and the 8-bit t is added back.
The authors' code accepts only weights with a multiple of 256 blocks.

On a model that is still dense, each forward rounds the weight (`round_trip`). t is then searched once and cached, and
searched again when the values of the weight change. A digest of the values detects changes.
"""

from __future__ import annotations

import hashlib
import threading

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from peftcore_quantized.backends.reference import (
    DOUBLE,
    DYNAMIC,
    NORMAL,
    TINY,
    NF4Linear,
    Reference,
    blocks_of,
    look_up,
    nearest,
)

SIGMA = 1 / float(torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64, device="cpu")))
"""The standard deviation of the normal distribution whose quantiles NF4 scales to 1."""


def unevenness(codes: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of n log n over the counts n of the codes in a block: it grows as the entropy of the codes
    falls."""
    counts = torch.zeros(len(codes), len(NORMAL), dtype=torch.float64, device=codes.device)
    counts.scatter_add_(1, codes.long(), counted.to(counts.dtype))
    return (counts * counts.clamp_min(1).log2()).sum(1).mul(1e6).round()  # so that equal ones are equal


def calibration(blocks: Tensor, spread: float, steps: int) -> Tensor:
    """Return the shift t of each block, ``[blocks, 1]``. NaN values are ignored."""
    counted = ~blocks.isnan()
    middle = blocks.nanmedian(1, keepdim=True).values
    absmax = (blocks - middle).abs().nan_to_num(0).amax(1, keepdim=True)
    best, least = torch.zeros_like(middle), torch.full_like(middle, torch.inf, dtype=torch.float64)
    for step in range(-steps, steps + 1):
        tau = spread * SIGMA * step / steps * absmax + middle
        moved = (blocks - tau).nan_to_num(0)
        scale = 1 / moved.abs().amax(1, keepdim=True).clamp_min(TINY)
        found = unevenness(nearest(moved * scale, NORMAL), counted)[:, None]
        best, least = torch.where(found < least, tau, best), torch.minimum(found, least)
    return best


KEPT = 4096
"""Number of weight tensors whose calibration is cached; a calibration is 64 times smaller than its weight."""
_kept: dict[tuple[object, ...], Tensor] = {}
_lock = threading.Lock()


def kept_calibration(blocks: Tensor, spread: float, steps: int) -> Tensor:
    """Return `calibration` of the blocks. Results are cached by a digest of the values."""
    if blocks.is_meta:
        return calibration(blocks, spread, steps)
    digest = hashlib.sha256(blocks.cpu().numpy().data).digest()
    key = (digest, blocks.shape, blocks.device, spread, steps)
    with _lock:
        found = _kept.pop(key, None)
    found = calibration(blocks, spread, steps) if found is None else found
    with _lock:
        _kept[key] = found  # the last one now
        if len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
    return found


class ICQLinear(NF4Linear):
    """A linear layer with a weight in 4-bit NormalFloat, whose blocks are shifted by t."""

    def encode(  # type: ignore[override]
        self, weight: Tensor, block_size: int, double_quant: bool, tau_range: float, tau_steps: int
    ) -> dict[str, Tensor]:
        padding = -weight.numel() % block_size
        blocks = F.pad(weight.reshape(-1), (0, padding), value=torch.nan).view(-1, block_size)
        tau = kept_calibration(blocks, tau_range, tau_steps)
        packed = super().encode((blocks - tau).view(-1)[: weight.numel()].view(weight.shape), block_size, double_quant)
        groups = blocks_of(tau, DOUBLE)
        scale = groups.abs().amax(1)
        codes = nearest(groups / scale.clamp_min(TINY)[:, None], DYNAMIC).view(-1)[: tau.numel()]
        return {**packed, "tau_codes": codes, "tau_scale": scale}

    def decode(self, codes: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]  # called with what `encode` made
        *absmax, tau_codes, tau_scale = rest
        weight = super().decode(codes, *absmax)
        tau = blocks_of(look_up(tau_codes, DYNAMIC), DOUBLE) * tau_scale[:, None]
        blocks = blocks_of(weight, self.options["block_size"]) + tau.view(-1)[: tau_codes.numel(), None]
        return blocks.view(-1)[: weight.numel()].view(weight.shape)


class ICQ(Reference):
    """The scheme nf4-icq: 4-bit NormalFloat with a calibrated shift of each block."""

    kind = ICQLinear
    block_size: PositiveInt = 64
    """How many weights share a scale and a calibration."""
    double_quant: bool = False
    """Keep the scales in 8 bits."""
    tau_range: PositiveFloat = 0.1
    """Half-width of the search for t around the median, in standard deviations of the distribution of the codes."""
    tau_steps: PositiveInt = 51
    """Number of search steps to either side (the authors' script: 100). The time to quantize is proportional to it."""
