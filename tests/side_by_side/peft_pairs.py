"""The same adapter in both libraries: which tensor of peft holds the same numbers as which of ours, and in what layout.

A comparison puts the same random numbers into both, then compares outputs, gradients and merged weights. It fails if
peft has an adapter tensor that nothing of ours is paired with: then the two did not adapt the same sites.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

import peftcore
from peftcore.contract.operators import _Base
from peftcore.injection.injection import Injection
from peftcore.layers import kinds
from peftcore.targets.sites import Site

ADAPTER = "default"
FILL = 0.1
"""Adapter tensors are N(0, FILL): at their initial values every method equals the base."""
OUTPUTS = 1e-5
"""Accepted difference of outputs, relative to the largest output."""
MOVED = 1000 * OUTPUTS
"""The outputs must have moved by this much, or their being equal proves nothing."""
GRADIENTS = 1e-4
"""Accepted difference of the gradient of a tensor, relative to its largest entry."""
MERGED = 1e-6
"""Accepted difference of a merged weight, relative to its largest entry."""


@dataclass(frozen=True)
class Pair:
    """One tensor in both libraries."""

    name: str
    ours: nn.Parameter
    theirs: nn.Parameter
    seen: Callable[[Tensor], Tensor]
    """A view of peft's tensor in our layout."""
    factor: float = 1.0
    """Our gradient is this many times peft's, where the scales differ."""


Pairing = Callable[[Site, _Base, nn.Module], Iterator[Pair]]
"""The pairs of one site, from the root of peft's host."""


def lora_pairs(site: Site, operator: _Base, theirs: nn.Module) -> Iterator[Pair]:
    """A and B; stacked experts lie side by side in peft's matrices: ``(experts * rank, in)``, ``(out, rank *
    experts)``."""
    A, B, _ = operator.factors()
    layer = lora_layer(site, theirs)
    if ADAPTER in layer.lora_embedding_A:
        theirs_a, theirs_b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    else:
        theirs_a, theirs_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    yield Pair(f"{site.path}.A", A, theirs_a, lambda t: t.view(A.shape))
    if site.batch:
        experts, out, rank = B.shape
        yield Pair(f"{site.path}.B", B, theirs_b, lambda t: t.view(out, rank, experts).permute(2, 0, 1))
    else:
        yield Pair(f"{site.path}.B", B, theirs_b, lambda t: t.view(B.shape))


def lora_layer(site: Site, theirs: nn.Module) -> Any:
    """peft's layer for a site: wrappers of parameters nest, one for each parameter of a module."""
    layer = theirs.get_submodule(site.module_path)
    while isinstance(layer, ParamWrapper) and layer.parameter_name != site.tensor:
        layer = layer.base_layer
    return layer


