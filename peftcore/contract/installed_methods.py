"""One method with its operators in a model: an injection, or a part of a hybrid. The functions of `Method` get it as an
argument."""

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
    """One method in a model, with its operators: the argument of the functions of `Method`. It is an `Injection`, or a
    `HybridPart` if the method is a part of a hybrid. A part has the names of operators and tensors that it would have
    if it were applied alone. In a plan, `Method.trainable` gets a `Planned` instead.

    Attributes:
        name: the name of the injection on this model, or the name of the part in the hybrid.
        model: the model.
        method: the method.
        config: its options.
        grafts: the `Graft` objects, each an operator with its sites.
        steps_taken: the number of the last step that the method's schedule has processed.
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
        """The injection itself; for a part of a hybrid, the injection that contains the part. Only the whole injection
        can be activated, merged, saved or removed."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, AppliedMethod]:
        """The parts of a hybrid, by name; empty for other methods."""

    @property
    def operators(self) -> dict[str, _Base]:
        """The operators by site path. In a hybrid, the path is prefixed with the name of the part:
        ``0/model.layers.0.mlp``."""
        return {graft.key.removeprefix(self._surgeon.part): graft.operator for graft in self.grafts}

    @property
    def sites(self) -> list[Site]:
        """The sites of the operators, in the order in which the method recorded them."""
        return [graft.site for graft in self.grafts]

    @property
    def shared(self) -> dict[str, Any]:
        """The modules that several operators share, by name."""
        return {name: shared.module for name, shared in self._surgeon.owned.items()}

    @property
    def reads_tokens(self) -> bool:
        """Whether an operator uses the tokens of the model's forward (`Method.reads_tokens`)."""
        return any(each.method.reads_tokens for each in self.family())

    def family(self) -> Iterator[AppliedMethod]:
        """Yields the applied method itself and, if it is a hybrid, all its parts."""
        yield self
        for part in self.parts.values():
            yield from part.family()

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields (name, module) for all operators and shared modules. The names are those in files."""
        yield from self.operators.items()
        for name, module in self.shared.items():
            yield f"shared:{name}", module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter of the adapter once, trainable or not."""
        tensors: list[nn.Parameter | None] = []
        for module in (*(g.operator for g in self.grafts), *(shared.module for shared in self._surgeon.owned.values())):
            for inner in module.modules() if module._modules else (module,):
                tensors += inner._parameters.values()
        yield from {id(each): each for each in tensors if each is not None}.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the adapter's tensors by ``<site path>.<operator tensor>``. These are the names in files, without the
        injection's name. The tensors are not copied. With FSDP2 they are sharded tensors.

        Raises:
            ExportError: DeepSpeed (ZeRO-3) has partitioned the tensors, so they are empty in this process.
        """
        if any(map(is_empty, self.parameters())):
            raise ExportError(
                "DeepSpeed's ZeRO-3 has partitioned the adapter, so its tensors are empty here: call save(folder) in "
                "all processes, which gathers them, or gather them yourself with "
                "deepspeed.zero.GatheredParameters(list(injection.parameters()))"
            )
        return {f"{path}.{key}": value for path, module in self.modules() for key, value in module.state_dict().items()}


class Installed(AppliedMethod):
    """An applied method that is not a part of a hybrid. This is the interface of `Injection` that methods and the
    model's forward use.

    Attributes:
        reads_from_base: paths of the model's tensors that the operators compute with, except the tensors at their own
            sites.
    """

    def __init__(self, name: str, surgeon: Surgeon) -> None:
        super().__init__(name, surgeon)
        self.reads_from_base = frozenset(path for graft in self.grafts for path in graft.operator.reads_from_base)

    @property
    @abstractmethod
    def merged(self) -> bool:
        """Whether the adapter is merged into the host's weights now."""

    @property
    @abstractmethod
    def made_dense(self) -> tuple[str, ...]:
        """The paths of quantized modules that are dense (not quantized) while the adapter is merged."""

    @property
    @abstractmethod
    def low_memory(self) -> bool:
        """Whether the adapter's computations save memory at the cost of time."""

    @abstractmethod
    def stored_anew(self, module: nn.Module) -> None:
        """Look up the layers of the adapter's sites in a module again, after the module was quantized or
        dequantized."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Context manager in which the model computes without this adapter.

        Raises:
            MergeError: the adapter is merged and cannot be unmerged.
            CompositionError: the active composition needs the adapter to combine outputs (`Fuse`).
        """
