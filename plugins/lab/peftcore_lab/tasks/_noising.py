"""Adds noise to latents and computes the target of a denoiser, for diffusion schedulers and for flow-matching
schedulers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import BadInput


@dataclass(frozen=True)
class Noised:
    """Latents with added noise."""

    latents: Tensor
    """[rows, channels, height, width]"""
    times: Tensor
    """The timesteps, from which the denoiser infers the amount of noise, [rows]."""
    target: Tensor
    """The output that the denoiser should return, in the shape of the latents."""
    weight: Tensor
    """The weight of each row's squared error in the loss, [rows]."""


class Noising(ABC):
    """Adds the noise of training, and computes the target of the denoiser."""

    def __init__(self, scheduler: Any) -> None:
        # A copy: drawing pictures sets the times of the pipeline's own.
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.count: int = self.scheduler.config.num_train_timesteps

    @abstractmethod
    def over(self, latents: Tensor, drawn: torch.Generator | None) -> Noised:
        """Return latents [rows, channels, height, width] with added noise, drawn from a generator or from torch's
        global one."""


class Diffusion(Noising):
    """The noise of a Markov chain: x_t = sqrt(a_t) x + sqrt(1 - a_t) e, with t drawn uniformly.

    With `min_snr` g, squared errors of the prediction of x have the weight min(SNR_t, g), SNR_t = a_t / (1 - a_t) (Hang
    et al. 2023, arXiv 2303.09556). Errors of e have the weight min(SNR_t, g) / SNR_t, and errors of v min(SNR_t, g) /
    (SNR_t + 1).
    """

    def __init__(self, scheduler: Any, min_snr: float | None = None) -> None:
        super().__init__(scheduler)
        self._kind: str = self.scheduler.config.prediction_type
        self._min_snr = min_snr

    def over(self, latents: Tensor, drawn: torch.Generator | None) -> Noised:
        noise = torch.randn(latents.shape, generator=drawn, device=latents.device, dtype=latents.dtype)
        times = torch.randint(self.count, (len(latents),), generator=drawn, device=latents.device)
        targets: Mapping[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, times),
            "sample": lambda: latents,
        }
        noisy = self.scheduler.add_noise(latents, noise, times)
        return Noised(noisy, times, targets[self._kind](), self._weight(times))

    def _weight(self, times: Tensor) -> Tensor:
        if self._min_snr is None:
            return torch.ones(len(times), device=times.device)
        kept = self.scheduler.alphas_cumprod.to(times.device)[times].float()
        ratio = kept / (1 - kept)
        # The first as a quotient of the bound: at the end of some schedules nothing but noise is left, and SNR is 0.
        weights: Mapping[str, Callable[[float], Tensor]] = {
            "epsilon": lambda bound: (bound / ratio).clamp(max=1.0),
            "v_prediction": lambda bound: ratio.clamp(max=bound) / (ratio + 1),
            "sample": lambda bound: ratio.clamp(max=bound),
        }
        return weights[self._kind](self._min_snr)


class Flow(Noising):
    """The noise of a straight flow: x_s = (1 - s) x + s e, and the denoiser predicts e - x.

    The position in the scheduler's list of shares s is drawn from a logistic normal distribution, so it is most often
    in the middle (Esser et al. 2024, arXiv 2403.03206).
    """

    def __init__(self, scheduler: Any, min_snr: float | None = None) -> None:
        super().__init__(scheduler)
        if min_snr is not None:
            raise BadInput(
                "data.min_snr weights the steps of a diffusion model, and this pipeline is a flow model: remove "
                "data.min_snr"
            )

    def over(self, latents: Tensor, drawn: torch.Generator | None) -> Noised:
        noise = torch.randn(latents.shape, generator=drawn, device=latents.device, dtype=latents.dtype)
        place = torch.randn(len(latents), generator=drawn, device=latents.device).sigmoid()
        index = (place * self.count).long()
        times = self.scheduler.timesteps.to(latents.device)[index]
        share = self.scheduler.sigmas.to(latents)[index].reshape(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noise
        return Noised(noisy, times, noise - latents, torch.ones(len(latents), device=latents.device))
