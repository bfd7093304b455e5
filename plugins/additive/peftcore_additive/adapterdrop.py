"""AdapterDrop.   Rücklé et al. 2021, arXiv 2010.11918 (code: adapter-hub/adapters).

Equation:
    y = h + W_up f(W_down h + b_down) + b_up   in the layers l >= m,   y = h   in those below

The method adds bottleneck adapters after the feed-forward and its dropout, except in the lowest layers, which saves
time. *Specialised*: the first m layers lack an adapter, so they are cheaper at inference, and backward ends at layer m,
since all parameters below it are frozen. *Robust*: all layers have an adapter, and each forward in training skips the
adapters of the first m layers. m is drawn uniformly from 0 to `drop_first_layers`, which is L - 2 by default for L
layers. After training, one adapter works with every m:

    with peftcore.call(model, drop_first_layers=5): ...

m is drawn once for each forward, so all layers, and recomputation in backward, use the same m. It depends only on the
seed and on the number of forwards, so all processes of one training draw the same m. The top layer always has its
adapter. The layers of an encoder and of a decoder are counted separately, from 0 on.

Parameters: 2 d r + r + d an adapter. There are L - m adapters, or L if `robust` is set; with ``target=("attn.output",
"mlp.output")`` a layer has two.

Start: Both matrices from a normal distribution with standard deviation 1e-3, biases at zero. This is nearly an
identity; ``up_init_std=0`` makes it exact.

Differs from the authors' code: The robust kind draws m from 0 to L - 2 for L layers, as in the authors' notebook (10
for the 12 layers of RoBERTa). In the paper it draws up to L - 1.

Use it: `peftcore.apply(model, "adapterdrop", drop_first_layers=1)`, where adapters have to be fast in training and
inference. Under torch.compile, training the robust kind breaks the graph at each adapter.
"""

from __future__ import annotations

import random
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    OUTPUTS,
    ForwardContext,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Shared,
    Site,
    Surgeon,
    Tags,
    block_depths,
    branch_end,
    forward_context,
)
from peftcore.errors import AmbiguousBackward, TargetError, TrainingError, UnsupportedSite
from peftcore_additive._bottleneck import BottleneckOperator


class AdapterDropConfig(MethodConfig):
    """Options of AdapterDrop."""

    method: Literal["adapterdrop"] = "adapterdrop"
    drop_first_layers: NonNegativeInt | None = None
    """The number m of lowest layers in each stack that get no adapter. With `robust`, the largest m that is drawn.
    None: 5, or with `robust` the number of layers minus two."""
    robust: bool = False
    """Adapt all layers, and skip a random number of the lowest adapters at each forward in training."""
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    joins: Joins = "stream"
    """Where the adapter reads and adds: after the host's dropout, layer scale and stochastic depth on a branch's output
    ("stream"), or before them, at the branch's last matrix ("matrix")."""
    init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 1e-3
    """Standard deviation of W_up at the start; 0 makes a fresh adapter an exact identity."""


