"""For each check of quantizers a scheme that fails it, and it only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from toy_quantizer import Toy, ToyLayer, ToyLinear

from peftcore.author import hookimpl

PEFTCORE_API = 2
SCHEMES: dict[str, str] = {}


def mutant(check: str, linear: type[ToyLinear] = ToyLinear, layer: type[ToyLayer] = ToyLayer, **members: Any) -> None:
    """A scheme, findable in this module by the name of the check that it fails."""
    name = "".join(part.title() for part in check.split("_"))
    fields = {"__module__": __name__, "__qualname__": f"{name}Linear", "layer": layer()}
    globals()[f"{name}Linear"] = kind = type(f"{name}Linear", (linear,), fields)
    fields = {"__module__": __name__, "__doc__": "Of a mutant.", "layer": kind.layer, "linear": kind}
    fields["model_config"] = ConfigDict(use_attribute_docstrings=False)  # pydantic would look for its source, at length
    fields |= members
    kinds = {"layer": ClassVar[Any], "linear": ClassVar[Any], "requires": ClassVar[Any], "extra": ClassVar[Any]}
    globals()[name] = type(name, (Toy,), {**fields, "__annotations__": kinds})
    SCHEMES[check] = f"{__name__}:{name}"


NOISE = torch.Generator().manual_seed(0)
"""Not torch's own generator, which another check watches."""


class Noisy(ToyLinear):
    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.scale.mul_(1 + 3e-7 * torch.rand(1, generator=NOISE))


class WrongInBFloat16(ToyLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if x.dtype == torch.bfloat16 and x.dim() == 2 else y


class WrongBackward(ToyLinear):
    def gradient(self, grad: Tensor) -> Tensor:
        gradient = super().gradient(grad)
        return 2 * gradient if grad.dim() == 2 else gradient


@dataclass(frozen=True)
class Measures(ToyLayer):
    def features(self, module: nn.Module) -> tuple[int, int]:
        return tuple(self.unpack(module).shape)  # type: ignore[return-value]


class PassesHooksBy(ToyLinear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


class MixesUpThirds(ToyLinear):
    """Takes what is three times as wide as its input for queries, keys and values in another order."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat(y.chunk(3, -1)[::-1], -1) if self.out_features == 3 * self.in_features == 192 else y


class CopiesNothing(ToyLinear):
    def __deepcopy__(self, memo: Any) -> ToyLinear:
        return self


class HoldsAFunction(ToyLinear):
    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.note = lambda: None


class LosesItsScale(ToyLinear):
    persistent = False


class SpoiltByEvaluation(ToyLinear):
    spoilt = False

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not torch.is_grad_enabled():
            self.seen.append(1)
        return super().forward(x.detach() if self.seen else x)


class PullsTheBias(ToyLinear):
    """Its numbers are right, the gradient of its bias is twice what it should be."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + (self.bias - self.bias.detach()).to(y.dtype)


@dataclass(frozen=True)
class ForgetsHalves(ToyLayer):
    def dtype(self, module: Any) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True)
class PacksCoarser(ToyLayer):
    def pack(self, module: Any, weight: Tensor) -> nn.Module:
        return type(module)(weight.to(module.dtype), module.bits - 1)


@dataclass(frozen=True)
class SignsWhatItPacks(ToyLayer):
    def pack(self, module: Any, weight: Tensor) -> nn.Module:
        module.packed_again = True
        return super().pack(module, weight)


class HasRoom(ToyLinear):
    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.room: list[Tensor] = []


@dataclass(frozen=True)
class KeepsCopies(ToyLayer):
    def unpack(self, module: Any) -> Tensor:
        module.room[:] = [super().unpack(module)]
        return module.room[0].clone()


@dataclass(frozen=True)
class LeavesAMark(ToyLayer):
    def features(self, module: Any) -> tuple[int, int]:
        module.asked = True
        return super().features(module)


def picky(self: Toy, weight: Tensor) -> nn.Module:
    if weight.shape[1] % 2:
        raise ValueError("an odd number of inputs")
    return Toy.module(self, weight)


forgiving = ConfigDict(extra="ignore", frozen=True, strict=True)

mutant("what_is_packed_is_read_back", Noisy)
mutant("forward_uses_the_weight_that_is_read", WrongInBFloat16)
mutant("gradients_pass_to_the_input", WrongBackward)
mutant("shapes_are_told_without_unpacking", layer=Measures)
mutant("quantize_keeps_what_stands_there", PassesHooksBy)
mutant("fused_and_transposed_layers_are_packed", MixesUpThirds)
mutant("copies_compute_the_same", CopiesNothing)
mutant("pickles_compute_the_same", HoldsAFunction)
mutant("state_is_saved_and_loaded", LosesItsScale)
mutant("evaluation_does_not_disturb_training", SpoiltByEvaluation)
mutant("every_kind_of_operator_trains", PullsTheBias)
mutant("merging_into_float_keeps_the_output_and_the_codes", layer=ForgetsHalves)
mutant("merging_into_the_same_format_tells_its_error", layer=PacksCoarser)
mutant("a_bound_refuses_and_changes_nothing", layer=SignsWhatItPacks)
mutant("no_dense_copy_is_kept", HasRoom, KeepsCopies)
mutant("removing_leaves_no_trace", layer=LeavesAMark)
mutant("wrong_options_are_refused", model_config=forgiving)
mutant("missing_packages_are_told", extra="")
mutant("what_does_not_fit_is_refused", module=picky)


@hookimpl
def peftcore_schemes() -> dict[str, str]:
    return SCHEMES
