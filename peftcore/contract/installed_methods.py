"""One method with its operators in a model, for that method's own functions to read: an injection, or a part of a
hybrid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftcore.contract.operators import _Base
from peftcore.contract.surgeon_protocol import Graft, Surgeon
from peftcore.errors import ExportError
from peftcore.layers.pieces import is_empty
from peftcore.targets.sites import Site

if TYPE_CHECKING:
    from peftcore.contract.method import Method


class AppliedMethod(ABC):
    """One method in a model, with its operators. The functions of `Method` get one: an `Injection`, or a `HybridPart`
    where the method is a part of a hybrid. Both read the same: a part names things as if it were applied by itself.
    `trainable` gets a `Planned` too, for a plan.

    Attributes:
        name: of an injection, its name on this model; of a part, its name in the hybrid.
        model: the model.
        method: the method.
        config: its options.
        grafts: the operators, each with its sites.
        steps_taken: which step the method's schedule saw last, if it has one.
    """

    def __init__(self, name: str, surgeon: Surgeon) -> None:
        self.name = name
        self.model = surgeon.model
        self.method: Method = surgeon.method
        self.config: Any = surgeon.config  # of the method's own `Config`
        self.grafts: list[Graft] = surgeon.grafts
        self.steps_taken = 0
        self._surgeon = surgeon

    @property
    @abstractmethod
    def whole(self) -> Installed:
        """The injection itself, or of a part the injection that it belongs to, which is switched, merged, saved,
        removed."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, AppliedMethod]:
        """The methods of a hybrid, by name of the part."""

    @property
    def operators(self) -> dict[str, _Base]:
        """The operators by site path (of a hybrid, prefixed with the name of the part: ``0/model.layers.0.mlp``)."""
        return {graft.key.removeprefix(self._surgeon.part): graft.operator for graft in self.grafts}

    @property
    def sites(self) -> list[Site]:
        """The sites of the operators, in the order in which the method recorded them."""
        return [graft.site for graft in self.grafts]

    @property
    def shared(self) -> dict[str, Any]:
        """State that several operators use, by name."""
        return {name: shared.module for name, shared in self._surgeon.owned.items()}

    @property
    def reads_tokens(self) -> bool:
        """Whether an operator asks for the tokens of the model's forward."""
        return any(each.method.reads_tokens for each in self.family())

    def family(self) -> Iterator[AppliedMethod]:
        """Yields it itself and, of a hybrid, all its parts."""
        yield self
        for part in self.parts.values():
            yield from part.family()

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields operators and shared modules under the names that files use."""
        yield from self.operators.items()
        for name, module in self.shared.items():
            yield f"shared:{name}", module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter of the adapter, each once; all of them, trainable or not."""
        tensors: list[nn.Parameter | None] = []
        for module in (*(g.operator for g in self.grafts), *(shared.module for shared in self._surgeon.owned.values())):
            for inner in module.modules() if module._modules else (module,):
                tensors += inner._parameters.values()
        yield from {id(each): each for each in tensors if each is not None}.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns its tensors by ``<site path>.<operator tensor>``, without the injection's name, as files have them;
        the operators' own, no copies. They may be pieces (FSDP2).

        Raises:
            ExportError: DeepSpeed has cut them apart (ZeRO-3), and they are empty.
        """
        if any(map(is_empty, self.parameters())):
            raise ExportError(
                "DeepSpeed's ZeRO-3 has partitioned the adapter, so its tensors are empty here: call save(folder) in "
                "all processes, which gathers them, or gather them yourself with "
                "deepspeed.zero.GatheredParameters(list(injection.parameters()))"
            )
        return {f"{path}.{key}": value for path, module in self.modules() for key, value in module.state_dict().items()}


class Installed(AppliedMethod):
    """An applied method that is in the model by itself, and not as a part of a hybrid: an `Injection`, as methods and
    forwards of the model see it."""

    @property
    @abstractmethod
    def merged(self) -> bool:
        """Whether its effect is in the host's weights now."""

    @property
    @abstractmethod
    def made_dense(self) -> tuple[str, ...]:
        """The paths of quantized modules that are dense while it is merged."""

    @property
    @abstractmethod
    def low_memory(self) -> bool:
        """Whether to use the least memory instead of being fast."""

    @abstractmethod
    def stored_anew(self, module: nn.Module) -> None:
        """Read the layers of a module's sites again, after the module was quantized or made dense."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Context manager in which the model computes without it.

        Raises:
            MergeError: it is merged and cannot be unmerged.
            CompositionError: the composition in force needs it to combine outputs (`Fuse`).
        """