class Draws(nn.Module):
    """Draws an integer from 0 to `most`, uniformly, for each forward of the model in training.

    The number depends only on the seed and on the number of forwards: the global generator is not advanced, all
    processes of one training draw the same number, and a resumed training continues the sequence. Recomputation in
    backward (checkpointing) gets the number of the first run.
    """

    seed: Tensor
    count: Tensor

    def __init__(self, most: int) -> None:
        """Draw the seed from torch's generator, which peftcore seeds for each injection."""
        super().__init__()
        self.most = most
        self.register_buffer("seed", torch.randint(2**62, ()), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.drawn: WeakKeyDictionary[ForwardContext, int] = WeakKeyDictionary()
        self.blind: set[int] = set()  # what forwards without gradients drew: a reentrant checkpoint round the host
        self.repeated = False  # runs them again inside backward, in another forward context

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch annotates it without its parameters
    def forward(self, call: ForwardContext) -> int:
        """Return the number that is drawn for one forward.

        Raises:
            TrainingError: a part of the host runs by itself, so one forward cannot be distinguished from the next.
                AmbiguousBackward: backward repeats a forward of the whole host, but several forwards with different
                numbers ran before.
        """
        if call not in self.drawn:
            self.drawn[call] = self._again() if call.repeating else self._anew(call)
        return self.drawn[call]

    def _anew(self, call: ForwardContext) -> int:
        if not call.inputs:
            raise TrainingError(
                "adapterdrop draws the number of skipped layers once for each forward of the host; call the host "
                "itself, not a part of it"
            )
        self.count += 1
        number = random.Random(f"{self.seed} {self.count}").randint(0, self.most)
        if not torch.is_grad_enabled():
            self.blind, self.repeated = {number, *(() if self.repeated else self.blind)}, False
        return number

    def _again(self) -> int:
        if len(self.blind) != 1:
            raise AmbiguousBackward(
                "several forwards ran before this backward, each with its own number of skipped layers; run backward "
                "after each forward"
            )
        self.repeated = True
        return min(self.blind)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "drawn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "drawn": WeakKeyDictionary()})


class DroppableOperator(BottleneckOperator):
    """A bottleneck adapter that is skipped in forwards that drop its layer."""

    def __init__(self, site: Site, config: AdapterDropConfig, depth: int, draws: Shared | None) -> None:
        super().__init__(site, config)
        self.depth, self.draws = depth, draws

    def adapt(self, h: Tensor) -> Tensor:
        return h if self.depth < self._dropped() else super().adapt(h)

    def _dropped(self) -> int:
        running = forward_context()
        told = running.context.get("drop_first_layers")
        if told is None and self.draws is not None and self.training:
            return self.draws.module(running)
        return told or 0


class AdapterDrop(Method):
    """Bottleneck adapters in all but the lowest layers.

    Example:
        injection = peftcore.apply(model, "adapterdrop", drop_first_layers=1)  # of two layers
    """

    name = "adapterdrop"
    Config = AdapterDropConfig
    tags = Tags(
        category="additive",
        paper="2010.11918",
        identity_at_init=False,
        identity_options={"up_init_std": 0.0},
    )
    learning_rate = LearningRate(
        1e-4, "adapter-hub/adapters@88f18eb, notebooks/Adapter_Drop_Training.ipynb", on="RoBERTa-base, Rotten Tomatoes"
    )
    target = ("mlp.output",)
    alternatives = OUTPUTS
    config_version = 2
    former_defaults = ({"joins": "matrix", "drop_first_layers": 5},)

    def inject(self, model: nn.Module, config: AdapterDropConfig, surgeon: Surgeon) -> None:
        numbers = block_depths(surgeon)
        found = [(site, self._depth(site, surgeon, numbers)) for site in surgeon.sites()]
        top = max(depth for _, depth in found)
        dropped = config.drop_first_layers
        if dropped is None:
            dropped = max(top - 1, 0) if config.robust else 5
        if dropped > top and not config.robust:
            raise TargetError(
                f"drop_first_layers={dropped} leaves no layer with an adapter: the model has {top + 1} layers; use at "
                f"most {top}"
            )
        draws = surgeon.own("draws", lambda: Draws(min(dropped, top))) if config.robust else None
        for site, depth in found:
            if config.robust or depth >= dropped:
                place = branch_end(surgeon, site, config.at(site.path).joins)
                surgeon.graft(place, DroppableOperator, config, place.places, depth=depth, draws=draws)

    @staticmethod
    def _depth(site: Site, surgeon: Surgeon, numbers: dict[str | None, int]) -> int:
        block = next((entry.block for entry in surgeon.resolver.host.at(site.module_path)), None)
        if block is None:
            raise UnsupportedSite(
                f"{site.path} is outside of the host's layers, so it has no layer number to be dropped by; exclude it"
            )
        return numbers[block]

    @staticmethod
    def parameter_count(site: Site, config: AdapterDropConfig) -> int:
        return 2 * site.out_features * config.bottleneck + config.bottleneck + site.out_features
