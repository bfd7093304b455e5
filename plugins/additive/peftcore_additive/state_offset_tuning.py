"""State-offset tuning: a constant added to the state of a state-space model at each step.   Kang et al. 2025, arXiv
2503.03499 (furiosa-ai/ssm-state-tuning).

Equation:
    y_t = silu(z_t) (C_t (h_t + h') + D x_t),   h' [d, N]        offset="state"
    y_t = silu(z_t) (C_t h_t + y' + D x_t),     y' [d]           offset="output"

h_t is the state of a Mamba mixer, d channels with N states each, and h' or y' is all that trains. A prefix or a trained
first state fades with the decay of the states; the offset is there anew at each step and is not carried on, so caches
hold what they held before. With `rank` h' is B A, B [d, rank] and A [rank, N].

It acts in Mamba, FalconMamba and Jamba, where h' reads C as the model does, behind its norm in the latter two. Mamba-2
and its kin (Bamba, Zamba2, NemotronH) make C within the mixer, so only y' is there, in front of the gated norm. On GPUs
the scan may be a kernel. The one that takes the place of the whole mixer in training passes over its last matrix, and
is refused when it has run.

Parameters: d N a mixer, d with ``offset="output"``, rank (d + N) with `rank`: 589,824 and 36,864 in Mamba 130M.

Start: h' or y' at zero, or B at zero: the identity.

Differs from the authors' code: the authors' code has nothing for Mamba-2 and its kin.

Use it: `peftcore.apply(model, "state_offset_tuning")`, in state-space models, where prompts and prefixes do little; not
in hybrids in which attention has most of the layers. `lora` on ``ssm.in`` and ``ssm.out`` is larger, and merges; `ssf`
scales and shifts what matrices return.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Surgeon, Tags, Tap
from peftcore.errors import TrainingError, UnsupportedSite
from peftcore_additive._state_space import GATE, OUT, READOUT, MixerSite, mixer_site


class StateOffsetTuningConfig(MethodConfig):
    """Options of state-offset tuning."""

    method: Literal["state_offset_tuning"] = "state_offset_tuning"
    offset: Literal["state", "output"] = "state"
    """The quantity that is offset: the states, or their readout."""
    rank: PositiveInt | None = None
    """Rank of the offset of the states; None trains it whole."""

    @model_validator(mode="after")
    def _of_states(self) -> Self:
        if self.rank is not None and self.offset == "output":
            raise ValueError("rank= is of an offset of states; one of outputs is a vector")
        return self


class OffsetOperator(Operator):
    """The offset of one mixer: it reads the gate and C where the mixer computes them, and adds the offset where the
    mixer has used both."""

    observes = frozenset({GATE, READOUT})
    changes_inputs = True

    def __init__(self, site: MixerSite, config: StateOffsetTuningConfig) -> None:
        super().__init__(site)
        channels, states = site.channels, site.states
        if config.offset == "state" and not states:
            raise UnsupportedSite(f'{site.path} makes C inside, where nothing reads it; say offset="output"')
        self.path, self.channels, self.states, self.gated = site.path, channels, states, site.gates_first
        self.gate, self.readout, self.added = Tap(), Tap(), Tap()
        if config.rank is not None:
            self.down = nn.Parameter(torch.empty(config.rank, states).uniform_(-1, 1) / math.sqrt(states))
            self.up = nn.Parameter(torch.zeros(channels, config.rank))
        else:
            self.offset = nn.Parameter(torch.zeros(channels, *[states] * (config.offset == "state")))

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        forms: dict[str, Callable[..., Any]] = {GATE: self._at_gate, READOUT: self._at_readout, OUT: self._at_out}
        return forms.get(form, self)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the mixer.

        Raises:
            TrainingError: it ran as a kernel that takes weights, and no module that the offset could act at.
        """
        output = call(*args, **kwargs)
        if self.added.take() is None:
            raise TrainingError(
                f"{self.path} ran as one kernel, which passes over the offset: give the model use_cache=True, or put "
                "its mixers into eval() (they drop nothing), then only the scan is a kernel"
            )
        return output

    def _at_gate(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        self.gate.put(y[..., self.channels :])
        return y

    def _at_readout(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        self.readout.put(y[..., -self.states :])
        return y

    def _at_out(self, call: Callable[..., Any], y: Tensor, *args: Any, **kwargs: Any) -> Any:
        change = self.change(y)
        if self.gated:
            change = change * silu(self.gate.take())
        self.added.put(True)
        return call(y + change.to(y.dtype), *args, **kwargs)

    def change(self, like: Tensor) -> Tensor:
        """Return what is added in front of the gate, ``[batch, tokens, d]`` or ``[d]``."""
        weights = self.cast(like, *self.parameters())
        if weights[0].dim() == 1:
            return weights[0]
        read: Tensor = self.readout.take().to(like.dtype)  # [batch, tokens, N]
        for weight in weights:
            read = linear(read, weight)
        return read


class StateOffsetTuning(Method):
    """Constant offsets of the states of a state-space model, or of the readout of the states."""

    name = "state_offset_tuning"
    Config = StateOffsetTuningConfig
    tags = Tags(category="additive", paper="2503.03499")
    learning_rate = LearningRate(
        4e-4,
        "furiosa-ai/ssm-state-tuning@2cff985, cfg/final/exps/mamba-130m/dart/state_tuning.yaml",
        on="Mamba 130M, DART",
    )
    target = ("ssm",)

    def inject(self, model: nn.Module, config: StateOffsetTuningConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            place = mixer_site(surgeon, site)
            surgeon.graft(place, OffsetOperator, config, place.places)

    @staticmethod
    def parameter_count(site: MixerSite, config: StateOffsetTuningConfig) -> int:
        if config.offset == "output":
            return site.channels
        return site.channels * site.states if config.rank is None else config.rank * (site.channels + site.states)