def dora_pairs(site: Site, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """A, B and the magnitude, which peft shapes for broadcasting."""
    layer: Any = theirs.get_submodule(site.module_path)
    embedding = ADAPTER in layer.lora_embedding_A
    theirs_a = layer.lora_embedding_A[ADAPTER] if embedding else layer.lora_A[ADAPTER].weight
    theirs_b = layer.lora_embedding_B[ADAPTER] if embedding else layer.lora_B[ADAPTER].weight
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight
    yield Pair(f"{site.path}.A", operator.A, theirs_a, lambda t: t.view(operator.A.shape))
    yield Pair(f"{site.path}.B", operator.B, theirs_b, lambda t: t.view(operator.B.shape))
    yield Pair(f"{site.path}.magnitude", operator.magnitude, magnitude, lambda t: t.view(-1))


def ia3_pairs(site: Site, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """The vector, which peft stores as a column, a row, or with the dimensions of a kernel."""
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.gain, layer.ia3_l[ADAPTER], lambda t: t.view(-1))


def ln_tuning_pairs(site: Site, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """peft trains a copy of the whole norm."""
    layer: Any = theirs.get_submodule(site.module_path)
    copy = layer.ln_tuning_layers[ADAPTER]
    yield Pair(site.path, operator.value, copy.get_parameter(site.tensor), lambda t: t)


PAIRINGS: dict[str, Pairing] = {
    "lora": lora_pairs,
    "dora": dora_pairs,
    "ia3": ia3_pairs,
    "ln_tuning": ln_tuning_pairs,
}


class Both:
    """One host adapted twice, once by each library, with the same numbers in the adapters."""

    accepted = MERGED
    """Accepted difference of a merged weight; a test says where more is computed in float32, and why."""

    def __init__(
        self,
        base: nn.Module,
        method: str,
        options: Mapping[str, Any],
        config: peft.PeftConfig,
        pairing: Pairing | None = None,
    ) -> None:
        self.base, self.ours = base, deepcopy(base)
        self.injection: Injection = peftcore.apply(self.ours, method, **options)
        self.tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](deepcopy(base), config, ADAPTER)
        pairing = pairing or PAIRINGS[method]
        self.pairs = [
            pair for graft in self.injection.grafts for pair in pairing(graft.site, graft.operator, self.tuner.model)
        ]
        for model in (base, self.ours, self.tuner):
            model.train(base.training)
        self._same_sites()
        self._fill()

    def _same_sites(self) -> None:
        paired = {id(pair.theirs) for pair in self.pairs}
        alone = [name for name, p in self.tuner.model.named_parameters() if p.requires_grad and id(p) not in paired]
        assert not alone, f"peft trains these and we do not: {alone}"
        assert {id(p) for p in self.injection.parameters()} == {id(pair.ours) for pair in self.pairs}

    @torch.no_grad()
    def _fill(self) -> None:
        for pair in self.pairs:
            pair.ours.normal_(0, FILL)
            pair.seen(pair.theirs.data).copy_(pair.ours)

    @torch.no_grad()
    def change(self, name: str, change: Callable[[Tensor], Any]) -> None:
        """Change one pair in place, in both libraries."""
        (pair,) = (each for each in self.pairs if each.name == name)
        change(pair.ours.data)
        change(pair.seen(pair.theirs.data))

    def outputs(self, run: Callable[[nn.Module], Tensor], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """What the base, ours and theirs compute; random numbers inside (dropout) are the same."""
        results = []
        for model in (self.base, self.ours, self.tuner.model):
            torch.manual_seed(seed)
            results.append(run(model))
        return results[0], results[1], results[2]

    def assert_same_outputs(self, run: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
        """Equal to each other, and far from the base."""
        base, ours, theirs = self.outputs(run)
        assert difference(ours, base) >= MOVED, "the adapters hardly moved the output"
        assert difference(ours, theirs) <= OUTPUTS
        return ours, theirs

    def assert_same_gradients(self, ours: Tensor, theirs: Tensor) -> None:
        """Of every adapter tensor, for one random direction of the output."""
        direction = torch.randn_like(ours)
        for output in (ours, theirs):
            (output * direction).sum().backward()
        for pair in self.pairs:
            expected = pair.seen(pair.theirs.grad) * pair.factor
            assert expected.abs().max() > 0, f"{pair.name} gets no gradient"
            error = difference(pair.ours.grad, expected)
            assert error <= GRADIENTS, f"gradient of {pair.name}: relative error {error:.1e}"

    def assert_same_merged(self) -> None:
        """Every parameter of the host after merging; at least one of them moved."""
        before = dict(self.base.named_parameters())
        self.injection.bake()
        ours, theirs = dict(self.ours.named_parameters()), dict(self.tuner.merge_and_unload().named_parameters())
        assert ours.keys() == theirs.keys() == before.keys()
        for name, expected in theirs.items():
            error = difference(ours[name], expected)
            assert error <= self.accepted, f"merged {name}: relative error {error:.1e}"
        assert any(difference(ours[name], before[name]) >= MOVED for name in before)

    def assert_same(self, run: Callable[[nn.Module], Tensor]) -> None:
        """Outputs, gradients, merged weights; the first two also on the way that activations of real size go."""
        for small in (kinds.SMALL, 0):
            for pair in self.pairs:
                pair.ours.grad = pair.theirs.grad = None
            with mock.patch("peftcore.layers.kinds.SMALL", small):
                self.assert_same_gradients(*self.assert_same_outputs(run))
        self.assert_same_merged()


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value (absolute where all of that is zero)."""
    assert actual.shape == expected.shape
    largest = expected.abs().max().double()
    return ((actual.double() - expected.double()).abs().max() / torch.where(largest == 0, 1.0, largest)).item()
