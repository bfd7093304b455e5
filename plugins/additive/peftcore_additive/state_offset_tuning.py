"""State-offset tuning: a constant added to the state of a state-space model at each step.   Kang et al. 2025, arXiv
2503.03499 (furiosa-ai/ssm-state-tuning).

Equation:
    y_t = silu(z_t) (C_t (h_t + h') + D x_t),   h' [d, N]        offset="state"
    y_t = silu(z_t) (C_t h_t + y' + D x_t),     y' [d]           offset="output"

h_t is the state of a Mamba mixer, d channels with N states each. Only h' or y' trains. The effect of a prefix, or of a
trained first state, fades with the decay of the states. The offset does not fade, since it is added again at each step.
It is not part of the next state, so caches do not change. With `rank`, h' is B A, B [d, rank] and A [rank, N].

Mamba, FalconMamba and Jamba support both offsets. h' uses the model's C, in FalconMamba and Jamba after its norm.
Mamba-2 and similar models (Bamba, Zamba2, NemotronH) compute C inside the mixer, so they support only y', which is
added before the gated norm. On GPUs the scan may run as a kernel. In training a fused kernel may compute the whole
mixer; it does not call the mixer's last matrix, where the offset is added, so such a forward raises an error.

Parameters: d N a mixer, d with ``offset="output"``, rank (d + N) with `rank`: 589,824 and 36,864 in Mamba 130M.

Start: h' or y' at zero, or B at zero: the identity.

Differs from the authors' code: The authors' code does not support Mamba-2 and similar models.

Use it: `peftcore.apply(model, "state_offset_tuning")`, in state-space models, where prompts and prefixes have little
effect; not in hybrid models whose layers are mostly attention. `lora` on ``ssm.in`` and ``ssm.out`` is larger, but can
be merged; `ssf` scales and shifts the outputs of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from peftcore import HostEntry
from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, Tap
from peftcore.errors import TrainingError, UnsupportedSite


class StateOffsetTuningConfig(MethodConfig):
    """Options of state-offset tuning."""

    method: Literal["state_offset_tuning"] = "state_offset_tuning"
    offset: Literal["state", "output"] = "state"
    """The quantity to which the offset is added: the states, or the output that is read from the states."""
    rank: PositiveInt | None = None
    """Rank of the offset of the states; None trains the full matrix h'."""

    @model_validator(mode="after")
    def _of_states(self) -> Self:
        if self.rank is not None and self.offset == "output":
            raise ValueError('rank= needs offset="state": the offset of outputs is a vector, which has no factors')
        return self


GATE, READOUT, OUT = "gate", "readout", "out"
"""Values of `form` for three sites in a mixer: the matrix whose last outputs are the gate z, the module whose last
outputs are C, and the module whose input is the scan's output."""


@dataclass(frozen=True, eq=False)
class MixerSite(Site):
    """A whole state-space mixer as a site."""

    channels: int = 0
    """The number d of channels of the mixer's scan."""
    states: int = 0
    """The number N of states of each channel; 0 if C is computed inside the mixer, where it cannot be read."""
    places: tuple[Site, ...] = ()
    """The sites inside the mixer that the operator reads or changes."""

    @property
    def weight_shape(self) -> torch.Size:
        """The numbers of channels and of states; plans and saved files record them as the shape of this target."""
        return torch.Size([self.channels, self.states])

    @property
    def gates_first(self) -> bool:
        """True if the output of the scan is already multiplied by the gate."""
        return any(place.form == GATE for place in self.places)


def mixer_site(surgeon: Surgeon, site: Site) -> MixerSite:
    """Return a mixer as a site, with the sites inside it: a Mamba mixer (S6), or a Mamba-2 mixer, whose norm reads both
    the scan's output and the gate.

    Raises:
        UnsupportedSite: the module is neither a Mamba nor a Mamba-2 mixer.
    """
    path = site.module_path
    children = [each for each in surgeon.resolver.host.entries if path and each.path.rpartition(".")[0] == path]
    outs = [each for each in children if each.role == "ssm.out"]
    if len(outs) != 1:
        raise UnsupportedSite(f"{path or 'the host'} is not a state-space mixer; target the role ssm")
    known = {**vars(site), "form": "activation", "channels": outs[0].shape[-1]}
    places = _selective(surgeon, children, outs[0])
    if places is not None:
        return MixerSite(**known, states=places[0], places=places[1])
    norms = [each for each in children if _is_gated_norm(surgeon, each, outs[0].shape[-1])]
    if len(norms) != 1:
        raise UnsupportedSite(
            f"{path}: peftcore does not know where this mixer gates its output; supported are Mamba, FalconMamba, "
            "Jamba and Mamba-2; exclude others"
        )
    return MixerSite(**known, places=(_place(surgeon, norms[0], OUT),))


def _selective(surgeon: Surgeon, children: list[HostEntry], out: HostEntry) -> tuple[int, tuple[Site, ...]] | None:
    """Return the number of states of a Mamba mixer, and the sites inside it; None for all other mixers.

    The first matrix of such a mixer returns the input of the convolution and the gate. The matrix with the role
    ``ssm.x`` returns the steps, B and C. If norms of the steps, B and C follow, C is the output of the norm whose name
    begins with c.
    """
    by_role = {each.role: each for each in children}
    first, x, steps = (by_role.get(f"ssm.{name}") for name in ("in", "x", "dt"))
    if first is None or x is None or steps is None or first.rows != 2 * out.shape[-1]:
        return None
    states, rest = divmod(x.rows - steps.shape[-1], 2)
    mixer = surgeon.resolver.modules[x.path.rpartition(".")[0]]
    decays = [each.shape for each in mixer._parameters.values() if each is not None]
    if rest or (out.shape[-1], states) not in decays:
        return None
    norms = [each for each in children if each.kind == "norm"]
    readouts = [each for each in norms if each.path.rpartition(".")[2].startswith("c")] if norms else [x]
    if len(readouts) != 1:
        return None
    return states, tuple(
        _place(surgeon, each, form) for each, form in ((first, GATE), (readouts[0], READOUT), (out, OUT))
    )


def _is_gated_norm(surgeon: Surgeon, entry: HostEntry, channels: int) -> bool:
    return entry.kind == "norm" and entry.shape == (channels,) and "gate" in _site(surgeon, entry).arguments


def _site(surgeon: Surgeon, entry: HostEntry) -> Site:
    return surgeon.resolver.site(entry.module, "weight", entry.role)


def _place(surgeon: Surgeon, entry: HostEntry, form: str) -> Site:
    return replace(_site(surgeon, entry), form=form)


class OffsetOperator(Operator):
    """Adds the offset of one mixer. It reads the gate and C when the mixer computes them, and adds the offset after the
    mixer has used both."""

    observes = frozenset({GATE, READOUT})
    changes_inputs = True

    def __init__(self, site: MixerSite, config: StateOffsetTuningConfig) -> None:
        super().__init__(site)
        channels, states = site.channels, site.states
        if config.offset == "state" and not states:
            raise UnsupportedSite(
                f'{site.path} computes C inside the mixer, where it cannot be read; set offset="output"'
            )
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
            TrainingError: the mixer ran as a fused kernel, which does not call the module where the offset is added.
        """
        output = call(*args, **kwargs)
        if self.added.take() is None:
            raise TrainingError(
                f"{self.path} ran as one fused kernel, which ignores the offset: call the model with use_cache=True, "
                "or put its mixers into eval() (they have no dropout), so that only the scan is a kernel"
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
        """Return the term that is added before the gate, ``[batch, tokens, d]`` or ``[d]``."""
        weights = self.cast(like, *self.parameters())
        if weights[0].dim() == 1:
            return weights[0]
        read: Tensor = self.readout.take().to(like.dtype)  # [batch, tokens, N]
        for weight in weights:
            read = linear(read, weight)
        return read


class StateOffsetTuning(Method):
    """Constant offsets that are added to the states of a state-space model, or to the output of its states."""

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
